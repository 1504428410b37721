"""Permutation importance: what a model loses when it can no longer tell whose value a feature's is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mldcn.data.batch import EncodedLayout
from mldcn.explain.sample import Sample
from mldcn.metrics.significance import normal_interval

Array = NDArray[Any]
Floats = NDArray[np.float64]
Scorer = Callable[[Array, Array], Array]
Progress = Callable[[str, int, int, int], None]


@dataclass(frozen=True)
class Columns:
    """What a feature, or a group of them, is in encoded rows: columns of ids and of numbers."""

    ids: NDArray[np.intp]
    dense: NDArray[np.intp]

    def joined(self, other: Columns) -> Columns:
        """Both features' columns."""
        return Columns(np.concatenate([self.ids, other.ids]), np.concatenate([self.dense, other.dense]))


@dataclass(frozen=True)
class Importance:
    """A feature's importance for a task.

    drop: by how much a metric gets worse when the feature is permuted, the mean of the repeats: of AUC what
    it loses, of log loss what it gains. low, high: the 95 % interval. repeats: each one's drop.
    """

    feature: str
    task: str
    metric: str
    drop: float
    low: float
    high: float
    repeats: tuple[float, ...]


def feature_columns(layout: EncodedLayout) -> dict[str, Columns]:
    """Each feature's columns, those of a sequence's actions and times too; in the layout's order."""
    found: dict[str, Columns] = {}
    none = np.zeros(0, np.intp)
    for slot in layout.ids:
        own = Columns(np.arange(slot.columns.start, slot.columns.stop), none)
        found[slot.feature] = found[slot.feature].joined(own) if slot.feature in found else own
    for given in layout.dense:
        own = Columns(none, np.arange(given.columns.start, given.columns.stop))
        found[given.feature] = found[given.feature].joined(own) if given.feature in found else own
    return found


def permutation_importance(
    score: Scorer,
    sample: Sample,
    groups: Mapping[str, Columns],
    tasks: Sequence[str],
    *,
    repeats: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, float]], list[Importance]]:
    """What AUC and log loss lose when the columns of a group are permuted among the sample's rows.

    A repeat draws one permutation a group; all columns of the group move together. The interval is of the
    mean drop over the repeats: it holds for other rows of the same kind (cluster-robust, by the users or
    requests that the rows belong to) and for other permutations.

    Args:
        score: ids ``(n, C)`` and numbers ``(n, D)`` to probabilities ``(n, T)``.
        sample: the rows.
        groups: columns by name.
        tasks: names of the T tasks.
        repeats: permutations of each group, at least 2.
        seed: of the permutations.
        progress: told ``permute``, the rows scored, and how many groups of how many are done.

    Returns:
        Task -> metric -> value as the rows are, and the importances; tasks with one class only are left out.
    """
    base = _measures(sample, score(sample.ids, sample.dense), tasks)
    found: list[Importance] = []
    for done, (name, columns) in enumerate(groups.items()):
        if progress is not None:
            progress("permute", done * repeats * len(sample), done, len(groups))
        drops = {key: _Drops(len(sample)) for key in base}
        for repeat in range(repeats):
            donors = np.random.default_rng([seed, done, repeat]).permutation(len(sample))
            scores = score(*_permuted(sample, columns, donors))
            for key, measure in _measures(sample, scores, tasks).items():
                sign = 1.0 if key[1] == "auc" else -1.0
                value = sign * (base[key].value - measure.value)
                drops[key].add(value, sign * (base[key].influence - measure.influence), donors)
        for (task, metric), of in drops.items():
            drop = float(np.mean(of.values))
            low, high = normal_interval(drop, 0.0, of.error(sample.clusters))
            found.append(Importance(name, task, metric, drop, low, high, tuple(of.values)))
    values_now: dict[str, dict[str, float]] = {}
    for (task, metric), measure in base.items():
        values_now.setdefault(task, {})[metric] = measure.value
    return values_now, found


def _permuted(sample: Sample, columns: Columns, rows: NDArray[np.intp]) -> tuple[Array, Array]:
    """The sample's ids and numbers, a group's columns permuted."""
    ids, dense = sample.ids, sample.dense
    if len(columns.ids):
        ids = ids.copy()
        ids[:, columns.ids] = sample.ids[rows][:, columns.ids]
    if len(columns.dense):
        dense = dense.copy()
        dense[:, columns.dense] = sample.dense[rows][:, columns.dense]
    return ids, dense


@dataclass(frozen=True)
class _Measure:
    """A metric's value, and what each row of the sample adds to its error: sums to 0, and is 0 without a label."""

    value: float
    influence: Floats

    @classmethod
    def of(cls, value: float, parts: Floats, rows: NDArray[np.intp], sample: Sample) -> _Measure:
        """From what the rows with a label add."""
        influence = np.zeros(len(sample))
        influence[rows] = parts
        return cls(value, influence)


def _measures(sample: Sample, scores: Array, tasks: Sequence[str]) -> dict[tuple[str, str], _Measure]:
    return {
        (task, metric): measure
        for t, task in enumerate(tasks)
        for metric, measure in _of_task(sample, scores[:, t], t)
    }


def _of_task(sample: Sample, scores: Array, task: int) -> Iterator[tuple[str, _Measure]]:
    labels = sample.labels[:, task]
    rows = np.flatnonzero(~np.isnan(labels) & (sample.weight > 0))
    positive, weight = labels[rows] == 1, sample.weight[rows].astype(np.float64)
    if not 0 < np.count_nonzero(positive) < len(rows):
        return
    p = scores[rows].astype(np.float64)
    yield "auc", _Measure.of(*_auc(positive, p, weight), rows, sample)
    losses = -np.log(np.maximum(np.where(positive, p, 1.0 - p), np.finfo(np.float32).eps))
    mean = float(weight @ losses / weight.sum())
    yield "logloss", _Measure.of(mean, weight * (losses - mean) / weight.sum(), rows, sample)


def _auc(positive: NDArray[np.bool_], scores: Floats, weight: Floats) -> tuple[float, Floats]:
    """AUC is the mean of each positive's share of negatives below it, and of each negative's of positives
    above.

    What a row adds to its error is its share's distance from that mean (DeLong et al. 1988), which can be
    summed over the rows of a cluster (Obuchowski 1997).
    """
    share = weight / np.where(positive, weight[positive].sum(), weight[~positive].sum())
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) > 0))
    sizes = np.diff(starts, append=len(order))

    def below(own: NDArray[np.bool_]) -> Floats:
        """By row, the share of the others below it, ties counting half."""
        tied = np.add.reduceat(np.where(own[order], 0.0, share[order]), starts)
        found = np.empty(len(order))
        found[order] = np.repeat(np.cumsum(tied) - tied / 2, sizes)
        return found

    placement = np.where(positive, below(positive), 1.0 - below(~positive))
    value = float(share[positive] @ placement[positive])
    return value, share * (placement - value)


class _Drops:
    """The repeats' drops of one metric, and the variance of their mean.

    What row i adds to the drop depends on its own features and label, and on the value that it gets from row j,
    its donor: ``h(i, j)``. Other rows of the same kind would be other rows i with other values j to give. So a
    cluster counts by what its rows add, and by what its values add to the rows that they are given to: the
    first-order terms of Hoeffding's decomposition. Each is a mean over the few partners that the repeats drew;
    what these make it vary is estimated from the repeats, and taken off.
    """

    def __init__(self, rows: int) -> None:
        self.values: list[float] = []
        self._own, self._given = np.zeros(rows), np.zeros(rows)
        self._squares = 0.0

    def add(self, value: float, parts: Floats, donors: NDArray[np.intp]) -> None:
        """Adds a repeat: its drop, what each row adds to it, and the rows whose values they got."""
        self.values.append(value)
        self._own += parts
        self._given[donors] += parts
        self._squares += float(parts @ parts)

    def error(self, clusters: NDArray[np.int64]) -> float:
        """The standard error of the mean drop, for other rows and other permutations; NaN with one cluster."""
        repeats = len(self.values)
        own, given = self._own / repeats, self._given / repeats
        partners = 2 * self._squares - repeats * float(own @ own + given @ given)
        _, codes = np.unique(clusters, return_inverse=True)
        sums = np.bincount(codes, own + given)
        if len(sums) < 2:
            return math.nan
        of_rows = float(sums @ sums) * len(sums) / (len(sums) - 1) - partners / (repeats * (repeats - 1))
        return math.sqrt(max(of_rows, 0.0) + float(np.var(self.values, ddof=1)) / repeats)
