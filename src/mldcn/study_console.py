"""What a study shows while it runs: its plan, the run at hand, the table so far, the time left."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mldcn.console import EncodingProgress, err, number, table
from mldcn.study.engine import PlanLine, Standing, Watcher
from mldcn.study.rows import RunRow, Study


class StudyProgress(Watcher):
    """Shows a study's progress: a table that is kept up to date, or plain lines where there is no terminal."""

    def __init__(self) -> None:
        self.encoding_bar = EncodingProgress()
        self.live: Live | None = None

    def encoding(self, stage: str, rows: int, bytes_done: int, bytes_total: int) -> None:
        """Shows how far the encoding is."""
        self.encoding_bar(stage, rows, bytes_done, bytes_total)

    def planned(self, lines: Sequence[PlanLine], standing: Standing) -> None:
        """Prints the plan."""
        self.encoding_bar.close()
        plan_table(lines, standing)

    def moved(self, standing: Standing, row: RunRow | None) -> None:
        """Shows what runs, or what a run came to."""
        if err.is_terminal:
            if self.live is None:
                self.live = Live(console=err, transient=True, auto_refresh=False)
                self.live.start()
            state = Text(f"{_left(standing)}; now {', '.join(standing.running) or 'nothing'}")
            self.live.update(Group(results_table(standing.study), state), refresh=True)
        if row is not None:
            err.print(f"{outcome(standing.study, row)}; {_left(standing)}", markup=False)

    def measuring(self, what: str) -> None:
        """Says what is being measured."""
        self.close()
        err.print(f"memory and latency: {what}", markup=False)

    def close(self) -> None:
        """Ends what is shown."""
        self.encoding_bar.close()
        if self.live is not None:
            self.live.stop()
            self.live = None


def plan_table(lines: Sequence[PlanLine], standing: Standing) -> None:
    """Prints the models of a study, what they cost, and what is left to run."""
    rows = [
        [
            line.rival,
            line.point,
            line.knob or "–",
            line.cost,
            "–" if line.residual is None else f"{line.residual:+.2%}",
            line.parameters,
            line.trials,
            line.runs,
            duration(line.seconds),
        ]
        for line in lines
    ]
    columns = ["rival", "at", "turned", "FLOPs", "misses by", "dense parameters", "trials", "runs", "about"]
    facts = standing.study.facts
    counts = ", ".join(f"{count:,} {split}" for split, count in facts.rows.items())
    table(f"{standing.study.recipe.title}: {counts} rows; {_left(standing)}", columns, rows)
    trials = sum(line.trials for line in lines)
    if trials:
        err.print(
            "widths are those of the config as it stands; a tuned rival's are solved again with its settings",
            markup=False,
        )


def results_table(study: Study) -> Table:
    """The means so far of the first metric on the test rows, and of how many seeds."""
    metric = study.recipe.metrics[0]
    shown = Table(title=f"test {metric} (seeds)", title_justify="left")
    names = list(dict.fromkeys(p.name for rival in study.recipe.rivals for p in study.recipe.points(rival)))
    shown.add_column("rival")
    for name in names:
        shown.add_column(name, justify="right")
    for rival in study.recipe.rivals:
        shown.add_row(rival, *(_mean(study.at(rival, name), metric) for name in names))
    return shown


def _mean(rows: Sequence[RunRow], metric: str) -> str:
    values = [row.test[metric] for row in rows if row.test is not None and metric in row.test]
    return f"{number(statistics.fmean(values))} ({len(values)})" if values else "–"


def outcome(study: Study, row: RunRow) -> str:
    """A line on what a run came to."""
    what = f"trial {row.trial}" if row.stage == "tune" else f"seed {row.seed}"
    best = row.best(higher=study.facts.higher_is_better)
    how = f"validation {study.facts.monitor} {number(best, 5)}"
    if row.diverged:
        how = "broke down"
    elif row.pruned:
        how += ", stopped early"
    return f"{row.rival} at {row.point}, {what}: {how}, {row.seconds:.0f} s"


def _left(standing: Standing) -> str:
    if not standing.left:
        return f"{standing.finished} runs, all finished"
    return f"{standing.finished} runs finished, {standing.left} left, about {duration(standing.seconds)}"


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
