"""The page that compares runs on one test set, and the page of a single run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mldcn.report import plots
from mldcn.report.blocks import (
    Block,
    Bullets,
    Callout,
    Code,
    Details,
    Figure,
    Figures,
    Heading,
    KeyValues,
    Paragraph,
)
from mldcn.report.page import Page
from mldcn.report.plots import Curve, Point
from mldcn.report.summary import FeatureSummary, Metrics, RunSummary, metric_column, metric_names, task_names
from mldcn.report.table import Cell, Column, Interval, Label, Table, table_of
from mldcn.report.text import known, number, percent, slug
from mldcn.report.wording import AUC, finding, reading, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

MetricsRow = tuple[str, str, Mapping[str, float]]  # task, split, metrics


def comparison_page(
    title: str,
    runs: Sequence[RunSummary],
    *,
    reference: str = "",
    protocol: str = "",
    facts: Sequence[tuple[str, str]] = (),
    attainable: Metrics | None = None,
    next_steps: Sequence[tuple[str, str]] = (),
    level: float = 0.95,
    footer: str = "",
) -> Page:
    """The page that compares runs: finding, tables, plots, and every run's config.

    Args:
        title: of the page.
        runs: at least one; the order is kept, the first run's first task is the main one.
        reference: name of the run that ``differences`` are taken against.
        protocol: what was run, how and on which rows, in a paragraph.
        facts: the protocol's numbers by name.
        attainable: task -> metric -> what the true probabilities reach, where they are known.
        next_steps: (why, command) to go on with.
        level: of the intervals.
        footer: the page's last line.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("a comparison needs at least one run")
    attainable = attainable or {}
    tasks = task_names(runs)
    files = _file_names(tasks)
    page = Page(title, subtitle=_subtitle(runs, tasks), footer=footer)
    page.add(finding(runs, reference, tasks, level))
    if protocol or facts:
        page.add(Heading("What was run"))
        page.add(*([Paragraph(protocol)] if protocol else []), *([KeyValues(facts)] if facts else []))
    page.add(Heading("Ranking quality" + (f" on {tasks[0]}" if len(tasks) > 1 else "")))
    page.add(
        quality_table(
            runs, tasks[0], reference=reference, attainable=attainable.get(tasks[0], {}), level=level
        )
    )
    drawn = comparison_plots(runs, attainable=attainable, level=level)
    page.add(*_pictures(drawn, f"auc-{files[tasks[0]]}", "cost"))
    if len(tasks) > 1:
        page.add(Heading("Other tasks"))
        for task in tasks[1:]:
            measured = attainable.get(task, {})
            page.add(quality_table(runs, task, reference=reference, attainable=measured, level=level))
        page.add(*_pictures(drawn, *(f"auc-{files[task]}" for task in tasks[1:])))
    page.add(*_section("Learning curves and calibration", _pictures(drawn, "curve", "reliability")))
    page.add(*_section("Cost", _cost_table(runs)))
    page.add(Heading("How to read this"), Bullets(reading(runs, reference, tasks, level, bool(attainable))))
    page.add(*(Callout("Next", why, "next", (command,) if command else ()) for why, command in next_steps))
    page.add(*_configs(runs))
    return page


def run_page(
    title: str,
    run: RunSummary,
    *,
    protocol: str = "",
    facts: Sequence[tuple[str, str]] = (),
    features: Sequence[FeatureSummary] = (),
    attainable: Metrics | None = None,
    next_steps: Sequence[tuple[str, str]] = (),
    level: float = 0.95,
    footer: str = "",
) -> Page:
    """The page of a single run. The arguments are those of :func:`comparison_page`, and the log's features."""
    page = Page(title, subtitle=f"{run.name}: {run.options}" if run.options else run.name, footer=footer)
    if protocol or facts:
        page.add(*([Paragraph(protocol)] if protocol else []), *([KeyValues(facts)] if facts else []))
    page.add(Heading("Metrics"), _metrics_table(run, attainable or {}))
    drawn = comparison_plots([run], attainable=attainable or {}, level=level)
    page.add(*_section("Learning curve and calibration", _pictures(drawn, "curve", "reliability")))
    page.add(*_section("Cost", _cost_table([run])))
    if features:
        page.add(Heading("Features"), features_table(features))
    page.add(*(Callout("Next", why, "next", (command,) if command else ()) for why, command in next_steps))
    page.add(*_configs([run]))
    return page


def quality_table(
    runs: Sequence[RunSummary],
    task: str,
    *,
    reference: str = "",
    attainable: Mapping[str, float] | None = None,
    level: float = 0.95,
) -> Table:
    """Every run's test metrics on a task, with the difference to the reference and its interval."""
    best = (attainable or {}).get(AUC)
    share = (
        f"of the way from 0.5 (chance) to {number(best, '.4f')}, the AUC of the true probabilities."
        if best is not None
        else ""
    )
    against = f"against {reference}" if reference else "against the reference"
    columns: list[tuple[Column, Callable[[RunSummary], Cell]]] = [
        (Column(name="Model"), lambda run: Label(run.name, run.options)),
        (metric_column(AUC), lambda run: _auc(run, task)),
        (Column(name="AUC difference", unit=against, format="+.4f"), lambda run: _difference(run, task)),
        (
            Column(name="p", format="p"),
            lambda run: run.differences[task].p if task in run.differences else None,
        ),
        (Column(name="Reading"), lambda run: verdict(run, task, reference)),
        (Column(name="FLOPs", unit="an example", format="si"), lambda run: run.flops),
        (Column(name="Parameters", format="si"), lambda run: run.params),
        (
            Column(name="Share of the attainable", format=".1%", note=share),
            lambda run: _share(run, task, best),
        ),
    ]
    for name in metric_names(run.metrics.get(task, {}) for run in runs):
        if name != AUC:
            columns.append((metric_column(name), _metric_of(task, name)))
    notes = (
        [f"The range given with a number is its {percent(level)} interval."]
        if _any_interval(runs, task)
        else []
    )
    for name, value in (attainable or {}).items():
        if name != AUC and known(value):
            notes.append(f"{metric_column(name).name} of the true probabilities: {number(value, '.4f')}.")
    return table_of(f"{task}: test metrics", runs, columns, name=f"quality-{slug(task)}", notes=notes)


def features_table(features: Sequence[FeatureSummary]) -> Table:
    """The log's features."""
    columns: list[tuple[Column, Callable[[FeatureSummary], Cell]]] = [
        (Column(name="Feature"), lambda feature: feature.name),
        (Column(name="Kind"), lambda feature: feature.kind),
        (Column(name="Source"), lambda feature: feature.source or None),
        (Column(name="Table rows"), lambda feature: feature.rows),
        (Column(name="Width in x0"), lambda feature: feature.width),
        (Column(name="Missing", format=".1%"), lambda feature: feature.missing),
    ]
    return table_of("Features of the log", features, columns, name="features")


def comparison_plots(
    runs: Sequence[RunSummary], *, attainable: Metrics | None = None, level: float = 0.95
) -> dict[str, tuple[Plot, str, str]]:
    """The report's plots: file name -> figure, title, caption. A run keeps its style in all of them.

    ``plots.save`` writes a figure as SVG or PNG.
    """
    drawn: dict[str, tuple[Plot, str, str]] = {}
    tasks = task_names(runs)
    files = _file_names(tasks)
    for task in tasks:
        of = f" of {task}" if len(tasks) > 1 else ""
        points = [_point(run, task, i) for i, run in enumerate(runs) if known(run.metric(task, AUC))]
        if len(points) > 1:
            bars = f" Lines are {percent(level)} intervals." if any(p.low is not None for p in points) else ""
            figure = plots.intervals(
                points, x_label="test AUC", attainable=(attainable or {}).get(task, {}).get(AUC)
            )
            drawn[f"auc-{files[task]}"] = (
                figure,
                f"Test AUC{of} by model",
                f"Further right is better.{bars}",
            )
            if task == tasks[0] and sum(known(p.cost) for p in points) > 1:
                figure = plots.against_cost(points, y_label="test AUC", x_label="FLOPs an example")
                caption = f"Up is better, left is cheaper. The scale of FLOPs is logarithmic.{bars}"
                drawn["cost"] = (figure, f"AUC{of} against cost", caption)
        lines = [
            Curve(run.name, [step for step, _ in run.history], _aucs(run, task), i)
            for i, run in enumerate(runs)
        ]
        if lines := [line for line in lines if any(map(known, line.values))]:
            figure = plots.curves(lines, y_label="validation AUC", best="max")
            caption = "The point marks a run's best evaluation on this task."
            drawn[f"curve-{files[task]}"] = (figure, f"Validation AUC{of} while training", caption)
        bins = [
            run.reliability[task].series(run.name, i) for i, run in enumerate(runs) if task in run.reliability
        ]
        if bins:
            caption = (
                "On the dashed line predictions are right on average; above it they are too low. "
                "A larger point holds more rows."
            )
            drawn[f"reliability-{files[task]}"] = (
                plots.reliability(bins),
                f"Reliability{of} on test rows",
                caption,
            )
    return drawn


def _metrics_table(run: RunSummary, attainable: Metrics) -> Table:
    """A single run's metrics, a row a task and split."""
    rows: list[MetricsRow] = []
    for task in task_names([run]):
        splits = (("validation", run.valid_metrics), ("test", run.metrics), ("attainable", attainable))
        rows += [(task, split, metrics[task]) for split, metrics in splits if metrics.get(task)]
    columns: list[tuple[Column, Callable[[MetricsRow], Cell]]] = [
        (Column(name="Task"), lambda row: row[0]),
        (Column(name="Rows"), lambda row: row[1]),
    ]
    for name in metric_names(row[2] for row in rows):
        # Rows of one model are of different tasks and splits: there is no best one.
        column = replace(metric_column(name), best=None)
        columns.append((column, _cell_of(run, name)))
    return table_of("Metrics by task", rows, columns, name="metrics")


def _cell_of(run: RunSummary, name: str) -> Callable[[MetricsRow], Cell]:
    def cell(row: MetricsRow) -> Cell:
        task, split, metrics = row
        if name == AUC and split == "test" and task in run.intervals:
            return Interval(metrics.get(name), *run.intervals[task])
        return metrics.get(name)

    return cell


def _metric_of(task: str, name: str) -> Callable[[RunSummary], Cell]:
    return lambda run: run.metric(task, name)


def _cost_table(runs: Sequence[RunSummary]) -> list[Block]:
    columns: list[tuple[Column, Callable[[RunSummary], Cell]]] = [
        (Column(name="Model"), lambda run: run.name),
        (Column(name="FLOPs", unit="an example", format="si"), lambda run: run.flops),
        (Column(name="Dense parameters"), lambda run: run.dense_params),
        (Column(name="Embedding parameters"), lambda run: run.embedding_params),
        (Column(name="Training time", format="duration"), lambda run: run.seconds),
        (Column(name="Training rows", unit="a second", format="si"), lambda run: run.rows_per_second),
    ]
    table = table_of(
        "What each model costs" if len(runs) > 1 else "What the model costs", runs, columns, name="cost"
    )
    return [table] if len(table.columns) > 1 else []


def _auc(run: RunSummary, task: str) -> Cell:
    value = run.metric(task, AUC)
    return Interval(value, *run.intervals[task]) if task in run.intervals else value


def _difference(run: RunSummary, task: str) -> Cell:
    difference = run.differences.get(task)
    return Interval(difference.delta, difference.low, difference.high) if difference else None


def _share(run: RunSummary, task: str, best: float | None) -> float | None:
    value = run.metric(task, AUC)
    return None if value is None or best is None or best <= 0.5 else (value - 0.5) / (best - 0.5)


def _any_interval(runs: Sequence[RunSummary], task: str) -> bool:
    return any(task in run.intervals or task in run.differences for run in runs)


def _point(run: RunSummary, task: str, style: int) -> Point:
    low, high = run.intervals.get(task, (None, None))
    value = run.metric(task, AUC)
    return Point(run.name, float("nan") if value is None else value, low, high, run.flops, style)


def _aucs(run: RunSummary, task: str) -> list[float]:
    return [metrics.get(task, {}).get(AUC, float("nan")) for _, metrics in run.history]


def _subtitle(runs: Sequence[RunSummary], tasks: Sequence[str]) -> str:
    models = f"{len(runs)} models" if len(runs) > 1 else "1 model"
    return (
        f"{models}, {len(tasks)} tasks: {', '.join(tasks)}"
        if len(tasks) > 1
        else f"{models}, task {tasks[0]}"
    )


def _section(title: str, blocks: Sequence[Block]) -> list[Block]:
    return [Heading(title), *blocks] if blocks else []


def _pictures(drawn: Mapping[str, tuple[Plot, str, str]], *chosen: str) -> list[Block]:
    """The plots of these file names or kinds (a name's first word), with a text for those who cannot see them."""
    figures = [
        Figure(name, plots.to_svg(figure), title, f"Plot: {title}. The numbers are in the tables.", caption)
        for name, (figure, title, caption) in drawn.items()
        if name in chosen or name.split("-")[0] in chosen
    ]
    return [Figures(figures)] if figures else []


def _file_names(tasks: Sequence[str]) -> dict[str, str]:
    """A part of a file name for each task, no two alike."""
    names: dict[str, str] = {}
    for task in tasks:
        name = slug(task)
        names[task] = name if name not in names.values() else f"{name}-{len(names) + 1}"
    return names


def _configs(runs: Sequence[RunSummary]) -> list[Block]:
    blocks: list[Block] = [Details(f"Config of {run.name}", [Code(run.config)]) for run in runs if run.config]
    return _section("Configs" if len(blocks) > 1 else "Config", blocks)
