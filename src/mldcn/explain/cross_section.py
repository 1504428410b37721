"""The page's part on crossed fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mldcn.explain import pictures
from mldcn.explain.crosses import Floats
from mldcn.explain.explanation import TOLERANCES, CrossLayer, Explanation
from mldcn.explain.wording import without_crosses
from mldcn.report.blocks import Block, Details, Figure, Figures, Heading, Paragraph
from mldcn.report.plots import to_svg
from mldcn.report.table import Cell, Column, Label, Table
from mldcn.report.text import slug

PAIRS = 15  # that are listed


def cross_section(found: Explanation) -> Iterator[Block]:
    """The fields that are crossed, and the spectra of the matrices that cross them."""
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
