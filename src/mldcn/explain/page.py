"""The page of an explanation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from mldcn.explain import pictures
from mldcn.explain.crosses import Floats
from mldcn.explain.explanation import TOLERANCES, CrossLayer, Explanation
from mldcn.explain.importance import Importance
from mldcn.explain.masks import AMPLIFIED, NEAR_ZERO, Direction, MaskSummary
from mldcn.report.blocks import (
    Block,
    Bullets,
    Callout,
    Details,
    Figure,
    Figures,
    Heading,
    Paragraph,
)
from mldcn.report.page import Page
from mldcn.report.plots import Point, intervals, to_svg
from mldcn.report.table import Cell, Column, Interval, Label, Table
from mldcn.report.text import number, slug

PAIRS = 15  # that are listed
DIRECTIONS = 3  # of the example, amplified and damped, by mask
_SOURCES = {"user": "user", "item": "item", "user_item": "user and item", "context": "context"}
_NAMES = {"auc": "AUC", "logloss": "log loss"}


def explanation_page(found: Explanation, footer: str = "") -> Page:
    """The page that shows an explanation: importance, crossed fields, spectra, masks."""
    title = f"What {found.run} learned"
    page = Page(title, subtitle=f"{found.title}; {_rows(found)}", footer=footer)
    page.add(Callout("In short", " ".join(findings(found))))
    page.add(*_importance(found), *_crosses(found), *_masks(found))
    page.add(Heading("How to read this"), Bullets(list(_reading(found))))
    return page


def findings(found: Explanation) -> list[str]:
    """The main points in sentences."""
    task = next(iter(found.metrics))
    ranked = found.ranked(task)
    shown = [i for i in ranked if i.low > 0]
    sentences = []
    if shown:
        first = ", ".join(f"{i.feature} ({number(-i.drop, '+.4f')})" for i in shown[:3])
        sentences.append(f"Permuting a feature costs the AUC of {task} most with {first}.")
    none = len(ranked) - len(shown)
    if none:
        sentences.append(f"Of {none} of {len(ranked)} features no importance is shown.")
    if found.crosses:
        layer = found.crosses[0]
        pairs = ", ".join(f"{a} × {b}" for a, b, norm in found.pairs(layer)[:3] if norm > 0)
        if pairs:
            sentences.append(f"The largest weights of {layer.name} cross {pairs}.")
        loud = ", ".join(f"{a} × {b}" for a, b, size in found.loudest(layer)[:3] if size > 0)
        if loud:
            sentences.append(f"On these rows its largest crosses are those of {loud}.")
    else:
        sentences.append(without_crosses(found))
    if found.masks:
        first_mask = found.masks[0]
        whole = first_mask.whole
        sentences.append(
            f"The mask of {first_mask.name} has mean {number(whole.mean, '.2f')} and moves by "
            f"{number(whole.over_examples, '.2f')} from example to example."
        )
    return sentences


def without_crosses(found: Explanation) -> str:
    """Why there is no heat map."""
    return (
        f"{found.title} has no matrix that crosses fields of x0 with fields of its layers' input, so there "
        "is no heat map of pairs and no spectrum; the importance of features does not need one."
    )


def _rows(found: Explanation) -> str:
    part = "all" if found.rows == found.total else f"{found.rows:,} of"
    return f"looked at with {part} {found.total:,} rows: {found.where}"


def _importance(found: Explanation) -> Iterator[Block]:
    yield Heading("Features by what is lost without them")
    yield Paragraph(
        f"A feature's encoded values were permuted among the rows, {found.repeats} times, with everything "
        "else as it is. The more the model loses, the more it lives on the feature."
    )
    first, *others = found.metrics
    yield Figures([_importance_figure(found, first)])
    table = importance_table(found, first, found.ranked(first), found.importances, "features")
    yield Details(f"All features on {first}, AUC and log loss", [table]) if others else table
    if others:
        shown: list[Block] = [Figures([_importance_figure(found, task) for task in others])]
        shown += [
            importance_table(found, task, found.ranked(task), found.importances, "features")
            for task in others
        ]
        yield Details(f"The other tasks: {', '.join(others)}", shown)
    if found.groups:
        ranked = [i for i in found.groups if (i.task, i.metric) == (first, "auc")]
        ranked.sort(key=lambda i: -i.drop)
        yield importance_table(found, first, ranked, found.groups, "sources")


def _importance_figure(found: Explanation, task: str) -> Figure:
    ranked = found.ranked(task)
    shown = ranked[: pictures.FIELDS]
    on = f" on {task}" if len(found.metrics) > 1 else ""
    cut = f" The {len(shown)} most important of {len(ranked)} features." if len(shown) < len(ranked) else ""
    auc = number(found.metrics[task]["auc"], ".4f")
    drawn = intervals([Point(i.feature, i.drop, i.low, i.high) for i in shown], x_label=f"AUC lost{on}")
    return Figure(
        f"importance-{slug(task)}",
        to_svg(drawn),
        f"AUC lost{on} when a feature is permuted",
        f"AUC lost{on} by feature, with intervals",
        f"Bars are 95% intervals; as the rows are, the AUC is {auc}.{cut}",
    )


def importance_table(
    found: Explanation,
    task: str,
    ranked: Sequence[Importance],
    of: Sequence[Importance],
    name: Literal["features", "sources"],
) -> Table:
    """A task's importances as a table.

    Args:
        found: what was found.
        task: the task.
        ranked: a row each.
        of: all importances, those of the log loss too.
        name: whether they are of features, or of all features of a source together.
    """
    on = f" on {task}" if len(found.metrics) > 1 else ""
    what = "Features permuted" if name == "features" else "All features of a source permuted together"
    losses = {i.feature: i for i in of if (i.task, i.metric) == (task, "logloss")}
    source = dict(zip(found.fields, found.sources, strict=True))
    rows: list[list[Cell]] = []
    for i in ranked:
        loss = losses[i.feature]
        own = source.get(i.feature) if name == "features" else None
        label = i.feature if name == "features" else _SOURCES.get(i.feature, i.feature)
        rows.append(
            [
                Label(label, _SOURCES.get(own or "", "")),
                Interval(i.drop, i.low, i.high),
                Interval(loss.drop, loss.low, loss.high),
                "yes" if i.low > 0 else "no",
            ]
        )
    columns = [
        Column(name="Feature" if name == "features" else "Source"),
        Column(name="AUC lost", unit="95% interval", format="+.5f"),
        Column(name="Log loss gained", unit="95% interval", format="+.5f"),
        Column(name="Shown", note="whether the interval of the AUC lies above 0."),
    ]
    return Table(f"{what}{on}", columns, rows, name=f"importance-{slug(task)}-{name}")


def _crosses(found: Explanation) -> Iterator[Block]:
    yield Heading("Which fields are crossed")
    if not found.crosses:
        yield Paragraph(without_crosses(found))
        return
    first, *others = found.crosses
    yield Paragraph(
        f"A cross layer computes x0 ⊙ (W x). The block of W in a field's row and another field's column "
        f"scales their products; its Frobenius norm says how strongly (DCN V2, Figure 6). Here W is "
        f"{first.formula}."
    )
    yield Figures(list(_maps(found, first, whole=True)))
    yield pairs_table(found, first)
    for layer in others:
        blocks: list[Block] = [Figures(list(_maps(found, layer))), pairs_table(found, layer)]
        yield Details(f"{layer.name[0].upper()}{layer.name[1:]}", blocks)
    yield Heading("How many directions the crosses need")
    yield Figures([_decay(found, found.crosses[:6])])
    yield _spectra(found)


def _maps(found: Explanation, layer: CrossLayer, *, whole: bool = False) -> Iterator[Figure]:
    """The heat map of a layer's blocks; of the ``whole`` layer also what training moved, and what they come to."""
    strength = np.hypot(layer.norms, layer.norms.T).max(axis=1)
    chosen = np.sort(np.argsort(-strength, kind="stable")[: pictures.FIELDS])
    names = [found.fields[i] for i in chosen]
    few = (
        f" The {len(chosen)} of {len(found.fields)} fields with the strongest blocks; explain.json has all."
        if len(chosen) < len(found.fields)
        else ""
    )

    def drawn(values: Floats, label: str) -> str:
        return to_svg(pictures.heat_map(values[np.ix_(chosen, chosen)], names, names, label=label))

    yield Figure(
        f"blocks-{slug(layer.name)}",
        drawn(layer.norms, "Frobenius norm of the block"),
        f"Block norms of {layer.formula}, {layer.name}",
        f"heat map of block norms by pair of fields, {layer.name}",
        f"Rows: fields of x0; columns: fields of the layer's input. The diagonal is a field with "
        f"itself.{few}",
    )
    if whole and layer.changed is not None:
        yield Figure(
            f"moved-{slug(layer.name)}",
            drawn(layer.changed, "Frobenius norm of the block's change"),
            f"What training changed, {layer.name}",
            f"heat map of the change of the blocks, {layer.name}",
            "Blocks of the learned weights less the initial ones: what was drawn at random is taken out.",
        )
    if whole and layer.signal is not None:
        yield Figure(
            f"signal-{slug(layer.name)}",
            drawn(layer.signal, "root mean square over rows"),
            f"What the crosses come to, {layer.name}",
            f"heat map of the size of the crosses on rows, {layer.name}",
            "The size of x0_i ⊙ (W_ij x0_j) on rows of the log: a large block does little where its fields' "
            "vectors are short.",
        )


def pairs_table(found: Explanation, layer: CrossLayer) -> Table:
    """The strongest pairs of fields of a layer."""
    names, widths = list(found.fields), dict(zip(found.fields, found.widths, strict=True))
    rows: list[list[Cell]] = []
    for a, b, norm in found.pairs(layer)[:PAIRS]:
        i, j = names.index(a), names.index(b)
        mean = norm / float(np.sqrt(2 * widths[a] * widths[b]))
        cells: list[Cell] = [f"{a} × {b}", norm, mean]
        if layer.changed is not None:
            cells.append(float(np.hypot(layer.changed[i, j], layer.changed[j, i])))
        if layer.signal is not None:
            cells.append(float(np.hypot(layer.signal[i, j], layer.signal[j, i])))
        rows.append(cells)
    columns = [
        Column(name="Pair"),
        Column(name="Norm", format=".3f", note="of both blocks that cross the two fields, W_ij and W_ji."),
        Column(
            name="Per weight", format=".4f", note="root mean square weight: wide fields have larger blocks."
        ),
    ]
    if layer.changed is not None:
        columns.append(
            Column(
                name="Moved",
                format=".3f",
                note="norm of what training changed in the blocks: without it a strong block is a large draw.",
            )
        )
    if layer.signal is not None:
        columns.append(
            Column(name="On rows", format=".3g", note="the size of their crosses on rows of the log.")
        )
    total = len(names) * (len(names) - 1) // 2
    return Table(
        f"Strongest of {total:,} pairs, {layer.name}", columns, rows, name=f"pairs-{slug(layer.name)}"
    )


def _decay(found: Explanation, layers: Sequence[CrossLayer]) -> Figure:
    drawn = pictures.decay(
        [(layer.name, layer.learned.values) for layer in layers],
        [(layer.name, layer.initial.values) for layer in layers],
    )
    return Figure(
        "singular-values",
        to_svg(drawn),
        "Decay of the singular values",
        "singular values over the largest, by layer, learned and initial",
        "A line that falls faster than its dotted one has learned to use fewer directions than it was given "
        "(DCN V2, Figure 3)." + _start(found),
    )


def _start(found: Explanation) -> str:
    if not found.warm:
        return ""
    return " This run began with another run's weights; shown as initial are those that its seed would have drawn."


def _spectra(found: Explanation) -> Table:
    rows: list[list[Cell]] = []
    for layer in found.crosses:
        cells: list[Cell] = [Label(layer.name, layer.formula), layer.width, len(layer.learned.values)]
        for t in TOLERANCES:
            cells += [layer.learned.ranks[t], layer.initial.ranks[t]]
        largest = float(layer.learned.values[0]) if len(layer.learned.values) else 0.0
        rows.append([*cells, largest, layer.gain])
    columns = [
        Column(name="Layer"),
        Column(name="Width", note="rows and columns of the matrix."),
        Column(name="Rank bound", note="singular values that its factors leave room for."),
    ]
    for t in TOLERANCES:
        columns += [
            Column(name=f"Rank at {t:g}", note=f"singular values of at least {t:g} times the largest."),
            Column(name=f"Rank at {t:g}, initial"),
        ]
    columns += [
        Column(name="Largest", format=".3g", note="the largest singular value."),
        Column(
            name="Norm's gain",
            format=".3g",
            note="root mean square of the gain that the norm behind the crosses gives them; near 0 the layer adds "
            "little, whatever its matrix.",
        ),
    ]
    if not any(layer.gain is not None for layer in found.crosses):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    note = (
        "The numerical rank counts the singular values of at least T times the largest; DCN V2 (Section 3.5) "
        "numbers the first one below: one more." + _start(found)
    )
    return Table("Numerical rank, learned and initial", columns, rows, name="spectra", notes=[note])


_MASK_COLUMNS = (
    Column(name="Mean", format=".3f"),
    Column(name="Spread", format=".3f", note="standard deviation over examples and directions."),
    Column(
        name="Over examples",
        format=".3f",
        note="how far a direction's number moves from example to example: 0 where all examples get the same mask.",
    ),
    Column(name="Over directions", format=".3f", note="how far the directions' means lie apart."),
    Column(name="Near zero", format=".1%", note=f"numbers between -{NEAR_ZERO:g} and {NEAR_ZERO:g}."),
    Column(name="Amplified", format=".1%", note=f"numbers above {AMPLIFIED:g}."),
    Column(name="Negative", format=".1%"),
)


def _masks(found: Explanation) -> Iterator[Block]:
    if not found.masks:
        return
    yield Heading("What the masks do")
    rows: list[list[Cell]] = [
        [Label(mask.name, f"{mask.directions:,} directions"), *_cells(mask.whole)] for mask in found.masks
    ]
    yield Table(
        "Masks, over all examples and directions", [Column(name="Mask"), *_MASK_COLUMNS], rows, name="masks"
    )
    sources = [(mask.name, mask.by_source) for mask in found.masks if mask.by_source]
    if sources:
        weighed = (
            "A direction counts for a field by the field's share in what it reads: of its squared weights "
            "where it mixes columns. In layers behind the first, a field's columns hold its crosses too."
        )
        yield _by(sources, "Masks by source of the fields", "masks-sources", weighed, _SOURCES)
        fields = [(mask.name, mask.by_field) for mask in found.masks if mask.by_field]
        yield Details("Masks by field", [_by(fields, "Masks by field", "masks-fields", weighed, {})])
    hidden = [mask.name for mask in found.masks if not mask.of_fields]
    if hidden:
        yield Paragraph(f"What {', '.join(hidden)} mask are hidden units, which belong to no field.")
    yield from _example(found)


def _cells(summary: MaskSummary) -> list[Cell]:
    return [
        summary.mean,
        summary.spread,
        summary.over_examples,
        summary.over_directions,
        summary.near_zero,
        summary.amplified,
        summary.negative,
    ]


def _by(
    groups: Sequence[tuple[str, Mapping[str, MaskSummary]]],
    caption: str,
    name: str,
    note: str,
    named: Mapping[str, str],
) -> Table:
    rows: list[list[Cell]] = [
        [Label(named.get(key, key), mask), *_cells(summary)]
        for mask, of in groups
        for key, summary in of.items()
    ]
    return Table(caption, [Column(name="Group"), *_MASK_COLUMNS], rows, name=name, notes=[note])


def _example(found: Explanation) -> Iterator[Block]:
    yield Heading(f"The masks of row {found.row:,}", 3)
    told = [
        f"{task} {'unknown' if found.labels[task] is None else number(found.labels[task], '.0f')}, "
        f"predicted {number(score, '.4f')}"
        for task, score in found.scores.items()
    ]
    yield Paragraph(
        f"Label and prediction: {'; '.join(told)}. Of each mask, the directions that lie furthest above and "
        "below their own mean. Another row is named with --row."
    )
    rows: list[list[Cell]] = []
    for masked in found.example:
        both = [("amplified", masked.amplified(DIRECTIONS)), ("damped", masked.damped(DIRECTIONS))]
        for what, directions in both:
            rows += [
                [
                    Label(f"{masked.name}, direction {d.number + 1}", what),
                    d.mask,
                    d.mean,
                    d.value,
                    _fields(d),
                ]
                for d in directions
            ]
    if not rows:
        yield Paragraph("The masks are the same for all rows.")
        return
    columns = [
        Column(name="Direction"),
        Column(name="Mask here", format=".3f"),
        Column(name="Mean", format=".3f", note="of the direction's mask over the rows."),
        Column(name="Value", format="+.3g", note="of the direction in this row, before the mask."),
        Column(
            name="Comes from",
            note="the fields' shares in the absolute values that they add to the direction in this row.",
        ),
    ]
    yield Table(f"Masked directions of row {found.row:,}", columns, rows, name="example")


def _fields(direction: Direction) -> str:
    if not direction.fields:
        return "hidden unit"
    if len(direction.fields) == 1:
        return direction.fields[0][0]
    return ", ".join(f"{name} {share:.0%}" for name, share in direction.fields[:4])


def _reading(found: Explanation) -> Iterator[str]:
    units = {"user": "by user", "request": "by request", "row": "taking rows as independent"}[found.unit]
    yield (
        f"Intervals are 95%, {units}, and allow for the chance of the {found.repeats} permutations. They "
        "hold for one feature at a time: of many features without any importance, about one in forty lies "
        "above 0 by chance."
    )
    yield (
        "What two features tell alike is lost with neither: each can look unimportant because the other is "
        "still there. Permuting all features of a source together shows what they hold in common."
    )
    yield (
        "A permuted row can be one that never occurs, such as a user with another user's history. Importance "
        "says what this model lives on, not what a model without the feature would reach."
    )
    if found.crosses:
        yield (
            "Only the first layer reads the fields themselves. What later layers read holds the crosses of "
            "the layers before them in the same columns."
        )
        yield "A block's norm is of weights: whether a strong block helps is for a model without it to show."
