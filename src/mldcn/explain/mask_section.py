"""The page's part on masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mldcn.explain.explanation import Explanation
from mldcn.explain.masks import AMPLIFIED, NEAR_ZERO, Direction, MaskSummary
from mldcn.explain.wording import SOURCES
from mldcn.report.blocks import Block, Details, Heading, Paragraph
from mldcn.report.table import Cell, Column, Label, Table
from mldcn.report.text import number

DIRECTIONS = 3  # of the example, amplified and damped, by mask

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


def mask_section(found: Explanation) -> Iterator[Block]:
    """How masks behave, and what they do to one row; nothing where there are none."""
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
        yield _by(sources, "Masks by source of the fields", "masks-sources", weighed, SOURCES)
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
