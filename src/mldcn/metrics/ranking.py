"""Metrics of order: AUC, average precision, and their kin by group.

Higher scores rank first. Ties are exact: tied rows share what any of their orders would give on average. Rows
with a null (NaN) label are left out. What is undefined (one class only) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mldcn.errors import UserError
from mldcn.metrics.rows import Array, Rows, check_rows
from mldcn.metrics.ties import BLOCK, Ties, descending_blocks, descending_keys, tie_groups


def auc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The probability that a positive scores above a negative, a tie counting half.

    Weights are those of the rows: a pair weighs the product of its two rows' weights.
    """
    sums = RankSums()
    for ties in tie_groups(descending_blocks(check_rows(labels, scores, weights))):
        sums.add(ties)
    return sums.auc


def pr_auc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Average precision: the mean over positives of the precision at their score, tied rows all included.

    NaN without positives; 1 without negatives.
    """
    sums = RankSums(precision=True)
    for ties in tie_groups(descending_blocks(check_rows(labels, scores, weights))):
        sums.add(ties)
    return sums.pr_auc


class RankSums:
    """AUC, and on demand average precision, from ties in descending order of score."""

    def __init__(self, *, precision: bool = False) -> None:
        self._with_precision = precision
        self._positive = 0.0
        self._negative = 0.0
        # Twice the won pairs: whole numbers without weights, hence exact to 2**53.
        self._won = 0.0
        self._precision = 0.0

    def add(self, ties: Ties) -> None:
        """Adds distinct scores below those already added."""
        upto = np.cumsum(ties.positive)
        upto += self._positive
        # Sums of products rather than dot products here and below: on short blocks the linear algebra's threads
        # cost more than they bring, and the sum would depend on their number.
        self._won += float((ties.negative * (2.0 * upto - ties.positive)).sum())
        if self._with_precision:
            hits = np.flatnonzero(ties.positive)
            ranked = upto + np.cumsum(ties.negative) + self._negative
            self._precision += float((ties.positive[hits] * upto[hits] / ranked[hits]).sum())
        self._positive = float(upto[-1])
        self._negative += float(ties.negative.sum())

    @property
    def auc(self) -> float:
        """The area under the ROC curve."""
        pairs = self._positive * self._negative
        return self._won / 2.0 / pairs if pairs else math.nan

    @property
    def pr_auc(self) -> float:
        """Average precision."""
        return self._precision / self._positive if self._positive else math.nan


def gauc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of the AUC within each group, weighted by the group's impressions (its rows' total weight).

    Groups without both classes have no AUC and are left out, as in Zhu et al. 2017 (Optimized cost per
    click), eq. 1.

    Args:
        labels: ``(n,)``: 0, 1 or NaN.
        scores: ``(n,)``.
        groups: ``(n,)`` integers or strings, such as user ids.
        weights: ``(n,)``, 1 by default.
    """
    sums = GroupSums()
    for block in grouped_blocks(check_rows(labels, scores, weights), groups):
        sums.add(block)
    return sums.gauc


def hit_at_k(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    k: int,
    weights: ArrayLike | None = None,
    *,
    share: bool = False,
) -> float:
    """HIT@k: the number of positives among a session's ``k`` highest scores, averaged over sessions.

    With saves as labels and ``k`` 3 it is HIT@3/save of the Homefeed paper (section 5.1): each session's
    logged items, ranked by the scores. Sessions without a positive, or with fewer than ``k`` items, count as
    they are. Of rows tied across place ``k`` the expectation over their orders is taken. A session weighs the
    mean weight of its rows.

    Args:
        labels: ``(n,)``: 0, 1 or NaN.
        scores: ``(n,)``.
        groups: ``(n,)`` the session (or request, user) of each row.
        k: places that count.
        weights: ``(n,)``, 1 by default.
        share: instead the share of sessions with at least one positive in the top ``k``.

    Raises:
        UserError: ``k`` is below 1, or as :func:`mldcn.metrics.rows.check_rows`.
    """
    sums = GroupSums(hit_at=(k,))
    for block in grouped_blocks(check_rows(labels, scores, weights), groups):
        sums.add(block)
    return sums.hit_rate(k) if share else sums.hits(k)


class GroupBlock(NamedTuple):
    """Rows of whole groups, sorted by group: ``(n,)`` integer groups and score keys, bool labels, weights."""

    groups: Array
    keys: Array
    positive: Array
    weights: Array | None


def grouped_blocks(rows: Rows, groups: ArrayLike) -> Iterator[GroupBlock]:
    """Sorts rows by group in memory and cuts them between groups."""
    column = rows.select(groups, "groups")
    if column.dtype.kind not in "iu":
        column = np.unique(column, return_inverse=True)[1]
    order = np.argsort(column)
    column = column[order]
    keys = descending_keys(rows.scores)
    start = 0
    while start < len(column):
        stop = len(column)
        if start + BLOCK < stop:
            stop = int(np.searchsorted(column, column[start + BLOCK - 1], side="right"))
        part = order[start:stop]
        weights = None if rows.weights is None else rows.weights[part]
        yield GroupBlock(column[start:stop], keys[part], rows.positive[part], weights)
        start = stop


class _Cut(NamedTuple):
    """A block cut into groups, and these into ties: where a row scores as the one before it.

    names, weight, rows: ``(groups,)``. first: each group's first tie. The others are ``(ties,)``: the group's
    number, rows, positive rows, mass of positives and of negatives, all in descending order within a group.
    """

    names: Array
    weight: Array
    rows: Array
    first: Array
    group: Array
    size: Array
    hits: Array
    positive: Array
    negative: Array


def _cut(block: GroupBlock) -> _Cut:
    order = np.lexsort((block.keys, block.groups))
    groups, keys, positive = (column[order] for column in block[:3])
    new_group = _changes(groups)
    starts = np.flatnonzero(new_group | _changes(keys))
    new_group = new_group[starts]
    first = np.flatnonzero(new_group)
    size = np.diff(starts, append=len(groups)).astype(np.float64)
    hits = np.add.reduceat(positive.astype(np.float64), starts)
    rows = np.add.reduceat(size, first)
    weight, mass, rest = rows, hits, size - hits
    if block.weights is not None:
        weights = block.weights[order].astype(np.float64)
        weight = np.add.reduceat(weights, starts[first])
        mass = np.add.reduceat(np.where(positive, weights, 0.0), starts)
        rest = np.add.reduceat(np.where(positive, 0.0, weights), starts)
    return _Cut(groups[starts[first]], weight, rows, first, np.cumsum(new_group) - 1, size, hits, mass, rest)


def _aucs(cut: _Cut) -> tuple[Array, Array]:
    """AUC within each group, and which groups have both classes; elsewhere it is 0."""
    won = cut.negative * (_above(cut.positive, cut) + cut.positive / 2)
    pairs = np.add.reduceat(cut.positive, cut.first) * np.add.reduceat(cut.negative, cut.first)
    both = pairs > 0
    aucs = np.zeros(len(pairs))
    np.divide(np.add.reduceat(won, cut.first), pairs, out=aucs, where=both)
    return aucs, both


def group_aucs(block: GroupBlock) -> tuple[Array, Array, Array]:
    """Group, AUC and weight of each group of a block that has both classes."""
    if not len(block.groups):
        return block.groups, np.empty(0), np.empty(0)
    cut = _cut(block)
    aucs, both = _aucs(cut)
    return cut.names[both], aucs[both], cut.weight[both]


def group_hits(block: GroupBlock, k: int) -> tuple[Array, Array, Array]:
    """Group, positives among its ``k`` highest scores, and weight of each group of a block."""
    if not len(block.groups):
        return block.groups, np.empty(0), np.empty(0)
    cut = _cut(block)
    return cut.names, _top(cut, _above(cut.size, cut), k)[1], cut.weight / cut.rows


def _top(cut: _Cut, above: Array, k: int) -> tuple[Array, Array]:
    """How many of each tie's rows are in the top ``k``, and how many positives of each group, on average."""
    slots = np.clip(k - above, 0, cut.size)
    return slots, np.add.reduceat(cut.hits * slots / cut.size, cut.first)


class GroupSums:
    """GAUC and HIT@k from blocks of whole groups, without a loop over groups."""

    def __init__(self, *, hit_at: Sequence[int] = ()) -> None:
        for k in hit_at:
            if k < 1:
                raise UserError(f"k: expected at least 1, found {k}")
        self._auc = 0.0
        self._auc_weight = 0.0
        self._sessions = 0.0
        self._hits = dict.fromkeys(hit_at, 0.0)
        self._hit_sessions = dict.fromkeys(hit_at, 0.0)

    def add(self, block: GroupBlock) -> None:
        """Adds whole groups that were in no block before."""
        if not len(block.groups):
            return
        cut = _cut(block)
        aucs, both = _aucs(cut)
        self._auc += float((aucs * cut.weight)[both].sum())
        self._auc_weight += float(cut.weight[both].sum())
        if not self._hits:
            return
        session_weight = cut.weight / cut.rows
        self._sessions += float(session_weight.sum())
        above = _above(cut.size, cut)
        for k in self._hits:
            slots, found = _top(cut, above, k)
            missed = np.multiply.reduceat(_chance_of_no_hit(cut.hits, cut.size, slots), cut.first)
            self._hits[k] += float((found * session_weight).sum())
            self._hit_sessions[k] += float(((1.0 - missed) * session_weight).sum())

    @property
    def gauc(self) -> float:
        """Mean AUC of the groups with both classes, weighted by impressions."""
        return self._auc / self._auc_weight if self._auc_weight else math.nan

    def hits(self, k: int) -> float:
        """Positives in the top ``k``, averaged over groups."""
        return self._hits[k] / self._sessions if self._sessions else math.nan

    def hit_rate(self, k: int) -> float:
        """Share of groups with a positive in the top ``k``."""
        return self._hit_sessions[k] / self._sessions if self._sessions else math.nan


def _changes(column: Array) -> Array:
    changes = np.empty(len(column), np.bool_)
    changes[0] = True
    np.not_equal(column[1:], column[:-1], out=changes[1:])
    return changes


def _above(mass: Array, cut: _Cut) -> Array:
    """The mass ranked above each tie within its group."""
    before = np.cumsum(mass) - mass
    return np.asarray(before - before[cut.first][cut.group])


def _chance_of_no_hit(hits: Array, size: Array, slots: Array) -> Array:
    """The chance that ``slots`` of ``size`` tied rows, drawn without replacement, hold none of ``hits``."""
    chance = np.ones(len(hits))
    misses = size - hits
    open_ = np.flatnonzero((slots > 0) & (hits > 0))
    draw = 0
    while len(open_):
        chance[open_] *= np.maximum(misses[open_] - draw, 0) / (size[open_] - draw)
        draw += 1
        open_ = open_[(slots[open_] > draw) & (chance[open_] > 0)]
    return chance
