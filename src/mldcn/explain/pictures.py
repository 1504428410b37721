"""The pictures of an explanation: a heat map of blocks, and the decay of singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mldcn.report.axes import house_axes, legend, scale
from mldcn.report.style import PALETTE, WIDTH, colour, dash, drawing, new_figure
from mldcn.report.text import number, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
FIELDS = 20  # that a heat map has room for
_NAME = 18
_LEFT, _RIGHT, _ABOVE, _BELOW = 122.0, 38.0, 108.0, 58.0  # around a heat map, in a figure's units


def heat_map(values: Floats, rows: Sequence[str], columns: Sequence[str], *, label: str) -> Figure:
    """A square of cells, the darker the larger: the house's blue, more or less of it, on any background.

    Args:
        values: ``(n, n)``, not negative.
        rows: names of the rows.
        columns: names of the columns.
        label: what a cell's colour means, below the scale.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    blue = to_rgb(PALETTE[0])
    shades = LinearSegmentedColormap.from_list("house", [(*blue, 0.0), (*blue, 1.0)])
    side = WIDTH - _LEFT - _RIGHT
    height = side + _ABOVE + _BELOW
    top = float(values.max()) if values.size and values.max() > 0 else 1.0
    with drawing():
        figure = new_figure(height, by_hand=True)
        axes = figure.add_axes((_LEFT / WIDTH, _BELOW / height, side / WIDTH, side / height))
        axes.pcolormesh(values, cmap=shades, vmin=0, vmax=top, linewidth=0, antialiased=False)
        axes.set_ylim(len(rows), 0)
        axes.xaxis.tick_top()
        size = 12.0 if len(rows) <= 12 else 10.5
        middles = np.arange(len(rows)) + 0.5
        axes.set_xticks(middles, [shorten(name, _NAME) for name in columns], rotation=60, fontsize=size)
        for tick in axes.get_xticklabels():
            tick.set(horizontalalignment="left", rotation_mode="anchor")
        axes.set_yticks(middles, [shorten(name, _NAME) for name in rows], fontsize=size)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(True)
        bar = figure.add_axes((_LEFT / WIDTH, 38 / height, side / WIDTH, 9 / height))
        steps = np.linspace(0, top, 33)[None]
        bar.pcolormesh(steps, cmap=shades, vmin=0, vmax=top, linewidth=0, antialiased=False)
        bar.set_yticks([])
        bar.set_xticks([0, 16.5, 33], ["0", number(top / 2, ".3g"), number(top, ".3g")], fontsize=10.5)
        bar.tick_params(length=0)
        bar.set_xlabel(label, fontsize=11.5, labelpad=1)
    return figure


def decay(learned: Sequence[tuple[str, Floats]], initial: Sequence[tuple[str, Floats]]) -> Figure:
    """Singular values over the largest of their matrix, one line a layer; dotted where training began.

    Args:
        learned: a layer's name and its singular values.
        initial: the same of its initial weights.
    """
    with drawing():
        rows = (len(learned) + 2) // 2
        figure = new_figure(280 + 20 * rows)
        axes = house_axes(figure.add_subplot(), "singular value / largest")
        axes.set_xlabel("number of the singular value")
        lines = []
        for i, ((_, values), (_, before)) in enumerate(zip(learned, initial, strict=True)):
            for which, style in ((before, (0, (1.2, 1.8))), (values, "-")):
                shown = which / which[0] if len(which) and which[0] > 0 else which
                width = 1.3 if which is before else 2.0
                drawn = axes.plot(
                    np.arange(1, len(shown) + 1), shown, color=colour(i), linestyle=style, linewidth=width
                )
            lines += drawn
        axes.set_ylim(0, 1.03)
        scale(axes, "x", number_format="tick")
        scale(axes, "y")
        dotted = axes.plot([], [], color=colour(0), linestyle=dash(2), linewidth=1.3)
        names = [name for name, _ in learned]
        legend(figure, [*lines, *dotted], [*names, "initial weights"], columns=2)
    return figure
