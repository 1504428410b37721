"""What a report needs to know of a run: plain numbers and texts, whatever made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mldcn.report.plots import Reliability
from mldcn.report.table import Best, Column

Metrics = Mapping[str, Mapping[str, float]]  # task -> metric -> value


@dataclass(frozen=True)
class Difference:
    """A run's AUC minus the reference's on the same rows, with its interval and p-value."""

    delta: float
    low: float
    high: float
    p: float | None = None

    @property
    def verdict(self) -> Literal["higher", "lower", "no difference shown", "not known"]:
        """What the interval says: no difference is shown where it contains zero."""
        if self.low > 0:
            return "higher"
        if self.high < 0:
            return "lower"
        return "no difference shown" if self.low <= 0 <= self.high else "not known"


@dataclass(frozen=True)
class Bins:
    """Mean prediction, observed rate and weight of bins of rows, for a reliability plot."""

    predicted: Sequence[float]
    observed: Sequence[float]
    weight: Sequence[float]

    def series(self, label: str, style: int) -> Reliability:
        """The bins under a name."""
        return Reliability(label, self.predicted, self.observed, self.weight, style)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One model's run.

    Args:
        name: of the model, as the reader knows it.
        metrics: on the test rows; task -> metric -> value.
        valid_metrics: the same on the validation rows.
        options: what was set, in a few words.
        flops: of one example through the model.
        dense_params: parameters outside the embedding tables.
        embedding_params: parameters of the tables.
        seconds: of training.
        rows_per_second: of training.
        intervals: task -> interval of the test AUC.
        history: (step, validation metrics by task) of each evaluation.
        reliability: task -> bins of the test rows.
        differences: task -> difference to the reference; empty for the reference itself.
        config: the resolved config as YAML.
    """

    name: str
    metrics: Metrics
    valid_metrics: Metrics = field(default_factory=dict)
    options: str = ""
    flops: float | None = None
    dense_params: int | None = None
    embedding_params: int | None = None
    seconds: float | None = None
    rows_per_second: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    history: Sequence[tuple[int, Metrics]] = ()
    reliability: Mapping[str, Bins] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)
    config: str = ""

    def metric(self, task: str, name: str) -> float | None:
        """A test metric, if it was measured."""
        return self.metrics.get(task, {}).get(name)

    @property
    def params(self) -> int | None:
        """All parameters, if they are known."""
        if self.dense_params is None:
            return self.embedding_params
        return self.dense_params + (self.embedding_params or 0)


@dataclass(frozen=True, kw_only=True)
class FeatureSummary:
    """One feature of the log. Unknown numbers are None.

    Args:
        name: as in the schema.
        kind: numeric, categorical, …
        source: user, item, …
        rows: of its embedding table.
        width: its columns of x0.
        missing: share of rows without it.
    """

    name: str
    kind: str
    source: str = ""
    rows: int | None = None
    width: int | None = None
    missing: float | None = None


# Metric -> heading, which is best, what it means. Others are shown under their own names.
_KNOWN: dict[str, tuple[str, Best | None, str]] = {
    "auc": ("AUC", "max", ""),
    "logloss": ("Log loss", "min", ""),
    "ne": (
        "NE",
        "min",
        "normalised entropy, log loss over that of always predicting the mean rate; below 1 is of use.",
    ),
    "rig": ("RIG", "max", "relative information gain, 1 − NE."),
    "calibration": ("Calibration", "one", "predicted over observed positives; 1 is right."),
    "ece": ("ECE", "min", "expected calibration error, the mean gap between prediction and rate over bins."),
    "pr_auc": ("PR-AUC", "max", "average precision."),
    "gauc": ("GAUC", "max", "AUC within a group, averaged over groups."),
    "hit@": ("Hit@", "max", "positives among a session's highest scores, averaged over sessions."),
    "hit_rate@": ("Hit rate@", "max", "share of sessions with a positive among their highest scores."),
}


def metric_column(name: str) -> Column:
    """The column of a metric; ``hit@3`` and its like are known by what is before their number."""
    stem, at, k = name.partition("@")
    heading, best, note = _KNOWN.get(stem + at, (stem + at, None, ""))
    return Column(name=heading + k, format=".3f" if best == "one" else ".4f", best=best, note=note)


def metric_names(measured: Iterable[Mapping[str, float]]) -> list[str]:
    """The metrics that any of some runs has: known ones in the report's order, then the others as they come."""
    names = list(dict.fromkeys(name for metrics in measured for name in metrics))
    order = {name: i for i, name in enumerate(_KNOWN)}
    return sorted(names, key=lambda name: order.get("".join(name.partition("@")[:2]), len(order)))


def task_names(runs: Iterable[RunSummary]) -> list[str]:
    """The tasks that any of some runs was measured on, in the order they come.

    Raises:
        ValueError: there is none.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in (*run.metrics, *run.valid_metrics)))
    if not tasks:
        raise ValueError("no run has a metric of any task")
    return tasks
