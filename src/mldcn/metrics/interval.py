"""The interval of one model's AUC from rows that need not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mldcn.metrics.external_sort import ExternalSort
from mldcn.metrics.rows import Array, check_rows
from mldcn.metrics.significance import normal_interval
from mldcn.metrics.ties import SortedBlock, Ties, descending_keys, tie_groups

Chunk = tuple[Array, Array, Array]


def auc_intervals(
    chunks: Iterable[Chunk], tasks: Sequence[str], folder: Path, *, memory_rows: int = 4_000_000
) -> dict[str, tuple[float, float]]:
    """Each task's 95 % interval of the AUC by DeLong's variance, rows taken as independent.

    It is that of :func:`mldcn.metrics.delong` against a model that knows nothing, but sorts on the disk.

    Args:
        chunks: labels ``(n, T)`` (NaN where unknown), probabilities ``(n, T)`` and weights ``(n,)``.
        tasks: their names, in the order of the columns.
        folder: an empty folder for sorted rows: 17 bytes a row and task.
        memory_rows: rows sorted at a time.
    """
    sorts = [ExternalSort(folder / str(t)) for t in range(len(tasks))]
    held: list[Chunk] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(weights) for _, _, weights in held) >= memory_rows:
            _add(held, sorts)
            held = []
    _add(held, sorts)
    return {task: _interval(sort, memory_rows // 2) for task, sort in zip(tasks, sorts, strict=True)}


def _add(held: list[Chunk], sorts: list[ExternalSort]) -> None:
    if not held:
        return
    labels, scores, weights = (np.concatenate(parts) for parts in zip(*held, strict=True))
    for t, sort in enumerate(sorts):
        rows = check_rows(labels[:, t], scores[:, t], weights)
        run = np.empty(len(rows), [("key", np.uint64), ("positive", np.bool_), ("weight", np.float64)])
        run["key"] = descending_keys(rows.scores.astype(np.float64))
        run["positive"] = rows.positive
        run["weight"] = rows.weights
        sort.add(run)


def _interval(sort: ExternalSort, rows: int) -> tuple[float, float]:
    def ties(weigh: Callable[[Array], Array]) -> Iterator[Ties]:
        return tie_groups(
            SortedBlock(block["key"].copy(), block["positive"], weigh(block["weight"]))
            for block in sort.blocks(rows)
        )

    sums = DeLongSums()
    for mass, squares in zip(ties(lambda weight: weight), ties(np.square), strict=True):
        sums.add(mass, squares)
    return sums.interval


class DeLongSums:
    """DeLong's variance of one AUC from ties in descending order of score.

    A positive's placement is the share of negatives above it, a negative's that of positives above it, ties
    counting half. Of each class are kept the sums of ``w x``, ``w ** 2``, ``w ** 2 x`` and ``w ** 2 x ** 2``,
    where x is the weight above, which is a placement once the whole weight is known.
    """

    def __init__(self) -> None:
        self._weight = np.zeros(2)  # of positives, of negatives
        self._sums = np.zeros((2, 4))

    def add(self, mass: Ties, squares: Ties) -> None:
        """Adds distinct scores below those already added.

        Args:
            mass: the weights of the rows at each score, summed.
            squares: their squares, summed.
        """
        own = (mass.positive, mass.negative)
        squared = (squares.positive, squares.negative)
        for of, (weight, square) in enumerate(zip(own, squared, strict=True)):
            other = own[1 - of]
            above = np.cumsum(other) - other / 2 + self._weight[1 - of]
            self._sums[of] += [
                float((weight * above).sum()),
                float(square.sum()),
                float((square * above).sum()),
                float((square * above * above).sum()),
            ]
        self._weight += [float(weight.sum()) for weight in own]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval; NaN with fewer than 2 rows of a class, or where the variance is 0."""
        if not (self._weight > 0).all():
            return math.nan, math.nan
        variance, auc = 0.0, math.nan
        for of in (0, 1):
            weight, other = self._weight[of], self._weight[1 - of]
            scale = np.array([weight * other, weight**2, weight**2 * other, (weight * other) ** 2])
            first, ones, once, twice = self._sums[of] / scale
            auc = 1.0 - first if of == 0 else first
            residual = twice - 2.0 * first * once + first * first * ones
            spread = 1.0 - ones
            variance += max(residual, 0.0) / spread if spread > 1e-12 else math.nan
        return normal_interval(float(auc), 0.5, math.sqrt(variance))
