"""The tables of a study's report on what its models and runs took: cost, calibration, effort, the runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mldcn.report.summary import metric_column
from mldcn.report.table import Cell, Column, Label, Table, table_of
from mldcn.study.constraints import Verdicts
from mldcn.study.findings import Standing
from mldcn.study.outline import Outline, key_title, metric_title
from mldcn.study.rows import RunRow

_SIGNS = {True: "✓", False: "✗", None: ""}


def cost_table(outline: Outline) -> Table:
    """What each model costs."""

    def seconds(standing: Standing) -> float | None:
        runs = outline.runs(standing)
        return sum(row.seconds for row in runs) / len(runs) if runs else None

    def tables(standing: Standing) -> int | None:
        runs = outline.runs(standing)
        return runs[0].parameters.get("embedding") if runs else None

    def of(cost: str) -> Callable[[Standing], Cell]:
        return lambda standing: standing.costs.get(cost)

    columns: list[tuple[Column, Callable[[Standing], Cell]]] = [
        (Column(name="Model"), lambda s: Label(s.rival, s.point)),
        (Column(name="FLOPs", unit="behind the embeddings", format="si"), of("flops")),
        (Column(name="Parameters", unit="behind the embeddings", format="si"), of("parameters")),
        (Column(name="Parameters", unit="of the tables", format="si"), tables),
        (Column(name="Training memory", unit="bytes", format="si"), of("memory")),
    ]
    for cost in outline.costs():
        if cost.startswith("latency@"):
            batch = int(cost.removeprefix("latency@"))
            unit = f"ms, {batch:,} row" + "s" * (batch > 1)
            columns.append((Column(name="Latency", unit=unit, format=".3g"), of(cost)))
    columns.append((Column(name="Training time", unit="a run", format="duration"), seconds))
    how = dict.fromkeys(row.memory_how for row in outline.study.final if row.memory_how)
    notes = [f"Training memory: {text}." for text in how]
    return table_of("What each model costs", outline.there, columns, name="cost", notes=notes)


def calibration_table(outline: Outline) -> Table | None:
    """Calibration metrics of the test rows, where the runs have them."""
    metrics = [
        name for name in ("calibration", "ece") if any(name in standing.test for standing in outline.there)
    ]
    if not metrics:
        return None

    def of(metric: str) -> Callable[[Standing], Cell]:
        return lambda standing: standing.test[metric].mean if metric in standing.test else None

    columns: list[tuple[Column, Callable[[Standing], Cell]]] = [
        (Column(name="Model"), lambda s: Label(s.rival, s.point))
    ]
    for metric in metrics:
        column = metric_column(metric)
        columns.append((Column(name=column.name, format=column.format, note=column.note), of(metric)))
    return table_of(
        "Calibration on the test rows, means over seeds", outline.there, columns, name="calibration"
    )


def effort_table(outline: Outline) -> Table:
    """What was spent on each rival."""
    columns = [
        Column(name="Model"),
        Column(name="Trials"),
        Column(name="stopped early"),
        Column(name="Tuning time", format="duration"),
        Column(name="Final runs"),
        Column(name="Time of final runs", format="duration"),
        Column(name="Broke down", unit="runs"),
    ]
    rows: list[list[Cell]] = [
        [
            rival,
            effort.trials,
            effort.pruned,
            effort.tuning_seconds,
            effort.final_runs,
            effort.final_seconds,
            effort.diverged,
        ]
        for rival, effort in outline.study.effort().items()
    ]
    notes = ["Every rival has the same number of trials; one stopped early counts as one."]
    return Table("Effort spent by rival", columns, rows, "effort", notes if outline.recipe.tuning else ())


def runs_table(outline: Outline, rows: Sequence[RunRow]) -> Table:
    """Some runs of one stage, a row each."""
    trials = rows[0].stage == "tune"
    higher = outline.study.facts.higher_is_better

    def metric_of(metric: str) -> Callable[[RunRow], Cell]:
        return lambda row: (row.valid if trials else row.test or {}).get(metric)

    columns: list[tuple[Column, Callable[[RunRow], Cell]]] = [
        (Column(name="Model"), lambda row: Label(row.rival, row.point)),
        (Column(name="Trial"), lambda row: row.trial if row.trial >= 0 else None),
        (Column(name="Seed"), lambda row: row.seed),
    ]
    for metric in outline.recipe.metrics:
        title = f"{'Validation' if trials else 'Test'} {metric_title(metric)}"
        columns.append((Column(name=title, format=".5f"), metric_of(metric)))
    columns += [
        (
            Column(name="Best validation", unit=outline.study.facts.monitor, format=".5f"),
            lambda row: None if math.isnan(best := row.best(higher=higher)) else best,
        ),
        (Column(name="Settings"), lambda row: settings_text(row) if trials else None),
        (Column(name="Turned"), lambda row: row.knob),
        (Column(name="FLOPs", format="si"), lambda row: row.model_flops),
        (Column(name="Epochs"), lambda row: row.epochs),
        (Column(name="Steps"), lambda row: row.steps),
        (Column(name="Time", format="duration"), lambda row: row.seconds),
        (
            Column(name="End"),
            lambda row: "broke down" if row.diverged else "stopped early" if row.pruned else "finished",
        ),
        (Column(name="Roll-backs"), lambda row: row.troubles or None),
        (Column(name="Folder"), lambda row: row.run),
        (Column(name="Config hash"), lambda row: row.config_hash),
    ]
    caption = "Trials of the tuning, by validation rows" if trials else "Final runs"
    return table_of(caption, rows, columns, name="trials" if trials else "runs")


def settings_text(row: RunRow) -> str:
    """Tuned values in a few words."""
    return ", ".join(
        f"{key_title(key)} {value:.3g}" if isinstance(value, float) else f"{key_title(key)} {value}"
        for key, value in row.settings.items()
    )


def constraints_table(verdicts: Verdicts) -> Table:
    """Every model against every constraint."""
    columns = [Column(name="Model")]
    columns += [Column(name=cell.constraint, unit=cell.limit) for cell in verdicts.rows[0].cells]
    rows: list[list[Cell]] = []
    for row in verdicts.rows:
        cells = [f"{_SIGNS[cell.ok]}{'?' if cell.unsure else ''} {cell.text}".strip() for cell in row.cells]
        rows.append([Label(row.rival, row.point), *cells])
    notes = [
        "✓ within the limit, ✗ beyond it; with ? where the interval reaches across the limit. What has no mark "
        "has no limit, or is not known.",
        *verdicts.notes,
    ]
    return Table("Constraints", columns, rows, "constraints", notes)
