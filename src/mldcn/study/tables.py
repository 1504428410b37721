"""The tables of a study's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from mldcn.metrics import metric_info
from mldcn.report.table import Cell, Column, Interval, Label, Table, table_of
from mldcn.report.text import number, slug
from mldcn.study.findings import Estimate, Gain, Power, Standing
from mldcn.study.outline import Outline, cost_title, key_title, listed, metric_title, whose
from mldcn.study.quoted import Quoted

_GAIN = "+.5f"
_BASELINE = "baseline"


def estimate_cell(estimate: Estimate | None) -> Cell:
    """A value with its interval."""
    return None if estimate is None else Interval(estimate.value, estimate.low, estimate.high)


def drop(metric: str) -> bool:
    """Whether less of a metric is better, so that a gain is its drop."""
    return metric_info(metric).higher_is_better is False


def gain_title(metric: str) -> str:
    """What a gain in a metric is called."""
    return f"{metric_title(metric)} {'drop' if drop(metric) else 'gain'}"


def gains_table(outline: Outline, metric: str) -> Table:
    """Every rival at every point in one metric: the mean over seeds and the gain on the baseline."""
    summary = outline.summary
    order = {name: i for i, name in enumerate(outline.points)}
    sign = 1.0 if drop(metric) else -1.0
    rows = [s for s in outline.there if metric in s.test]
    rows.sort(key=lambda s: (order[s.point] if outline.recipe.budgets else 0, sign * s.test[metric].mean))

    def gain(standing: Standing) -> Gain | None:
        return summary.gain(standing.rival, standing.point, metric)

    def verdict(standing: Standing) -> Cell:
        found = gain(standing)
        if found is None:
            return _BASELINE if (standing.rival, standing.point) == summary.baseline else None
        return found.verdict

    drawn = f", and other {summary.unit}s of the same kind" if summary.unit is not None else ""
    columns: list[tuple[Column, Callable[[Standing], Cell]]] = [
        (Column(name="Model"), lambda s: Label(s.rival, s.point)),
        (
            Column(name=gain_title(metric), unit="95 % interval", format=_GAIN),
            lambda s: estimate_cell(g.estimate) if (g := gain(s)) else None,
        ),
        (Column(name="Reading"), verdict),
        (
            Column(name="over seeds alone", unit="95 % interval", format=_GAIN),
            lambda s: estimate_cell(g.over_seeds) if (g := gain(s)) and g.over_both.known else None,
        ),
        (Column(name="p", unit="Holm", format="p"), lambda s: g.p_holm if (g := gain(s)) else None),
        (Column(name=f"Test {metric_title(metric)}", format=".5f"), lambda s: s.test[metric].mean),
        (Column(name="Deviation", unit="over seeds", format=".5f"), lambda s: s.test[metric].deviation),
        (Column(name="Seeds"), lambda s: len(s.seeds)),
        (Column(name="FLOPs", unit="an example", format="si"), lambda s: s.costs.get("flops")),
        (Column(name="Residual", format="+.2%", note="cost over budget, less 1."), lambda s: s.residual),
        (
            Column(
                name="Share of the attainable",
                format=".1%",
                note="of the way from 0.5 (chance) to the AUC of the true probabilities.",
            ),
            lambda s: s.attainable if metric == summary.metric else None,
        ),
        (
            Column(name="Detectable", format=".5f", note="the smallest true gain found four times in five."),
            lambda s: g.estimate.detectable if (g := gain(s)) else None,
        ),
    ]
    notes = [f"Gains are over {outline.baseline}, paired by seed; above 0 is better."]
    if any(g.estimate.known for g in summary.gains if g.metric == metric):
        notes.append(f"The interval says how far the gain may lie elsewhere with other seeds{drawn}.")
    caption = f"Test {metric_title(metric)} and gain over {outline.baseline}"
    return table_of(caption, rows, columns, name=f"gains-{slug(metric)}", notes=notes)


def power_table(outline: Outline) -> Table:
    """What the study could have seen, metric by metric."""
    columns: list[tuple[Column, Callable[[Power], Cell]]] = [
        (Column(name="Metric"), lambda p: metric_title(p.metric)),
        (Column(name="Seeds"), lambda p: p.seeds),
        (Column(name="Deviation of paired gains", unit="over seeds", format=".2g"), lambda p: p.deviation),
        (Column(name="Detectable", unit="other seeds", format=".2g"), lambda p: p.over_seeds),
        (Column(name="Detectable", unit="other seeds and rows", format=".2g"), lambda p: p.over_both),
        (Column(name="Detectable", unit="after Holm", format=".2g"), lambda p: p.corrected),
        (Column(name="A gain that matters", format="g"), lambda p: p.margin if p.seen is not None else None),
        (
            Column(name="Could be seen"),
            lambda p: None if p.seen is None else "yes" if p.seen else "no",
        ),
        (Column(name="Seeds to see it"), lambda p: p.seeds_needed),
    ]
    notes = ["Detectable: the smallest true gain that a test at the 5 % level finds four times in five."]
    return table_of(
        "What the study could have seen", list(outline.summary.power), columns, name="power", notes=notes
    )


def beaten_table(outline: Outline) -> Table | None:
    """Whom each rival is shown to beat, point by point, after Holm's correction."""
    summary = outline.summary
    pairs = [pair for pair in summary.pairs if pair.metric == summary.metric]
    points = [point for point in outline.points if any(pair.point == point for pair in pairs)]
    if not points:
        return None
    rivals = [rival for rival in outline.styles if any(rival in (p.a[0], p.b[0]) for p in pairs)]
    rows: list[list[Cell]] = [[rival, *(_beats(pairs, rival, point) for point in points)] for rival in rivals]
    notes = ["Only what is shown after Holm's correction for all pairs at the point; silence is no tie."]
    return Table(
        f"Which rivals are shown to beat which ({metric_title(summary.metric)})",
        [Column(name="Model"), *(Column(name=f"at {point}" if point else "") for point in points)],
        rows,
        "beats",
        notes,
    )


def _beats(pairs: Sequence[Gain], rival: str, point: str) -> str:
    wins: list[str] = []
    losses: list[str] = []
    for pair in pairs:
        if pair.point != point or rival not in (pair.a[0], pair.b[0]):
            continue
        mine = pair.b[0] == rival
        other = pair.a[0] if mine else pair.b[0]
        if pair.verdict in ("better", "worse"):
            (wins if (pair.verdict == "better") == mine else losses).append(other)
    parts = [f"beats {listed(wins)}" if wins else "", f"behind {listed(losses)}" if losses else ""]
    return "; ".join(filter(None, parts))


def pair_tables(outline: Outline) -> Iterator[tuple[str, Table]]:
    """All pairs of rivals at each point, the largest gains first."""
    summary = outline.summary
    for point in outline.points:
        pairs = [pair for pair in summary.pairs if pair.metric == summary.metric and pair.point == point]
        if not pairs:
            continue
        pairs.sort(key=lambda pair: -abs(pair.estimate.value))
        columns: list[tuple[Column, Callable[[Gain], Cell]]] = [
            (Column(name="Model"), lambda g: _ends(g)[1]),
            (Column(name="against"), lambda g: _ends(g)[0]),
            (
                Column(name=gain_title(summary.metric), unit="95 % interval", format=_GAIN),
                lambda g: _upwards(g.estimate),
            ),
            (Column(name="p", format="p"), lambda g: g.estimate.p_value),
            (Column(name="p", unit="Holm", format="p"), lambda g: g.p_holm),
            (
                Column(name="Reading"),
                lambda g: (
                    "shown" if g.verdict in ("better", "worse") else "not shown" if g.estimate.known else None
                ),
            ),
        ]
        title = f"Pairs of rivals at {point}" if outline.recipe.budgets else "Pairs of rivals"
        yield title, table_of(title, pairs, columns, name=f"pairs-{slug(point)}")


def _ends(gain: Gain) -> tuple[str, str]:
    """The rival behind and the one ahead."""
    return (gain.a[0], gain.b[0]) if gain.estimate.value >= 0 else (gain.b[0], gain.a[0])


def _upwards(estimate: Estimate) -> Interval:
    """An estimate turned so that it is a gain."""
    if estimate.value >= 0:
        return Interval(estimate.value, estimate.low, estimate.high)
    ends = (estimate.high, estimate.low)
    return Interval(-estimate.value, *(None if end is None else -end for end in ends))


def one_seed_table(outline: Outline) -> Table | None:
    """DeLong's test of the best two at each point, on one seed."""
    if not outline.summary.one_seed:
        return None
    rows: list[list[Cell]] = [
        [
            found.point,
            found.b,
            found.a,
            found.seed,
            Interval(found.difference.delta, found.difference.low, found.difference.high),
            found.difference.p_value,
        ]
        for found in outline.summary.one_seed
    ]
    columns = [
        Column(name="At"),
        Column(name="Model"),
        Column(name="against"),
        Column(name="Seed"),
        Column(name="AUC difference", unit="95 % interval", format=_GAIN),
        Column(name="p", format="p"),
    ]
    notes = ["Single models on these test rows, rows taken as independent: it says nothing of other seeds."]
    return Table("The best two of each point on one seed, by DeLong's test", columns, rows, "one-seed", notes)


def scaling_table(outline: Outline) -> Table | None:
    """Slopes and where rivals saturate."""
    rows: list[list[Cell]] = []
    for scaling in outline.summary.scaling:
        slope = scaling.slope_over_both
        slope = slope if slope is not None and slope.known else scaling.slope
        level = scaling.saturation
        if level is None:
            reading = "not known"
        elif level == scaling.points[-1]:
            reading = f"gains up to the last ({level})"
        else:
            reading = f"{level}" + ("" if scaling.sure else " (no later gain is shown, nor ruled out)")
        per_doubling = None if slope is None else slope.value * math.log10(2)
        rows.append([whose(scaling), len(scaling.points), estimate_cell(slope), per_doubling, reading])
    if not rows:
        return None
    what = gain_title(outline.summary.metric)
    columns = [
        Column(name="Model"),
        Column(name="Points"),
        Column(name=f"{what} per tenfold FLOPs", unit="95 % interval", format=_GAIN),
        Column(name="per doubling", format=_GAIN),
        Column(name="Saturates at", note="the first point that no dearer one is shown to beat."),
    ]
    return Table("How rivals scale with FLOPs", columns, rows, "scaling")


def steps_table(outline: Outline) -> Table | None:
    """From each point to the next."""
    rows: list[list[Cell]] = [
        [
            Label(whose(scaling), f"{step.start} to {step.end}"),
            estimate_cell(step.gain.estimate),
            "shown" if step.shown else "below the margin" if step.flat else "not shown",
        ]
        for scaling in outline.summary.scaling
        for step in scaling.steps
    ]
    columns = [
        Column(name="Model"),
        Column(name=gain_title(outline.summary.metric), unit="95 % interval", format=_GAIN),
        Column(name="Reading"),
    ]
    notes = [f"Below the margin: the gain is shown to be under {outline.recipe.margin:g}."]
    return Table("What each step up gains", columns, rows, "steps", notes) if rows else None


def front_table(outline: Outline) -> Table | None:
    """Pareto fronts."""
    rows: list[list[Cell]] = [
        [cost_title(front.cost), " → ".join(_cell_name(outline, *member) for member in front.members)]
        for front in outline.summary.fronts
    ]
    if not rows:
        return None
    notes = ["Means of the test metric; a member may lead by chance. The cheapest comes first."]
    return Table(
        f"Pareto fronts: nothing as cheap is as good ({outline.metric})",
        [Column(name="Cost"), Column(name="On the front")],
        rows,
        "pareto",
        notes,
    )


def _cell_name(outline: Outline, rival: str, point: str) -> str:
    standing = outline.summary.standing(rival, point)
    return rival if standing is None else outline.label(standing)


def matched_table(outline: Outline) -> Table | None:
    """Gains at equal measured cost, between two points."""
    rows: list[list[Cell]] = []
    for found in outline.summary.matched:
        estimate = found.over_both if found.over_both.known else found.over_seeds
        rows.append(
            [
                Label(found.rival, f"between {' and '.join(found.between)}"),
                cost_title(found.column),
                number(found.amount, "si"),
                found.at,
                estimate_cell(estimate),
            ]
        )
    columns = [
        Column(name="Model"),
        Column(name="At equal"),
        Column(name="namely"),
        Column(name="which the baseline has at"),
        Column(name=gain_title(outline.summary.metric), unit="95 % interval", format=_GAIN),
    ]
    notes = ["Between a rival's two nearest points, linear in the logarithm of the cost."]
    caption = f"Gain on {outline.recipe.baseline} at equal measured cost"
    return Table(caption, columns, rows, "matched", notes) if rows else None


def ablation_table(outline: Outline, key: str, quoted: Sequence[Quoted]) -> Table:
    """The values of a varied key, with what a paper says of them in columns of their own."""
    rows = [s for s in outline.there if s.key == key]
    return _beside(outline, f"By {key_title(key)}", rows, quoted, f"ablation-{slug(key_title(key))}")


def quoted_table(outline: Outline, quoted: Sequence[Quoted]) -> Table | None:
    """Rivals that a paper has figures of, beside its figures."""
    rows = [s for s in outline.there if s.key is None and any(q.of(s) is not None for q in quoted)]
    return _beside(outline, "Beside the paper's figures", rows, quoted, "quoted") if rows else None


def _beside(
    outline: Outline, caption: str, rows: Sequence[Standing], quoted: Sequence[Quoted], name: str
) -> Table:
    summary = outline.summary
    metric = summary.metric

    def gain(standing: Standing) -> Gain | None:
        return summary.gain(standing.rival, standing.point)

    columns: list[tuple[Column, Callable[[Standing], Cell]]] = [
        (
            Column(name="Variant" if rows and rows[0].key else "Model"),
            lambda s: Label(outline.label(s), "" if s.key is None else s.rival),
        ),
        (Column(name="FLOPs", unit="an example", format="si"), lambda s: s.costs.get("flops")),
        (
            Column(name=f"Test {metric_title(metric)}", unit="measured here", format=".5f"),
            lambda s: s.test[metric].mean if metric in s.test else None,
        ),
        (
            Column(name=gain_title(metric), unit="measured here, 95 % interval", format=_GAIN),
            lambda s: estimate_cell(g.estimate) if (g := gain(s)) else None,
        ),
        (Column(name="Reading"), lambda s: g.verdict if (g := gain(s)) else None),
    ]
    latency = next((cost for cost in reversed(outline.costs()) if cost.startswith("latency@")), "")
    columns += [
        (
            Column(name="Training memory", unit="measured here, bytes", format="si"),
            lambda s: s.costs.get("memory"),
        ),
        (
            Column(
                name=f"ms for {latency.removeprefix('latency@')} rows", unit="measured here", format=".3g"
            ),
            lambda s: s.costs.get(latency),
        ),
    ]
    here = [each for each in quoted if any(each.of(s) is not None for s in rows)]
    for each in here:
        columns.append((Column(name=each.what, unit=f"quoted: {each.source}"), each.of))
    notes = [f"Measured gains are over {outline.baseline}."]
    if here:
        notes.append(
            "Quoted figures are the paper's, over its own baseline on its own data: which way and how fast they "
            "move can be compared, not their size."
        )
    notes += [f"{each.source}: {note}" for each in here for note in each.notes]
    return table_of(caption, rows, columns, name=name, notes=list(dict.fromkeys(notes)))
