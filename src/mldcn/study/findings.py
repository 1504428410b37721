"""What a study's runs show: gains with their intervals, what they could have shown, how rivals scale.

Gains are signed so that more is better whichever way the metric runs: of log loss it is the drop. Intervals are
95 %, p-values two-sided. What cannot be told (one seed, runs that are missing) is None, and ``why`` says it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mldcn.metrics import Difference

Verdict = Literal["better", "worse", "no worse", "no difference shown", "unknown"]
Cell = tuple[str, str]  # rival, point


@dataclass(frozen=True)
class Estimate:
    """A gain, or a slope of gains, as far as it is known.

    value: of it. error: its standard error. free: the degrees of freedom behind that. low, high, p_value: by
    Student's t. detectable: the smallest true gain that such a test finds in 80 % of studies. why: there are
    none of these; empty where there are.
    """

    value: float
    error: float | None = None
    free: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    detectable: float | None = None
    why: str = ""

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return self.low is not None


@dataclass(frozen=True)
class Spread:
    """A metric over seeds: its mean, its sample standard deviation (None of one seed), the values by seed."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Standing:
    """A rival at a point, over its finished final runs.

    budget, axis, key: of the point. seeds: that are finished; missing: that are not; diverged: that broke down.
    test: metric -> spread. costs: column -> mean; "flops" and "parameters" (behind the embeddings), "memory"
    (bytes), "latency@256" (median milliseconds a batch of 256) and its like where they were measured.
    residual: the largest cost / budget - 1. attainable: the share of what can be attained above chance, mean
    over seeds, for AUC where the best is known.
    """

    rival: str
    point: str
    budget: float | None
    axis: float | None
    key: str | None
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    diverged: tuple[int, ...]
    test: dict[str, Spread]
    costs: dict[str, float]
    residual: float | None
    attainable: float | None


@dataclass(frozen=True)
class Gain:
    """What B gains on A, on the seeds that both have.

    metric: of the test rows. a, b: rival and point; A is the study's baseline, or another rival at the same
    point. seeds, by_seed: the gain of each. over_seeds: how far it would lie elsewhere with other seeds, on these
    test rows. over_both: with other seeds and other test rows of the same kind. p_holm: the p-value of
    :attr:`estimate`, corrected for all comparisons of its family (all gains on the baseline; all pairs at a
    point). verdict: by p_holm; "no worse" than by the recipe's margin, of the first metric only.
    """

    metric: str
    a: Cell
    b: Cell
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    over_seeds: Estimate
    over_both: Estimate
    p_holm: float | None = None
    verdict: Verdict = "unknown"

    @property
    def rival(self) -> str:
        """The rival that gains."""
        return self.b[0]

    @property
    def point(self) -> str:
        """The point at which it does."""
        return self.b[1]

    @property
    def estimate(self) -> Estimate:
        """The widest claim there is an interval for: over seeds and test rows, else over seeds."""
        return self.over_both if self.over_both.known else self.over_seeds


@dataclass(frozen=True)
class Step:
    """From one point to the next. shown: that it gains; flat: that what it gains is less than the margin."""

    start: str
    end: str
    gain: Gain
    shown: bool
    flat: bool


@dataclass(frozen=True)
class Scaling:
    """How a rival's metric grows from point to point.

    key: the varied config key, None of budgets. points: by their FLOPs, or by the varied value. slope: gain per
    decade (tenfold) of FLOPs, the least squares over points, None where all points cost the same; over seeds, and
    over_both. steps: from each point to the next. saturation: the first point that no later one is shown to
    beat (the last one, where it gains up to the end). sure: whether the gain of the step behind it is shown to
    be below the margin, rather than just not shown. why: there is no saturation; empty where there is.
    """

    rival: str
    key: str | None
    metric: str
    points: tuple[str, ...]
    slope: Estimate | None
    slope_over_both: Estimate | None
    steps: tuple[Step, ...]
    saturation: str | None
    sure: bool
    why: str = ""

    @property
    def per_doubling(self) -> float | None:
        """Gain per doubling of FLOPs."""
        return self.slope.value * math.log10(2) if self.slope is not None else None

    @property
    def saturates(self) -> bool:
        """Whether a point behind the saturation is at hand, and not shown to gain."""
        return self.saturation is not None and self.saturation != self.points[-1]


@dataclass(frozen=True)
class Power:
    """What the study could have seen in a metric.

    deviation: of the seeds' paired gains, pooled over all gains. seeds: of a gain (the median). over_seeds,
    over_both: minimum detectable effect of one comparison: 5 % level, 80 % power. corrected: the wider of them
    at the level of Holm's first step among ``comparisons`` gains. seen: whether the recipe's margin could have
    been seen; None where that is not known, or the metric is not the first. seeds_needed: the number of seeds
    that would do on these test rows; None where none up to 1000 would.
    """

    metric: str
    margin: float
    deviation: float | None
    seeds: int
    comparisons: int
    over_seeds: float | None
    over_both: float | None
    corrected: float | None
    seen: bool | None
    seeds_needed: int | None

    @property
    def effect(self) -> float | None:
        """The minimum detectable effect over seeds and test rows, else over seeds."""
        return self.over_both if self.over_both is not None else self.over_seeds

    @property
    def sentence(self) -> str:
        """What that means, in words."""
        if self.effect is None:
            return f"{self.metric}: fewer than two seeds are finished, so nothing says which gains are noise."
        text = (
            f"{self.metric}: the smallest true gain that one comparison finds in 80 % of such studies "
            f"({self.seeds} seeds) is {self.effect:.2g}"
        )
        if self.over_both is None:
            text += ", on these very test rows"
        if self.seen is None:
            return f"{text}."
        if self.seen:
            return f"{text}: a gain of {self.margin:g} could have been seen."
        needed = self.seeds_needed
        remedy = (
            f"{needed} seeds would do" if needed else "more seeds alone would not do, more test rows might"
        )
        return f"{text}: a gain of {self.margin:g} could not have been seen; {remedy}."


@dataclass(frozen=True)
class Front:
    """Pareto front: no cell costs at most as much and scores at least as well. members: by cost."""

    cost: str
    metric: str
    members: tuple[Cell, ...]


@dataclass(frozen=True)
class Matched:
    """A rival's gain on the baseline at a cost, between two of its points: linear in the cost's logarithm.

    column: of the cost. amount: of it, that of the baseline rival at the point ``at``. between: the two points.
    over_seeds, over_both: gain on the baseline rival at that very point.
    """

    column: str
    amount: float
    at: str
    rival: str
    metric: str
    between: tuple[str, str]
    over_seeds: Estimate
    over_both: Estimate


@dataclass(frozen=True)
class OneSeed:
    """The best two rivals at a point by DeLong's test, on one seed: it says nothing of other seeds."""

    point: str
    a: str
    b: str
    seed: int
    difference: Difference


@dataclass(frozen=True)
class Summary:
    """All that a study shows so far.

    metric: the first, that all is judged by. baseline: that gains are over. standings: by recipe order. gains:
    of every other rival and point on the baseline, metric by metric. pairs: of rivals at one point. unit: what
    was drawn again among test rows (user, request or row), None where no predictions are at hand. draws: how
    often. notes: what is missing, and why.
    """

    metric: str
    margin: float
    baseline: Cell
    standings: tuple[Standing, ...]
    gains: tuple[Gain, ...]
    pairs: tuple[Gain, ...]
    power: tuple[Power, ...]
    scaling: tuple[Scaling, ...]
    fronts: tuple[Front, ...]
    matched: tuple[Matched, ...]
    one_seed: tuple[OneSeed, ...]
    unit: str | None
    draws: int
    notes: tuple[str, ...]

    def standing(self, rival: str, point: str) -> Standing | None:
        """A rival at a point; None where no run of it is finished."""
        return next((s for s in self.standings if (s.rival, s.point) == (rival, point)), None)

    def gain(self, rival: str, point: str, metric: str | None = None) -> Gain | None:
        """A gain on the baseline, of the first metric by default."""
        of = metric or self.metric
        return next((g for g in self.gains if (*g.b, g.metric) == (rival, point, of)), None)
