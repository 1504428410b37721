"""The constraints table as plain data, and the model that it recommends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mldcn.metrics import metric_info
from mldcn.report.summary import metric_column
from mldcn.study.findings import Gain, Standing, Summary
from mldcn.study.recipe import AS_IS


@dataclass(frozen=True)
class Cell:
    """One constraint of one model.

    text: what was measured, with its unit. ok: whether it is within the limit; None without a limit, or where
    nothing was measured. limit: in words, empty without one. unsure: the interval of what was measured reaches
    across the limit.
    """

    constraint: str
    text: str
    ok: bool | None = None
    limit: str = ""
    unsure: bool = False


@dataclass(frozen=True)
class VerdictRow:
    """A model's cells; all rows have the same constraints in the same order."""

    rival: str
    point: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """The model for readers."""
        return self.rival if self.point == AS_IS else f"{self.rival} at {self.point}"

    @property
    def broken(self) -> list[Cell]:
        """What is beyond its limit."""
        return [cell for cell in self.cells if cell.ok is False]

    @property
    def unknown(self) -> list[Cell]:
        """What has a limit and was not measured."""
        return [cell for cell in self.cells if cell.ok is None and cell.limit]


@dataclass(frozen=True)
class Verdicts:
    """The constraints table. recommendation: the model to take, or that there is none; reason: why."""

    rows: tuple[VerdictRow, ...]
    recommendation: str
    reason: str
    notes: tuple[str, ...]


def interval(low: float | None, high: float | None, form: str) -> str:
    """An interval behind its estimate; nothing where there is none."""
    return "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"


def recommend(summary: Summary, rows: Sequence[VerdictRow]) -> tuple[str, str]:
    """The model with the best quality among those within all limits."""
    name = metric_column(summary.metric).name
    sign = -1.0 if metric_info(summary.metric).higher_is_better is False else 1.0
    scored = []
    for row in rows:
        standing = summary.standing(row.rival, row.point)
        if standing is not None and summary.metric in standing.test:
            scored.append((standing.test[summary.metric].mean, row, standing))
    scored.sort(key=lambda each: -sign * each[0])
    if not scored:
        return "none yet", "No model has a finished run."
    within = [each for each in scored if not (each[1].broken or each[1].unknown)]
    if not within:
        _, row, _ = min(scored, key=lambda each: len(each[1].broken) + len(each[1].unknown))
        return "none", (
            f"No model is known to be within all limits. Nearest is {row.name}, but for {_listed(row)}."
        )
    value, row, standing = within[0]
    reason = f"{row.name} has the best {name} ({value:.5f}) of {_models(len(within))} within all limits"
    gain = summary.gain(row.rival, row.point)
    if (row.rival, row.point) == summary.baseline:
        reason += "; it is the baseline"
    elif gain is not None:
        estimate = gain.estimate
        reason += f": {estimate.value:+.5f}{interval(estimate.low, estimate.high, '+.5f')} on the baseline"
        if gain.verdict not in ("better", "worse"):
            reason += ", which is not shown to be a difference"
    reason += "."
    for other, lost, _ in scored[: scored.index(within[0])]:
        reason += f" {lost.name} scores better ({other:.5f}), but for {_listed(lost)}."
    return row.name, reason + _cheaper(summary, standing, [each[2] for each in within[1:]])


def _models(count: int) -> str:
    return "the one model" if count == 1 else f"the {count} models"


def _listed(row: VerdictRow) -> str:
    found = [f"{cell.constraint} ({cell.text}; limit {cell.limit})" for cell in row.broken]
    found += [f"{cell.constraint}, which is not known" for cell in row.unknown]
    return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))


def _cheaper(summary: Summary, best: Standing, others: Sequence[Standing]) -> str:
    """A cheaper model within the limits that is not shown to be worse, if there is one."""
    found = []
    for other in others:
        gain = _pair(summary, best, other)
        cheaper = other.costs.get("flops", math.inf) < best.costs.get("flops", 0.0)
        if gain is not None and cheaper and gain.verdict in ("no worse", "no difference shown"):
            found.append(other)
    if not found:
        return ""
    cheapest = min(found, key=lambda other: other.costs["flops"])
    less = 1 - cheapest.costs["flops"] / best.costs["flops"]
    return f" {cheapest.rival} costs {less:.0%} fewer FLOPs and is not shown to be different in quality."


def _pair(summary: Summary, a: Standing, b: Standing) -> Gain | None:
    """The comparison of two models, where the study made it; one with the baseline is among its gains too."""
    cells = {(a.rival, a.point), (b.rival, b.point)}
    known = (gain for gain in (*summary.gains, *summary.pairs) if gain.metric == summary.metric)
    return next((gain for gain in known if {gain.a, gain.b} == cells), None)
