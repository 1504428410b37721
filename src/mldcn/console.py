"""What the command line shows: tables, progress bars, and plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mldcn.data.describe import Description
from mldcn.data.rejects import Reject
from mldcn.training.observers import Metrics, Observer
from mldcn.training.observers import Progress as Step

if TYPE_CHECKING:  # they load PyTorch
    from mldcn.cost import Memory, ModelCost, Target, Timings
    from mldcn.explain import Explanation
    from mldcn.interactions import Info
    from mldcn.repeats import Repeats

PLAIN_SECONDS = 10.0  # between lines where there is no terminal

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for a table; a dash where it is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; columns that hold words stand left, those of numbers right."""
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        words = any(isinstance(row[i], str) and row[i][:1].isalpha() for row in rows)
        shown.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, str) else number(cell) for cell in row))
    # Where there is no terminal nothing says how wide a line may be: let no column be folded.
    (out if out.is_terminal else Console(highlight=False, width=200)).print(shown, soft_wrap=False)


def metrics_table(title: str, metrics: Mapping[str, Metrics]) -> None:
    """Prints split -> task -> metric -> value, a row a split and task."""
    names: dict[str, None] = {}
    for of_tasks in metrics.values():
        for values in of_tasks.values():
            names.update(dict.fromkeys(values))
    rows = [
        [split, task, *(values.get(name) for name in names)]
        for split, of_tasks in metrics.items()
        for task, values in of_tasks.items()
    ]
    table(title, ["split", "task", *names], rows)


def repeats_tables(title: str, found: Repeats) -> None:
    """Prints how far copies of one model lie apart: their metrics, and their predictions of the test rows."""
    for split in found.metrics:
        rows = [
            [task, metric, f"{s.mean:.5f}", f"{s.deviation:.5f}"] for task, metric, s in found.rows(split)
        ]
        columns = ["task", "metric", "mean", "deviation"]
        table(f"{title}, {split}: {len(found.seeds)} copies", columns, rows)
    apart = [
        [task, f"{a.mean:.5f}", f"{a.difference:.5f}", f"{a.relative:.2%}"]
        for task, a in found.predictions.items()
    ]
    if apart:
        columns = ["task", "mean prediction", "mean absolute difference", "relative"]
        table("predictions of the test rows, all pairs of copies", columns, apart)


def explain_tables(found: Explanation) -> None:
    """Prints the main points of what a run learned."""
    from mldcn.explain.wording import findings

    for task, metrics in found.metrics.items():
        rows = [
            [i.feature, f"{i.drop:+.5f}", f"[{i.low:+.5f}, {i.high:+.5f}]"] for i in found.ranked(task)[:15]
        ]
        title = f"{task}: AUC {metrics['auc']:.5f} on {found.rows:,} of {found.total:,} rows ({found.where})"
        table(title, ["feature permuted", "AUC lost", "95 % interval"], rows)
    if found.crosses:
        layer = found.crosses[0]
        pairs = [[f"{a} x {b}", f"{norm:.3f}"] for a, b, norm in found.pairs(layer)[:10]]
        table(f"strongest pairs, {layer.name}: blocks of {layer.formula}", ["pair", "norm"], pairs)
        ranks = []
        for layer in found.crosses:
            both = [(layer.learned.ranks[t], layer.initial.ranks[t]) for t in layer.learned.ranks]
            ranks.append([layer.name, len(layer.learned.values), *(rank for pair in both for rank in pair)])
        columns = [c for t in found.crosses[0].learned.ranks for c in (f"at {t:g}", f"at {t:g}, initial")]
        table("numerical rank", ["layer", "bound", *columns], ranks)
    if found.masks:
        masks = []
        for mask in found.masks:
            whole = mask.whole
            numbers = [f"{value:.3f}" for value in (whole.mean, whole.spread, whole.over_examples)]
            masks.append([mask.name, *numbers, share(whole.near_zero), share(whole.amplified)])
        table("masks", ["mask", "mean", "spread", "over examples", "near zero", "amplified"], masks)
    for line in findings(found):
        out.print(line, markup=False)


def models_table(infos: Sequence[Info]) -> None:
    """Prints what the registry knows of architectures."""
    rows = [
        [
            i.name,
            i.title,
            f"{i.paper}, {i.year}",
            ", ".join(knob for knob in (i.knob, i.secondary) if knob) or "–",
            i.order,
            i.cost,
        ]
        for i in infos
    ]
    columns = ["name", "what", "paper", "width knobs", "order", "GEMM FLOPs an example"]
    table("interactions; 'mldcn cost NAME' shows an architecture's options", columns, rows)


def cost_tables(target: Target, cost: ModelCost, candidates: int, batch_sizes: Sequence[int]) -> None:
    """Prints what a model costs: work and parameters by part, and the weights that it reads."""
    from mldcn.cost import options, total

    layout, request = target.x0(), cost.request(candidates)
    rows: list[list[Any]] = [["tables", cost.table_parameters, "", "", "", ""]]
    for part, work in cost.example.items():
        whole = request[part]
        rows.append([part, cost.parameters[part], work.gemm, work.elementwise, whole.gemm, whole.elementwise])
    one, all_ = total(cost.example), total(request)
    parameters = cost.table_parameters + sum(cost.parameters.values())
    rows.append(["total", parameters, one.gemm, one.elementwise, all_.gemm, all_.elementwise])
    shown = options(target)
    name = shown.pop("name")
    tasks = len(target.layout.tasks)
    title = f"{name}: x0 of {layout.width} columns from {len(layout)} fields, {tasks} task{'s' * (tasks > 1)}"
    columns = ["part", "parameters", "GEMM FLOPs", "element-wise", f"GEMM, request of {candidates}"]
    table(title, [*columns, f"element-wise, request of {candidates}"], rows)
    reads = ", ".join(f"{size(cost.bytes_read(batch))} in a batch of {batch:,}" for batch in batch_sizes)
    out.print(
        f"weights read for an example (its rows, its share of the dense weights): {reads}", markup=False
    )
    out.print("options: " + ", ".join(f"{key} {value}" for key, value in shown.items()), markup=False)
    if target.assumed:
        few = ", ".join(target.assumed[:5]) + (", …" if len(target.assumed) > 5 else "")
        out.print(f"tables of {target.rows:,} rows are assumed: {few}", markup=False)


def memory_table(batch_size: int, found: Mapping[str, Memory]) -> None:
    """Prints the peak memory of training, estimated and measured."""
    rows = [[how, size(m.lasting), size(m.step), size(m.peak)] for how, m in found.items()]
    columns = ["how", "weights, optimiser, batch", "a step beyond them", "peak"]
    table(f"training memory, batches of {batch_size:,}", columns, rows)


def latency_table(timings: Timings) -> None:
    """Prints how long a model takes to score batches."""
    rows = [
        [
            f"{t.batch:,}",
            f"{1e3 * t.median:.3f}",
            f"{1e3 * t.p99:.3f}",
            t.calls,
            f"{t.batch / t.median:,.0f}",
            share(t.share),
        ]
        for t in timings.latencies
    ]
    title = (
        f"latency on {timings.device}, {timings.threads} thread(s); matrix products run at "
        f"{timings.matrix_rate / 1e9:,.1f} GFLOP/s"
    )
    columns = ["batch", "median ms", "p99 ms", "calls", "rows/s", "share of that rate"]
    table(title, columns, rows)


def size(count: float) -> str:
    """Bytes in a unit that suits them."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:,.2f} {unit}"
    return f"{count:,.0f} bytes"


def description_tables(description: Description) -> None:
    """Prints what a schema makes of a log: its features, numbers and labels."""
    warn_of_rejects(description.rejected, description.first_reject, None)
    rows = []
    for f in description.features:
        top = ", ".join(f"{value} ({count:,})" for value, count in f.top)
        if f.numbers is not None:
            n = f.numbers
            low, middle, high = n.quantiles[0], n.quantiles[len(n.quantiles) // 2], n.quantiles[-1]
            top = f"min {n.minimum:.4g}, 1 % {low:.4g}, median {middle:.4g}, 99 % {high:.4g}, max {n.maximum:.4g}"
        shares = [share(f.coverage), f.distinct, f.table_rows, share(f.oov_train), share(f.oov_held_out)]
        rows.append([f.name, f.kind, f.source, *shares, top])
    columns = ["feature", "kind", "source", "coverage", "distinct", "table rows", "OOV train", "OOV held out"]
    counts = ", ".join(f"{part} {count:,}" for part, count in description.rows.items())
    table(f"rows: {counts}", [*columns, "most frequent, or range"], rows)
    labels = [
        [label.name, part, label.known[part], share(label.rate[part])]
        for label in description.labels
        for part in label.known
    ]
    table("labels", ["task", "part", "rows with the label", "positive"], labels)


def warn_of_rejects(count: int, first: Reject | None, path: Path | None) -> None:
    """Says how many rows of a log were left out, and where each is named."""
    if count:
        where = f"{path} names each" if path is not None else f"the first: {first}"
        err.print(f"warning: {count:,} bad rows are left out; {where}", markup=False)


def share(value: float | None) -> str:
    """A share in percent; a dash where it is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


class EncodingProgress:
    """Shows how far the encoding of a log is; called with (stage, rows, bytes done, bytes in all)."""

    def __init__(self) -> None:
        self.stage = ""
        self.started = self.shown = 0.0
        self.bar: Progress | None = None

    def __call__(self, stage: str, rows: int, bytes_done: int, bytes_total: int) -> None:
        """Shows the state."""
        now = time.perf_counter()
        if stage != self.stage:
            self.close()
            self.stage, self.started, self.shown = stage, now, now
            if err.is_terminal:
                columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
                self.bar = Progress(*columns, TimeRemainingColumn(), console=err, transient=True)
                self.bar.start()
                self.bar.add_task(stage, total=bytes_total, rate="")
        rate = f"{rows:,} rows, {rows / max(now - self.started, 1e-3):,.0f} rows/s"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=bytes_done, total=bytes_total, rate=rate)
        elif now - self.shown > PLAIN_SECONDS:
            self.shown = now
            err.print(f"{stage}: {rate}")

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class FitProgress(Observer):
    """Shows a run's loss, speed, time left and validation metrics.

    Args:
        monitor: the (task, metric) that early stopping looks at.
        label: shown before each line, where several runs follow each other.
    """

    def __init__(self, monitor: tuple[str, str], label: str = "") -> None:
        self.task, self.metric = monitor
        self.label = label
        self.shown = time.perf_counter()
        self.bar: Progress | None = None

    def started(self, title: str, total_steps: int, step: int) -> None:
        """Starts the bar."""
        self.label = self.label or title
        if step:
            err.print(f"{self.label}: goes on at step {step:,}")
        if err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bar = Progress(
                *columns,
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=err,
                transient=True,
            )
            self.bar.start()
            self.bar.add_task(self.label, total=total_steps, completed=step, state="")

    def stepped(self, progress: Step) -> None:
        """Moves the bar."""
        state = f"loss {progress.loss:.4f}, {progress.rows_per_second:,.0f} rows/s"
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=progress.step, state=state)
        elif now - self.shown > PLAIN_SECONDS:
            self.shown = now
            err.print(f"{self.label}: step {progress.step:,} of at most {progress.total_steps:,}, {state}")

    def evaluated(self, step: int, metrics: Metrics, *, best: bool) -> None:
        """Prints a line."""
        values = metrics[self.task]
        shown = dict.fromkeys([self.metric, "logloss"])
        text = ", ".join(f"{name} {number(values.get(name), 5)}" for name in shown)
        mark = "  best so far" if best else ""
        err.print(f"{self.label}: step {step:,}, validation {self.task} {text}{mark}")

    def noted(self, text: str) -> None:
        """Prints a line."""
        err.print(f"{self.label or 'fit'}: {text}", markup=False)

    def finished(self, metrics: Mapping[str, Metrics]) -> None:
        """Ends the bar."""
        self.close()

    def stopped(self) -> None:
        """Ends the bar."""
        self.close()

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
