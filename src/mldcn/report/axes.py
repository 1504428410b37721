"""Axes and legends as all plots of a report have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mldcn.report.style import INK
from mldcn.report.text import number, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[np.float64]]


def house_axes(axes: Any, title: str) -> Any:
    """The house's axes. What the vertical one shows stands above it, where a phone can show it unturned."""
    axes.grid(color=INK, alpha=0.13)
    axes.tick_params(length=3, width=0.8)
    if title:
        axes.set_title(title, loc="left", pad=8)
    return axes


def scale(axes: Any, which: str, *, number_format: str = "", log: bool = False) -> None:
    """Ticks with plain numbers: neither an offset nor a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.6 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=3))
    if number_format:
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(float(value), number_format)))
    else:
        axis.set_major_formatter(ScalarFormatter(useOffset=False))


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], *, columns: int) -> None:
    """Below the plot, the names cut to the room there is."""
    # Given to ``legend`` itself, a name that begins with an underscore would be left out.
    drawn = figure.legend(
        handles,
        ["."] * len(handles),
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
    )
    width = 44 if columns == 1 else 20
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set_text(shorten(name, width))


def finite(*columns: Sequence[float]) -> list[Array]:
    """The columns as arrays, without the rows in which any is not finite."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    keep = np.logical_and.reduce([np.isfinite(array) for array in arrays])
    return [array[keep] for array in arrays]
