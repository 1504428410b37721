"""How rivals scale: slopes, saturation, Pareto fronts, gains at equal measured cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from mldcn.metrics import metric_info
from mldcn.study.contrasts import Contrasts
from mldcn.study.findings import Cell, Front, Gain, Matched, Scaling, Standing, Step
from mldcn.study.rows import Study

_LEVEL = 0.05
_APART = math.log10(1.02)  # costs within 2 % of each other are one cost


def scalings(study: Study, contrasts: Contrasts, standings: Sequence[Standing]) -> Iterable[Scaling]:
    """Of each rival with two or more finished points, over budgets or over the values of a key."""
    metric = study.recipe.metrics[0]
    for rival in study.recipe.rivals:
        own = [s for s in standings if s.rival == rival and metric in s.test]
        for key in dict.fromkeys(s.key for s in own):
            path = [s for s in own if s.key == key]
            apart = np.ptp(np.log10([s.costs["flops"] for s in path])) > _APART
            # Points that cost the same, and vary nothing, are settings side by side: slices of the log, say.
            if len(path) > 1 and (apart or key is not None):
                yield _scaling(study, contrasts, path, apart=bool(apart))


def _scaling(study: Study, contrasts: Contrasts, path: Sequence[Standing], *, apart: bool) -> Scaling:
    metric = study.recipe.metrics[0]
    if path[0].key is None:
        path = sorted(path, key=lambda s: s.costs["flops"])
    elif all(s.axis is not None for s in path):
        path = sorted(path, key=lambda s: s.axis or 0.0)
    cells = [(s.rival, s.point) for s in path]
    slope = None
    if apart:
        factors = slope_factors([math.log10(s.costs["flops"]) for s in path])
        slope = contrasts.of(dict(zip(cells, factors, strict=True)), metric)
    later = {
        (i, j): _gain(contrasts, cells[i], cells[j], metric)
        for i in range(len(cells))
        for j in range(i + 1, len(cells))
    }
    steps = [_step(later[i, i + 1], study.recipe.margin) for i in range(len(cells) - 1)]
    unknown = [gain for gain in later.values() if gain is None or not gain.estimate.known]
    why = ""
    if unknown:
        why = unknown[0].estimate.why if unknown[0] is not None else "two points have no seed in common"
    shown = {pair for pair, gain in later.items() if _shown(gain)}
    level = saturation(len(cells), shown) if not unknown else None
    after = steps[level] if level is not None and level < len(steps) else None
    return Scaling(
        rival=path[0].rival,
        key=path[0].key,
        metric=metric,
        points=tuple(s.point for s in path),
        slope=slope.over_seeds if slope is not None else None,
        slope_over_both=slope.over_both if slope is not None else None,
        steps=tuple(step for step in steps if step is not None),
        saturation=path[level].point if level is not None else None,
        sure=after is not None and after.flat,
        why=why,
    )


def slope_factors(x: Sequence[float]) -> list[float]:
    """What the least-squares slope multiplies each point's value by.

    Example:
        >>> slope_factors([1.0, 2.0, 3.0])
        [-0.5, 0.0, 0.5]
    """
    off = np.asarray(x, np.float64) - np.mean(x)
    return [float(f) for f in off / float(off @ off)]


def saturation(points: int, beats: set[tuple[int, int]]) -> int:
    """The first of some points that no later one is shown to beat.

    Args:
        points: how many.
        beats: (i, j) where j > i is shown to beat i.
    """
    return next(i for i in range(points) if not any((i, j) in beats for j in range(i + 1, points)))


def _gain(contrasts: Contrasts, a: Cell, b: Cell, metric: str) -> Gain | None:
    found = contrasts.of({b: 1.0, a: -1.0}, metric)
    if found is None:
        return None
    return Gain(metric, a, b, found.seeds, found.by_seed, found.over_seeds, found.over_both)


def _shown(gain: Gain | None) -> bool:
    if gain is None or gain.estimate.p_value is None:
        return False
    return gain.estimate.value > 0 and gain.estimate.p_value < _LEVEL


def _step(gain: Gain | None, margin: float) -> Step | None:
    if gain is None:
        return None
    high = gain.estimate.high
    return Step(gain.a[1], gain.b[1], gain, _shown(gain), high is not None and high < margin)


def fronts(standings: Sequence[Standing], metric: str) -> Iterable[Front]:
    """For each cost that is known of all finished cells, those that no other beats."""
    there = [s for s in standings if metric in s.test]
    higher = bool(metric_info(metric).higher_is_better)
    for cost in there[0].costs if there else ():
        if all(cost in s.costs for s in there):
            values = [s.test[metric].mean if higher else -s.test[metric].mean for s in there]
            chosen = pareto([s.costs[cost] for s in there], values)
            yield Front(cost, metric, tuple((there[i].rival, there[i].point) for i in chosen))


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Which points no other beats: none costs at most as much and is worth at least as much, one of them truly.

    Args:
        costs: less is better.
        values: more is better.

    Returns:
        Their numbers, by cost.

    Example:
        >>> pareto([1.0, 2.0, 2.0, 3.0], [0.5, 0.7, 0.6, 0.7])
        [0, 1]
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
    found: list[int] = []
    for i in order:
        last = found[-1] if found else None
        tied = last is not None and (costs[i], values[i]) == (costs[last], values[last])
        if last is None or tied or values[i] > values[last]:
            found.append(i)
    return found


def matched_costs(study: Study, contrasts: Contrasts, standings: Sequence[Standing]) -> Iterable[Matched]:
    """Gains on the baseline rival at each cost that it has, where the recipe did not match that cost itself."""
    recipe, metric = study.recipe, study.recipe.metrics[0]
    there = [s for s in standings if metric in s.test]
    base = [s for s in there if s.rival == recipe.baseline]
    if not recipe.budgets or not base:
        return
    for column in base[0].costs:
        if column in (recipe.match, f"{recipe.match}@1"):
            continue
        for at in (s for s in base if column in s.costs):
            for rival in (name for name in recipe.rivals if name != recipe.baseline):
                own = {s.point: s.costs[column] for s in there if s.rival == rival and column in s.costs}
                weights = interpolation(own, at.costs[column])
                if weights is None:
                    continue
                factors: dict[Cell, float] = {(rival, point): weight for point, weight in weights.items()}
                found = contrasts.of({**factors, (at.rival, at.point): -1.0}, metric)
                if found is not None:
                    ends = list(weights)
                    yield Matched(
                        column,
                        at.costs[column],
                        at.point,
                        rival,
                        metric,
                        (ends[0], ends[-1]),
                        found.over_seeds,
                        found.over_both,
                    )


def interpolation(costs: Mapping[str, float], amount: float) -> dict[str, float] | None:
    """What to multiply the values of a rival's points by to have its value at a cost; None beyond its points.

    Linear in the logarithm of the cost, between the two points next to it.

    Args:
        costs: of the points.
        amount: of the cost.

    Example:
        >>> interpolation({"small": 1.0, "large": 100.0}, 10.0)
        {'small': 0.5, 'large': 0.5}
    """
    points = sorted(costs, key=lambda point: costs[point])
    for point in points:
        if abs(math.log10(costs[point] / amount)) < 1e-9:
            return {point: 1.0}
    for low, high in pairwise(points):
        if costs[low] < amount < costs[high]:
            share = math.log(amount / costs[low]) / math.log(costs[high] / costs[low])
            return {low: 1.0 - share, high: share}
    return None
