"""Is B better than A? Paired tests on one set of rows, or on one set of seeds.

Every test gives ``delta = b - a``, so that for AUC a positive delta, and for log loss a negative one, says
that B is better. Intervals are 95 %, p-values two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from mldcn.errors import UserError
from mldcn.metrics.ranking import group_aucs, grouped_blocks
from mldcn.metrics.rows import Array, Rows, check_rows

_CONFIDENCE = 0.95
# A standard error below this is the rounding of one that is 0.
_ROUNDING = 1e-14
_Z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)


@dataclass(frozen=True)
class Difference:
    """Two values ``a`` and ``b`` of a metric, ``delta = b - a``, its 95 % interval and two-sided p-value."""

    a: float
    b: float
    delta: float
    low: float
    high: float
    p_value: float
    method: str
    higher_is_better: bool = True

    @property
    def better(self) -> Literal["a", "b"] | None:
        """Which one is better at the 5 % level; None where the rows cannot tell."""
        if not self.p_value < 1 - _CONFIDENCE or self.delta == 0:
            return None
        return "b" if (self.delta > 0) == self.higher_is_better else "a"


def non_inferior(difference: Difference, margin: float) -> bool:
    """Whether B is worse than A by less than ``margin``, one-sided at the 2.5 % level.

    That is: the end of the 95 % interval on the worse side lies within the margin, which has to be chosen
    before looking. False where the interval is undefined.

    Raises:
        UserError: ``margin`` is not positive.
    """
    if not margin > 0:
        raise UserError(f"margin: expected a positive number, found {margin}")
    return difference.low > -margin if difference.higher_is_better else difference.high < margin


def delong(
    labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike, weights: ArrayLike | None = None
) -> Difference:
    """Difference of two AUCs on the same rows (DeLong et al. 1988), in O(n log n) (Sun and Xu 2014).

    For each positive, V is the (weighted) share of negatives below it, ties counting half, and likewise for
    each negative the share of positives above it. AUC is the mean of either V; the variance of the difference
    is that of the mean of V_b - V_a over positives plus that over negatives. Rows are taken as independent:
    use :func:`cluster_bootstrap` where users or requests have many. With weights the variances are those of
    weighted means (weights of importance; a weight of 2 is not two rows).

    The interval and the p-value are NaN with fewer than 2 rows of a class, or where the variance is 0 though
    the AUCs differ (perfect separation).
    """
    a, b = _pair(labels, scores_a, scores_b, weights)
    parts_a, parts_b = _placements(a), _placements(b)
    if parts_a is None or parts_b is None:
        return _undefined("DeLong", higher_is_better=True)
    shares = _class_shares(a)
    auc_a, auc_b = (float(shares[0] @ parts[0]) for parts in (parts_a, parts_b))
    variance = 0.0
    for share, of_a, of_b in zip(shares, parts_a, parts_b, strict=True):
        gain = of_b - of_a
        gain = gain - share @ gain
        # share = 1 / n gives the usual 1 / (n (n - 1)).
        spread = 1.0 - float(share @ share)
        variance += float((share * gain) @ (share * gain)) / spread if spread > 1e-12 else math.nan
    return _normal(auc_a, auc_b, auc_b - auc_a, math.sqrt(variance), "DeLong", higher_is_better=True)


def paired_logloss_test(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    weights: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
) -> Difference:
    """Difference of two log losses on the same rows, by the normal law of the mean paired difference.

    Args:
        labels: ``(n,)``: 0, 1 or NaN.
        scores_a: ``(n,)`` probabilities.
        scores_b: ``(n,)`` probabilities.
        weights: ``(n,)``, 1 by default.
        clusters: ``(n,)`` users or requests, whose rows are not independent of each other: their
            differences are summed first (cluster-robust variance). Rows are independent by default.
    """
    a, b = _pair(labels, scores_a, scores_b, weights, probabilities=True)
    mass = _mass(a)
    total = float(mass.sum())
    method = "paired z-test" if clusters is None else "cluster-robust paired z-test"
    if total == 0:
        return _undefined(method, higher_is_better=False)
    loss_a, loss_b = _losses(a), _losses(b)
    mean_a, mean_b = float(mass @ loss_a) / total, float(mass @ loss_b) / total
    gain = loss_b - loss_a
    delta = float(mass @ gain) / total
    residual: Array = mass * (gain - delta)
    if clusters is not None:
        codes, count = _codes(a, clusters)
        residual = np.bincount(codes, residual, count)
    units = len(residual)
    error = math.sqrt(float(residual @ residual) * units / (units - 1)) / total if units > 1 else math.nan
    return _normal(mean_a, mean_b, delta, error, method, higher_is_better=False)


def cluster_bootstrap(
    metric: Literal["auc", "logloss", "gauc"],
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    clusters: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    groups: ArrayLike | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap that draws whole clusters (users, requests), both models on the same draw.

    A draw gives each cluster a count, and a row weighs its cluster's count: nothing is sorted again.

    Args:
        metric: ``auc``, ``logloss`` or ``gauc``.
        labels: ``(n,)``: 0, 1 or NaN.
        scores_a: ``(n,)``; probabilities for ``logloss``.
        scores_b: ``(n,)``.
        clusters: ``(n,)`` what is drawn.
        weights: ``(n,)``, 1 by default.
        groups: ``(n,)`` the groups of ``gauc``, each within one cluster; the clusters by default.
        repeats: draws.
        seed: of the draws.

    Returns:
        Percentile interval, and the p-value twice the smaller share of draws on one side of 0. NaN where
        the metric is undefined, or all draws differ alike, and not by 0 (a single cluster, say). Draws with
        one class only are left out.

    Raises:
        UserError: an unknown metric, ``repeats`` below 1, a group that spans clusters, or as
            :func:`mldcn.metrics.rows.check_rows`.
    """
    if metric not in ("auc", "logloss", "gauc"):
        raise UserError(f"metric: {metric!r} has no bootstrap; known: auc, gauc, logloss")
    if repeats < 1:
        raise UserError(f"repeats: expected at least 1, found {repeats}")
    pair = _pair(labels, scores_a, scores_b, weights, probabilities=metric == "logloss")
    codes, count = _codes(pair[0], clusters)
    draw: _WeightedAUC | _ClusterMean
    if metric == "auc":
        draw = _WeightedAUC(pair, codes)
    elif metric == "logloss":
        draw = _ClusterMean.of_losses(pair, codes, count)
    else:
        draw = _ClusterMean.of_groups(pair, codes, count, clusters if groups is None else groups)
    a, b = draw(np.ones(count))
    generator = np.random.default_rng(seed)
    deltas = np.empty(repeats)
    for repeat in range(repeats):
        counts = np.bincount(generator.integers(count, size=count), minlength=count) if count else np.empty(0)
        drawn_a, drawn_b = draw(counts.astype(np.float64))
        deltas[repeat] = drawn_b - drawn_a
    deltas = deltas[~np.isnan(deltas)]
    low = high = p_value = math.nan
    # Where all draws differ alike (one cluster, perfect separation) there is no spread to go by.
    if len(deltas) and (a == b or np.ptp(deltas) > _ROUNDING):
        low, high = (float(q) for q in np.quantile(deltas, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2]))
        # The + 1 counts the rows as they are among the draws: no finite number of draws shows p = 0.
        side = min(np.count_nonzero(deltas <= 0), np.count_nonzero(deltas >= 0))
        p_value = min(1.0, 2.0 * (int(side) + 1) / (len(deltas) + 1))
    return Difference(a, b, b - a, low, high, p_value, "cluster bootstrap", metric != "logloss")


def paired_t(
    seeds_a: Sequence[float] | Array, seeds_b: Sequence[float] | Array, *, higher_is_better: bool = True
) -> Difference:
    """Difference of a metric's means over seeds, the i-th of A paired with the i-th of B (same seed).

    Student's t over the paired differences; the interval and p-value are NaN with one seed, or where every
    seed has the very same difference (unless it is 0).

    Raises:
        UserError: not one value of B for each of A.
    """
    from scipy.special import stdtr, stdtrit

    a, b = np.asarray(seeds_a, np.float64), np.asarray(seeds_b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"seeds: expected as many values of A as of B, found shapes {a.shape} and {b.shape}")
    gains = b - a
    delta = float(gains.mean())
    mean_a, mean_b = float(a.mean()), float(b.mean())
    free = len(a) - 1
    error = float(gains.std(ddof=1)) / math.sqrt(len(a)) if free else math.nan
    if not gains.any():
        low = high = 0.0 if free else math.nan
        p_value = 1.0 if free else math.nan
    elif not error > _ROUNDING:
        low = high = p_value = math.nan
    else:
        reach = float(stdtrit(free, (1 + _CONFIDENCE) / 2)) * error
        low, high = delta - reach, delta + reach
        p_value = 2.0 * float(stdtr(free, -abs(delta) / error))
    return Difference(mean_a, mean_b, delta, low, high, p_value, "paired t-test", higher_is_better)


def _pair(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    weights: ArrayLike | None,
    *,
    probabilities: bool = False,
) -> tuple[Rows, Rows]:
    a, b = (
        check_rows(labels, scores, weights, probabilities=probabilities, name=name)
        for scores, name in ((scores_a, "scores_a"), (scores_b, "scores_b"))
    )
    return a, b


def _mass(rows: Rows) -> Array:
    return np.ones(len(rows)) if rows.weights is None else rows.weights.astype(np.float64)


def _codes(rows: Rows, clusters: ArrayLike) -> tuple[Array, int]:
    names, codes = np.unique(rows.select(clusters, "clusters"), return_inverse=True)
    return codes, len(names)


def _losses(rows: Rows) -> Array:
    scores = rows.scores.astype(np.float64)
    likelihood = np.where(rows.positive, scores, 1.0 - scores)
    return np.asarray(-np.log(np.maximum(likelihood, np.finfo(rows.scores.dtype).eps)))


def _undefined(method: str, *, higher_is_better: bool) -> Difference:
    nan = math.nan
    return Difference(nan, nan, nan, nan, nan, nan, method, higher_is_better)


def _normal(
    a: float, b: float, delta: float, error: float, method: str, *, higher_is_better: bool
) -> Difference:
    if error < _ROUNDING:
        error = 0.0
    if error > 0:
        p_value = math.erfc(abs(delta) / error / math.sqrt(2))
        low, high = delta - _Z * error, delta + _Z * error
    elif error == 0 and delta == 0:
        low, high, p_value = 0.0, 0.0, 1.0
    else:
        low = high = p_value = math.nan
    return Difference(a, b, delta, low, high, p_value, method, higher_is_better)


def normal_interval(value: float, null: float, error: float) -> tuple[float, float]:
    """The 95 % interval of a value by its standard error; NaN where that is 0 and the value is not ``null``."""
    difference = _normal(null, value, value - null, error, "", higher_is_better=True)
    return null + difference.low, null + difference.high


def _class_shares(rows: Rows) -> tuple[Array, Array]:
    """Each row's share of the weight of its class: of positives, of negatives."""
    mass = _mass(rows)
    positive, negative = mass[rows.positive], mass[~rows.positive]
    return positive / positive.sum(), negative / negative.sum()


def _placements(rows: Rows) -> tuple[Array, Array] | None:
    """For each positive the share of negatives below it, for each negative that of positives above it.

    Ties count half. Rows keep their order within their class. None where a class has no weight.
    """
    mass = _mass(rows)
    positive = rows.positive
    if not (mass[positive].sum() > 0 and mass[~positive].sum() > 0):
        return None
    order = np.argsort(rows.scores, kind="stable")
    scores, ranked = rows.scores[order], positive[order]
    starts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
    sizes = np.diff(starts, append=len(scores))
    halves = []
    for share in (np.where(ranked, 0.0, mass[order]), np.where(ranked, mass[order], 0.0)):
        tied = np.add.reduceat(share / share.sum(), starts)
        below = np.empty(len(scores))
        below[order] = np.repeat(np.cumsum(tied) - tied / 2, sizes)
        halves.append(below)
    negatives_below, positives_below = halves
    return negatives_below[positive], 1.0 - positives_below[~positive]


class _WeightedAUC:
    """AUC of both models when each cluster counts so many times; scores are sorted once."""

    def __init__(self, pair: tuple[Rows, Rows], codes: Array) -> None:
        self._models = []
        for rows in pair:
            order = np.argsort(rows.scores, kind="stable")
            scores, positive, cluster = rows.scores[order], rows.positive[order], codes[order]
            weights = None if rows.weights is None else rows.weights[order].astype(np.float64)
            negatives, positives = scores[~positive], scores[positive]
            self._models.append(
                (
                    cluster[positive],
                    cluster[~positive],
                    None if weights is None else weights[positive],
                    None if weights is None else weights[~positive],
                    np.searchsorted(negatives, positives, side="left"),
                    np.searchsorted(negatives, positives, side="right"),
                )
            )

    def __call__(self, counts: Array) -> tuple[float, float]:
        a, b = (self._auc(counts, *model) for model in self._models)
        return a, b

    @staticmethod
    def _auc(
        counts: Array,
        cluster_of_positive: Array,
        cluster_of_negative: Array,
        weight_of_positive: Array | None,
        weight_of_negative: Array | None,
        below: Array,
        upto: Array,
    ) -> float:
        positive, negative = counts[cluster_of_positive], counts[cluster_of_negative]
        if weight_of_positive is not None and weight_of_negative is not None:
            positive, negative = positive * weight_of_positive, negative * weight_of_negative
        passed = np.zeros(len(negative) + 1)
        np.cumsum(negative, out=passed[1:])
        pairs = float(positive.sum() * passed[-1])
        won = float((positive * (passed[below] + passed[upto])).sum()) / 2.0
        return won / pairs if pairs else math.nan


class _ClusterMean:
    """Metrics that are a ratio of sums over clusters: a draw is a dot product with the clusters' sums."""

    def __init__(self, sums_a: Array, sums_b: Array, weights: Array) -> None:
        self._sums = np.stack([sums_a, sums_b, weights])

    @classmethod
    def of_losses(cls, pair: tuple[Rows, Rows], codes: Array, count: int) -> _ClusterMean:
        mass = _mass(pair[0])
        a, b = (np.bincount(codes, mass * _losses(rows), count) for rows in pair)
        return cls(a, b, np.bincount(codes, mass, count))

    @classmethod
    def of_groups(cls, pair: tuple[Rows, Rows], codes: Array, count: int, groups: ArrayLike) -> _ClusterMean:
        group = np.unique(pair[0].select(groups, "groups"), return_inverse=True)[1]
        home = np.zeros(int(group.max()) + 1 if len(group) else 0, np.intp)
        home[group] = codes
        astray = np.flatnonzero(home[group] != codes)
        if len(astray):
            raise UserError(
                f"groups: {len(astray)} rows lie in a group that spans clusters, the first at index "
                f"{astray[0]}; draw a cluster that holds whole groups (users rather than requests)"
            )
        sums = []
        weights = np.zeros(count)
        for rows in pair:
            total, weights = np.zeros(count), np.zeros(count)
            for block in grouped_blocks(replace(rows, kept=None), group):  # the column is selected already
                names, aucs, mass = group_aucs(block)
                total += np.bincount(home[names], aucs * mass, count)
                weights += np.bincount(home[names], mass, count)
            sums.append(total)
        return cls(sums[0], sums[1], weights)

    def __call__(self, counts: Array) -> tuple[float, float]:
        a, b, weight = (float(total) for total in self._sums @ counts)
        return (a / weight, b / weight) if weight else (math.nan, math.nan)
