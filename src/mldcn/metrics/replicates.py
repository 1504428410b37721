"""Models trained with several seeds and tested on rows that are a sample: both make a difference noisy.

A difference of two architectures is paired twice: seed i of one with seed i of the other, and both on the same
test rows. The t-test over seeds tells of other seeds on these very rows; what is told here holds for other rows
of the same kind too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mldcn.errors import UserError
from mldcn.metrics.ranking import group_aucs, group_hits, grouped_blocks
from mldcn.metrics.rows import Rows

LEVEL, POWER = 0.05, 0.8
GROUPS = 4096  # clusters beyond so many are drawn in fixed groups: sums of independent things
_BINS, _REACH = 1 << 16, 20.0  # of scores: their log odds from -20 to 20 in steps of 0.0006
_ROUNDING = 1e-14
_MANY = 1e7  # degrees of freedom from which on t is normal

Floats = NDArray[np.float64]
Chunk = tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: the chance of even one false claim among all stays below the level.

    The k-th smallest of m p-values is multiplied by m - k + 1, and none may be below one before it.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def student(value: float, error: float, free: float) -> tuple[float, float, float] | None:
    """The 95 % interval of a value, and the two-sided p-value of its being 0, by Student's t.

    Args:
        value: the estimate.
        error: its standard error.
        free: degrees of freedom.

    Returns:
        Low, high, p-value; None where the error is 0 and the value is not: there is no spread to go by.
    """
    from scipy.special import stdtr, stdtrit

    if not error > _ROUNDING:
        return (0.0, 0.0, 1.0) if value == 0 else None
    free = min(free, _MANY)
    reach = float(stdtrit(free, 1 - LEVEL / 2)) * error
    return value - reach, value + reach, 2.0 * float(stdtr(free, -abs(value) / error))


def minimum_detectable(error: float, free: float, *, level: float = LEVEL, power: float = POWER) -> float:
    """The true difference that a two-sided t-test finds with a chance of ``power``.

    A difference of nc standard errors makes t non-central with parameter nc; nc is solved for.

    Args:
        error: standard error of the difference.
        free: degrees of freedom of that.
        level: of the test.
        power: the chance.

    Example:
        >>> round(minimum_detectable(1.0, 1e9), 2)  # 1.96 + 0.84
        2.8
    """
    digits = 2 if free < 4 else 1 if free < 20 else 0  # worth less than 1 %; a study asks for thousands
    return _noncentrality(round(min(free, _MANY), digits), level, power) * error


@lru_cache(maxsize=4096)
def _noncentrality(free: float, level: float, power: float) -> float:
    """The parameter of a non-central t that exceeds the test's critical value with a chance of ``power``."""
    from scipy.special import gammaincinv, ndtr, stdtrit

    critical = float(stdtrit(free, 1 - level / 2))
    # The chance is a mean over the estimated error, at even quantiles of its law: SciPy's own non-central t is far
    # off at one or two degrees of freedom.
    quantiles = (np.arange(2000) + 0.5) / 2000
    reach = critical * np.sqrt(2.0 * gammaincinv(free / 2, quantiles) / free)

    def found(nc: float) -> float:
        return float(np.mean(ndtr(nc - reach) + ndtr(-nc - reach)))

    low, high = 0.0, 2.0 * critical + 2.0
    while found(high) < power:
        high *= 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < power else (low, middle)
    return high


def seeds_needed(deviation: float, effect: float, *, rows_error: float = 0.0, most: int = 1000) -> int | None:
    """How many seeds a paired study needs to find an effect with 80 % power; None where ``most`` are too few.

    Args:
        deviation: of the seeds' paired differences.
        effect: the difference to find.
        rows_error: standard error that comes of the test rows, which seeds do not lessen.
        most: seeds to consider.
    """

    def enough(seeds: int) -> bool:
        of_seeds = deviation**2 / seeds
        error, free = two_sources(of_seeds, seeds - 1, rows_error**2, _MANY)
        return minimum_detectable(error, free) <= effect

    if not enough(most):
        return None
    low, high = 1, most  # more seeds never detect less
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def two_sources(a: float, free_a: float, b: float, free_b: float) -> tuple[float, float]:
    """Standard error of what has two independent estimated variances, and the degrees of freedom to read it with.

    The 95 % interval is to reach sqrt(a t_a^2 + b t_b^2) to either side (Banerjee), t_a and t_b being the
    critical values of either alone; the degrees of freedom are those whose critical value makes it so. That
    covers at least 95 %; Satterthwaite's degrees of freedom, with variances of one or two, only 86 to 93 %.

    Args:
        a: the one variance.
        free_a: its degrees of freedom.
        b: the other.
        free_b: its degrees of freedom.
    """
    from scipy.special import stdtrit

    if not a + b > 0:
        return 0.0, free_a
    critical = [float(stdtrit(min(free, _MANY), 1 - LEVEL / 2)) for free in (free_a, free_b)]
    wanted = math.sqrt((a * critical[0] ** 2 + b * critical[1] ** 2) / (a + b))
    low, high = sorted((math.log(min(free_a, _MANY)), math.log(min(free_b, _MANY))))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if float(stdtrit(math.exp(middle), 1 - LEVEL / 2)) > wanted else (low, middle)
        )
    return math.sqrt(a + b), math.exp((low + high) / 2)


def seeds_and_rows(gains: ArrayLike, draws: ArrayLike, clusters: int) -> tuple[float, float]:
    """Standard error of a mean gain over seeds and test rows, and its degrees of freedom.

    A gain of seed s on rows r is taken as mean + S_s + R_r + (SR)_sr. The spread over seeds, s^2 / n, holds S and
    SR; that of the mean over draws of clusters holds R and SR; SR is found from how much less the mean varies
    over draws than single seeds do, and counted once. Seeds are not drawn again themselves: with a handful of
    them that understates their variance by (n - 1) / n, and percentiles of it have no t's heavy tails.

    Args:
        gains: ``(n,)`` of each seed, at least 2.
        draws: ``(B, n)`` the same over draws of test clusters, seeds sharing each draw.
        clusters: that were drawn, at least 2.
    """
    of_seed, drawn = np.asarray(gains, np.float64), np.asarray(draws, np.float64)
    n = len(of_seed)
    grown = clusters / (clusters - 1)
    by_seeds = float(of_seed.var(ddof=1)) / n
    by_rows = float(drawn.mean(axis=1).var(ddof=1)) * grown
    single = float(drawn.var(axis=0, ddof=1).mean()) * grown
    shared = min(max(0.0, (single - by_rows) / (n - 1)), by_seeds)
    return two_sources(by_seeds - shared, n - 1, by_rows, clusters - 1)


@dataclass(frozen=True)
class ClusterSums:
    """Metrics of a model as ratios of sums over groups of clusters.

    value: metric -> on the rows as they are. above, below: metric -> ``(groups,)`` numerators and denominators. A
    draw that counts group g c_g times has the metric sum c_g above_g / sum c_g below_g: exactly, but for the AUC,
    of which that is the linear part (the sum over rows of DeLong's placements).
    """

    value: dict[str, float]
    above: dict[str, Floats]
    below: dict[str, Floats]

    def drawn(self, counts: Floats) -> dict[str, Floats]:
        """Each metric over draws.

        Args:
            counts: ``(B, groups)`` of :func:`cluster_counts`.
        """
        return {name: (counts @ self.above[name]) / (counts @ self.below[name]) for name in self.value}


def cluster_counts(used: NDArray[np.bool_], draws: int, seed: int = 0) -> Floats:
    """``(B, groups)``: how often each draw, with replacement, has each of the groups that hold rows."""
    generator = np.random.default_rng(seed)
    where = np.flatnonzero(used)
    counts = np.zeros((draws, len(used)))
    for draw in range(draws):
        counts[draw, where] = np.bincount(
            generator.integers(len(where), size=len(where)), minlength=len(where)
        )
    return counts


def group_codes(ids: ArrayLike, groups: int = GROUPS) -> NDArray[np.int64]:
    """Hashes ids of clusters into as many groups: neighbours in number share none on purpose."""
    x = np.asarray(ids).astype(np.uint64)
    with np.errstate(over="ignore"):  # splitmix64
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(groups)).astype(np.int64)


def cluster_sums(chunks: Callable[[], Iterable[Chunk]], groups: int = GROUPS) -> ClusterSums | None:
    """Sums that AUC and log loss are made of, in memory that does not grow with the rows.

    Scores are put in 65,536 bins, evenly by log odds, whose rows are taken as tied; the rows are read twice.

    Args:
        chunks: gives labels (NaN: none), probabilities, weights and group codes, ``(n,)`` each, chunk by chunk.
        groups: of clusters.

    Returns:
        None where the rows are of one class.

    Raises:
        UserError: a score is no probability.
    """
    mass = np.zeros((2, _BINS))
    for labels, scores, weights, _ in _labelled(chunks()):
        bins = _bins(scores)
        for kind in (0, 1):
            of = labels == kind
            mass[kind] += np.bincount(bins[of], weights[of], _BINS)
    total = mass.sum(axis=1)
    if not (total > 0).all():
        return None
    negative, positive = mass / total[:, None]
    # V of a positive: the share of negatives below it, a tie counting half; of a negative: of positives above it.
    v = np.stack([1.0 - (np.cumsum(positive) - positive / 2), np.cumsum(negative) - negative / 2])
    auc = float(positive @ v[1])
    placed, losses, weight = np.zeros(groups), np.zeros(groups), np.zeros(groups)
    used = np.zeros(groups, np.bool_)
    for labels, scores, weights, codes in _labelled(chunks()):
        side = (labels > 0).astype(np.intp)
        share = weights / total[side] * (v[side, _bins(scores)] - auc)
        placed += np.bincount(codes, share, groups)
        likelihood = np.where(labels > 0, scores, 1.0 - scores)
        loss = -np.log(np.maximum(likelihood, np.finfo(np.float32).eps))
        losses += np.bincount(codes, weights * loss, groups)
        weight += np.bincount(codes, weights, groups)
        used[codes] = True
    each = used / np.count_nonzero(used)
    return ClusterSums(
        {"auc": auc, "logloss": float(losses.sum() / weight.sum())},
        {"auc": placed + auc * each, "logloss": losses},
        {"auc": each, "logloss": weight},
    )


def with_ranking(sums: ClusterSums, metric: str, rows: Rows, ids: ArrayLike, codes: ArrayLike) -> ClusterSums:
    """Adds GAUC or HIT@k, whose rows are sorted by their group in memory.

    Args:
        sums: to add to.
        metric: ``gauc`` or ``hit@k``.
        rows: labelled rows.
        ids: ``(n,)`` users or sessions, each within one cluster; rows of 0 belong to none and are left out.
        codes: ``(n,)`` groups of clusters.
    """
    of_row, group_of_row = rows.select(ids, "ids"), rows.select(codes, "codes")
    named = of_row != 0
    names, first = np.unique(of_row[named], return_index=True)
    home = group_of_row[named][first]
    weights = None if rows.weights is None else rows.weights[named]
    groups = len(sums.below["auc"])
    above, below = np.zeros(groups), np.zeros(groups)
    for block in grouped_blocks(Rows(rows.positive[named], rows.scores[named], weights, None), of_row[named]):
        group, values, mass = (
            group_aucs(block) if metric == "gauc" else group_hits(block, int(metric.removeprefix("hit@")))
        )
        code = home[np.searchsorted(names, group)]
        above += np.bincount(code, values * mass, groups)
        below += np.bincount(code, mass, groups)
    if not below.any():
        return sums
    value = float(above.sum() / below.sum())
    return ClusterSums(
        {**sums.value, metric: value}, {**sums.above, metric: above}, {**sums.below, metric: below}
    )


def _labelled(
    chunks: Iterable[Chunk],
) -> Iterable[tuple[Floats, Floats, Floats, NDArray[np.int64]]]:
    for labels, scores, weights, codes in chunks:
        y = np.asarray(labels, np.float64)
        known = ~np.isnan(y)
        p = np.asarray(scores, np.float64)[known]
        if not ((p >= 0) & (p <= 1)).all():
            raise UserError("predictions: some are no probabilities; train the run again")
        yield y[known], p, np.asarray(weights, np.float64)[known], np.asarray(codes, np.int64)[known]


def _bins(scores: Floats) -> NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        odds = np.log(scores) - np.log1p(-scores)
    places: Floats = (np.clip(odds, -_REACH, _REACH) + _REACH) * ((_BINS - 1) / (2 * _REACH))
    return places.astype(np.int64)
