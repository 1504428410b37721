"""What a study's report says in words: only what its intervals bear out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mldcn.report.blocks import Callout
from mldcn.report.text import number
from mldcn.study.findings import Gain, Standing
from mldcn.study.outline import Outline, key_title, listed, metric_title
from mldcn.study.tables import gain_title

NOTES = 2  # that are shown at the top; all are in the list below
_DIGITS = "+.5f"


def finding(outline: Outline) -> Callout:
    """The study in a few sentences: who is first, by how much, how sure that is, what it could have seen."""
    if not outline.there:
        return Callout(
            "No final run is finished yet",
            "There is nothing to compare; the same command goes on with the study.",
            "warning",
        )
    sentences = list(_varied(outline)) if outline.recipe.vary else list(_rivals(outline))
    power = next((p for p in outline.summary.power if p.metric == outline.summary.metric), None)
    if power is not None:
        sentences.append(outline.metric + power.sentence.removeprefix(power.metric))
    return Callout(_title(outline), " ".join(sentences))


def unfinished(outline: Outline) -> Callout | None:
    """What is missing, if anything is."""
    notes = outline.summary.notes
    if not notes:
        return None
    left = sum(len(standing.missing) for standing in outline.summary.standings)
    title = f"{left} final run{'s' * (left > 1)} still to come" if left else "Mind"
    text = " ".join(notes[:NOTES])
    if len(notes) > NOTES:
        text += f" {len(notes) - NOTES} more notes are under “How to read this”."
    return Callout(title, text, "warning")


def reading(outline: Outline) -> list[str]:
    """How to read the tables."""
    summary = outline.summary
    lines = [
        f"Gains are over {outline.baseline}, of runs with the same seed. {gain_title(summary.metric)}: above 0 is "
        "better.",
        "“Better” and “worse” are shown at the 5 % level after Holm's correction for all gains on the baseline. "
        f"“No worse” means that the interval rules out a loss of {summary.margin:g} or more; “no difference "
        "shown” that this study cannot tell the two apart, not that they are equal.",
        "The first was picked by its number, which flatters it a little: of equal rivals one is always first.",
    ]
    if summary.unit is not None:
        lines.append(
            f"Intervals hold two kinds of chance: other seeds, and other {summary.unit}s in the test rows (drawn "
            f"again {summary.draws:,} times with all their rows)."
        )
    if outline.recipe.match == "flops" and outline.recipe.budgets:
        lines.append(
            "A budget is of the GEMM FLOPs of one example behind the embeddings (two a multiply-add; look-ups "
            "cost none). Every rival's widths were turned until the whole model costs that much."
        )
    return lines


def _title(outline: Outline) -> str:
    metric = f"test {outline.metric}"
    if outline.recipe.vary:
        return f"{outline.recipe.varied_rival()}: {listed([key_title(key) for key in outline.recipe.vary])} varied"
    leaders = {point: here[0].rival for point in outline.points if (here := outline.at(point))}
    if not leaders:
        return f"No {metric} is known"
    counts = {rival: list(leaders.values()).count(rival) for rival in leaders.values()}
    first = max(counts, key=lambda rival: counts[rival])
    where = "" if len(leaders) == 1 and not outline.recipe.budgets else f" at {next(iter(leaders))}"
    if outline.settings and outline.main_point in leaders:
        first, where = leaders[outline.main_point], f" at {outline.main_point}"
    elif len(leaders) > 1:
        share = "all" if counts[first] == len(leaders) else f"{counts[first]} of"
        where = f" at {share} {len(leaders)} budgets"
    so_far = " so far" if any(standing.missing for standing in outline.summary.standings) else ""
    return f"{first} has the best {metric}{where}{so_far}"


def _rivals(outline: Outline) -> Iterator[str]:
    """The leader at the dearest point against the baseline and the next, then where leads are shown at all."""
    main = outline.main_point
    if main is None:
        return
    here = outline.at(main)
    first = here[0]
    gain = outline.summary.gain(first.rival, first.point)
    where = f"At {main}, " if outline.recipe.budgets else ""
    if gain is not None:
        end = f": {gain.verdict}" if gain.estimate.known else ""
        yield f"{where}{first.rival} gains {_span(gain)} on {outline.baseline}{end}."
        where = ""
    lead = pair(outline, first.rival, here[1].rival, main) if len(here) > 1 else None
    if lead is not None:
        end = "shown" if lead.verdict == "better" else "not shown after Holm's correction"
        who = first.rival if gain is None else "It"
        end = f": {end}" if lead.estimate.known else ""
        yield f"{where}{who} leads the next, {here[1].rival}, by {_span(lead)}{end}."
    yield from _leads(outline, [point for point in outline.points if outline.at(point)])


def _leads(outline: Outline, points: Sequence[str]) -> Iterator[str]:
    """Where the first is shown to beat all others, and where it is not told apart from some."""
    ahead, tied = [], []
    for point in points:
        here = outline.at(point)
        leads = [pair(outline, here[0].rival, s.rival, point) for s in here[1:]]
        if not leads or any(lead is None or not lead.estimate.known for lead in leads):
            continue
        near = [s.rival for s, lead in zip(here[1:], leads, strict=True) if lead and lead.verdict != "better"]
        if near:
            whom = listed(near) if len(near) <= 2 else f"{len(near)} of {len(leads)} others"
            tied.append(f"from {whom}" + (f" at {point}" if outline.recipe.budgets else ""))
        else:
            ahead.append(point)
    if ahead:
        where = f" at {listed(ahead)}" if outline.recipe.budgets else ""
        yield f"The first is shown to beat all others{where}."
    if tied:
        yield f"The first is not told apart {listed(tied)}."


def _varied(outline: Outline) -> Iterator[str]:
    """For each varied key, from its first value to its last."""
    for key in outline.recipe.vary:
        own = [s for s in outline.there if s.key == key]
        gains = [(s, outline.summary.gain(s.rival, s.point)) for s in own]
        found = [(s, gain) for s, gain in gains if gain is not None]
        if not found:
            continue
        best, top = max(found, key=lambda each: each[1].estimate.value)
        yield f"{best.point} is the best of {len(found)}: {_span(top)} on {outline.baseline} ({top.verdict})."
        yield from _way(outline, key, [s for s, _ in found])


def _way(outline: Outline, key: str, own: Sequence[Standing]) -> Iterator[str]:
    scaling = next((s for s in outline.summary.scaling if s.key == key), None)
    if scaling is None or scaling.saturation is None:
        return
    if scaling.saturation == scaling.points[-1]:
        yield f"It gains up to the last value, {own[-1].point}."
    else:
        yield f"Behind {scaling.saturation} no further gain is shown" + (
            f", and one of {outline.recipe.margin:g} by the next value is ruled out." if scaling.sure else "."
        )


def pair(outline: Outline, b: str, a: str, point: str) -> Gain | None:
    """What rival ``b`` gains on rival ``a`` at a point, whichever way round it is among the pairs."""
    for found in outline.summary.pairs:
        if found.metric != outline.summary.metric or found.point != point:
            continue
        if (found.a[0], found.b[0]) == (a, b):
            return found
        if (found.a[0], found.b[0]) == (b, a):
            return _turned(found)
    return None


def _turned(gain: Gain) -> Gain:
    flipped = {"better": "worse", "worse": "better"}
    over_seeds, over_both = (
        replace(
            estimate,
            value=-estimate.value,
            low=None if estimate.high is None else -estimate.high,
            high=None if estimate.low is None else -estimate.low,
        )
        for estimate in (gain.over_seeds, gain.over_both)
    )
    by_seed = tuple(-value for value in gain.by_seed)
    verdict = flipped.get(gain.verdict, gain.verdict)
    return Gain(gain.metric, gain.b, gain.a, gain.seeds, by_seed, over_seeds, over_both, gain.p_holm, verdict)  # type: ignore[arg-type]


def _span(gain: Gain) -> str:
    estimate = gain.estimate
    text = f"{number(estimate.value, _DIGITS)} {metric_title(gain.metric)}"
    if not estimate.known:
        return f"{text} (no interval)"
    return f"{text} (95 % interval {number(estimate.low, _DIGITS)} to {number(estimate.high, _DIGITS)})"
