"""What a study shows: :func:`summarise` makes its findings, as far as it has come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mldcn.comparison import LABEL, PROBABILITY, read_predictions
from mldcn.metrics import delong, metric_info
from mldcn.metrics.replicates import holm, minimum_detectable, seeds_needed
from mldcn.run import RunFolder
from mldcn.study.contrasts import DRAWS, Contrasts
from mldcn.study.findings import Cell, Gain, OneSeed, Power, Spread, Standing, Summary, Verdict
from mldcn.study.rows import RunRow, Study
from mldcn.study.scaling import fronts, matched_costs, scalings

_LEVEL = 0.05


def summarise(study: Study) -> Summary:
    """All that a study's finished runs show.

    Gains are paired by seed. Over seeds their interval is Student's t; over seeds and test rows it is that of
    both sources of noise, the rows drawn again by users (or requests, whichever the log names, or single rows).
    Holm's correction is over all gains on the baseline, and over all pairs of rivals at a point.

    Args:
        study: finished or not; what is missing is named in the notes.

    Raises:
        UserError: a run's predictions are damaged.
    """
    recipe = study.recipe
    contrasts = Contrasts(study)
    baseline = (recipe.baseline, recipe.baseline_point().name)
    standings = tuple(_standings(study, contrasts))
    there = [(s.rival, s.point) for s in standings if s.seeds]
    metrics = [name for name in recipe.metrics if metric_info(name).higher_is_better is not None]
    gains: list[Gain] = []
    pairs: list[Gain] = []
    for metric in metrics:
        others = [cell for cell in there if cell != baseline]
        gains += judged(study, _gains(contrasts, [(baseline, cell) for cell in others], metric))
        for point in dict.fromkeys(point for _, point in there):
            at = [cell for cell in there if cell[1] == point]
            both = [(a, b) for i, a in enumerate(at) for b in at[i + 1 :]]
            pairs += judged(study, _gains(contrasts, both, metric))
    return Summary(
        metric=recipe.metrics[0],
        margin=recipe.margin,
        baseline=baseline,
        standings=standings,
        gains=tuple(gains),
        pairs=tuple(pairs),
        power=tuple(_power(study, metric, [g for g in gains if g.metric == metric]) for metric in metrics),
        scaling=tuple(scalings(study, contrasts, standings)),
        fronts=tuple(fronts(standings, recipe.metrics[0])),
        matched=tuple(matched_costs(study, contrasts, standings)),
        one_seed=tuple(_one_seed(study, contrasts, standings)),
        unit=contrasts.unit,
        draws=DRAWS,
        notes=tuple(dict.fromkeys(_notes(study, standings, gains))),
    )


def _standings(study: Study, contrasts: Contrasts) -> Iterable[Standing]:
    for rival in study.recipe.rivals:
        for point in study.recipe.points(rival):
            cell = (rival, point.name)
            rows = [row for _, row in sorted(contrasts.cells.get(cell, {}).items())]
            broken = [r.seed for r in study.final if (r.rival, r.point) == cell and r.diverged]
            seeds = tuple(row.seed for row in rows)
            yield Standing(
                rival=rival,
                point=point.name,
                budget=point.budget,
                axis=point.axis,
                key=point.key,
                seeds=seeds,
                missing=tuple(s for s in study.recipe.seeds if s not in seeds and s not in broken),
                diverged=tuple(sorted(broken)),
                test={name: spread([_test(r, name) for r in rows]) for name in _names(rows)},
                costs=_costs(rows),
                residual=max((r.residual for r in rows if r.residual is not None), key=abs, default=None),
                attainable=_share(rows),
            )


def _names(rows: Sequence[RunRow]) -> list[str]:
    """The metrics that every run has."""
    return [
        name for name in (rows[0].test or {} if rows else {}) if not any(map(math.isnan, _all(rows, name)))
    ]


def _all(rows: Sequence[RunRow], metric: str) -> list[float]:
    return [_test(row, metric) for row in rows]


def _test(row: RunRow, metric: str) -> float:
    return (row.test or {}).get(metric, math.nan)


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, tuple(values))


def _costs(rows: Sequence[RunRow]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault("flops", []).append(float(row.model_flops))
        found.setdefault("parameters", []).append(float(row.parameters["dense"]))
        if row.memory_bytes is not None:
            found.setdefault("memory", []).append(float(row.memory_bytes))
        for batch, times in (row.latency_ms or {}).items():
            found.setdefault(f"latency@{batch}", []).append(times["median"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _share(rows: Sequence[RunRow]) -> float | None:
    """The mean share of the AUC that can be attained, above the half that chance has."""
    found = [
        (_test(row, "auc") - 0.5) / (row.attainable["auc"] - 0.5)
        for row in rows
        if row.attainable is not None and row.attainable.get("auc", 0.5) > 0.5
    ]
    return float(np.mean(found)) if found and not math.isnan(sum(found)) else None


def _gains(contrasts: Contrasts, both: Iterable[tuple[Cell, Cell]], metric: str) -> Iterable[Gain]:
    for a, b in both:
        found = contrasts.of({b: 1.0, a: -1.0}, metric)
        if found is not None:
            yield Gain(metric, a, b, found.seeds, found.by_seed, found.over_seeds, found.over_both)


def judged(study: Study, gains: Iterable[Gain]) -> list[Gain]:
    """Gains with p-values that are corrected for one another, and the verdicts by them."""
    family = list(gains)
    p_values = [gain.estimate.p_value for gain in family]
    corrected = iter(holm([p for p in p_values if p is not None]))
    margin = study.recipe.margin
    found = []
    for gain, p_value in zip(family, p_values, strict=True):
        if p_value is None or gain.estimate.low is None:
            found.append(gain)
            continue
        p_holm = next(corrected)
        verdict: Verdict
        if p_holm < _LEVEL:
            verdict = "better" if gain.estimate.value > 0 else "worse"
        elif gain.metric == study.recipe.metrics[0] and gain.estimate.low > -margin:
            verdict = "no worse"
        else:
            verdict = "no difference shown"
        found.append(replace(gain, p_holm=p_holm, verdict=verdict))
    return found


def _power(study: Study, metric: str, gains: Sequence[Gain]) -> Power:
    """What could have been seen, by the median gain's noise."""
    recipe = study.recipe
    known = [gain for gain in gains if gain.over_seeds.known]
    empty = Power(metric, recipe.margin, None, 1, len(gains), None, None, None, None, None)
    if not known:
        return empty
    seeds = int(np.median([len(gain.seeds) for gain in known]))
    deviation = math.sqrt(float(np.mean([np.var(gain.by_seed, ddof=1) for gain in known])))
    over_seeds = minimum_detectable(deviation / math.sqrt(seeds), seeds - 1)
    both = [gain.over_both for gain in known if gain.over_both.known]
    over_both = float(np.median([e.detectable for e in both if e.detectable is not None])) if both else None
    level = _LEVEL / len(known)
    corrected = float(
        np.median(
            [
                minimum_detectable(e.error or 0.0, e.free or 1.0, level=level)
                for e in both or [gain.over_seeds for gain in known]
            ]
        )
    )
    effect = over_both if over_both is not None else over_seeds
    of_margin = metric == recipe.metrics[0]
    return Power(
        metric=metric,
        margin=recipe.margin,
        deviation=deviation,
        seeds=seeds,
        comparisons=len(known),
        over_seeds=over_seeds,
        over_both=over_both,
        corrected=corrected,
        seen=effect <= recipe.margin if of_margin else None,
        seeds_needed=seeds_needed(deviation, recipe.margin, rows_error=_rows_error(known))
        if of_margin
        else None,
    )


def _rows_error(gains: Sequence[Gain]) -> float:
    """The part of the standard error that more seeds do not lessen: the median over gains."""
    parts = [
        max(0.0, (gain.over_both.error or 0.0) ** 2 - float(np.var(gain.by_seed, ddof=1)) / len(gain.seeds))
        for gain in gains
        if gain.over_both.known
    ]
    return math.sqrt(float(np.median(parts))) if parts else 0.0


def _one_seed(study: Study, contrasts: Contrasts, standings: Sequence[Standing]) -> Iterable[OneSeed]:
    """At each point the best rival against the next, on their first seed, by DeLong's test."""
    for point in dict.fromkeys(standing.point for standing in standings):
        at = [s for s in standings if s.point == point and "auc" in s.test]
        at.sort(key=lambda s: -s.test["auc"].mean)
        if len(at) < 2:
            continue
        b, a = at[0], at[1]
        common = sorted(set(a.seeds) & set(b.seeds))
        if not common:
            continue
        found = delong_pair(study, *(contrasts.cells[s.rival, point][common[0]] for s in (a, b)))
        if found is not None:
            yield replace(found, point=point)


def delong_pair(study: Study, a: RunRow, b: RunRow) -> OneSeed | None:
    """DeLong's test of two runs, rows taken as independent; None where they have no rows in common.

    Args:
        study: both are of.
        a: the one run.
        b: the other; the difference is B - A.

    Raises:
        UserError: predictions are damaged.
    """
    files = [RunFolder(study.out / row.run).predictions for row in (a, b)]
    if not all(file.exists() for file in files):
        return None
    tables = [read_predictions(file) for file in files]
    label, score = f"{LABEL}{study.facts.task}", f"{PROBABILITY}{study.facts.task}"
    if any(label not in table.column_names for table in tables):
        return None
    labels, others = (table[label].to_numpy() for table in tables)
    if not np.array_equal(labels, others, equal_nan=True):
        return None
    weights = tables[0]["weight"].to_numpy()
    scores_a, scores_b = (table[score].to_numpy() for table in tables)
    difference = delong(labels, scores_a, scores_b, None if (weights == 1).all() else weights)
    return OneSeed(b.point, a.rival, b.rival, b.seed, difference)


def _notes(study: Study, standings: Sequence[Standing], gains: Sequence[Gain]) -> Iterable[str]:
    recipe = study.recipe
    here = [s for s in standings if (s.rival, s.point) == (recipe.baseline, recipe.baseline_point().name)]
    if not any(s.seeds for s in here):
        yield (
            f"No run of the baseline ({recipe.baseline} at {recipe.baseline_point().name}) is finished: there "
            "are no gains yet."
        )
    if len(recipe.seeds) < 2:
        yield "One seed a model: there are no intervals, and no difference can be told from luck."
    for s in standings:
        if s.missing:
            count = f"{len(s.missing)} of {len(recipe.seeds)} runs"
            yield f"{s.rival} at {s.point}: {count} are not finished (seeds {', '.join(map(str, s.missing))})."
        if s.diverged:
            yield (
                f"{s.rival} at {s.point}: broke down with seeds {', '.join(map(str, s.diverged))}; its means are "
                "of the others."
            )
    reasons: dict[str, list[str]] = {}
    for gain in gains:
        if gain.over_seeds.known and gain.over_both.why:
            why = gain.over_both.why
            reasons.setdefault(why.partition(" (")[0], []).append(why)  # the run in brackets is one of many
    for of_kind in reasons.values():
        count = f"{len(of_kind)} of {len(gains)} intervals on the baseline hold the chance of seeds only"
        yield f"{count}: {of_kind[0]}."
