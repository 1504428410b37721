"""Plots of how a value moves with another, and of what makes up a sum. As in ``plots``, each gives a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mldcn.report.axes import house_axes, legend, scale
from mldcn.report.style import INK, colour, dash, drawing, marker, new_figure
from mldcn.report.text import known, number, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_APART = 5.0  # units between points that are drawn side by side
_FLAT = 2.5  # a range below this ratio gains nothing from a logarithmic axis


@dataclass(frozen=True)
class Mark:
    """A point of a trend; low and high are the ends of its error bar."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Trend:
    """A value along an axis."""

    label: str
    marks: Sequence[Mark]
    style: int = 0


@dataclass(frozen=True)
class Stack:
    """Amounts that make up a sum."""

    label: str
    parts: Sequence[float]


def trends(
    series: Sequence[Trend],
    *,
    y_label: str,
    x_label: str,
    log: bool = True,
    apart: bool = False,
    names: Sequence[str] = (),
    ticks: Sequence[float] = (),
    signed: bool = True,
) -> Figure:
    """Lines with error bars.

    Args:
        series: a line each; marks that are not finite (or, on a logarithmic axis, not positive) are left out.
        y_label: above the vertical axis.
        x_label: below the horizontal one.
        log: of the horizontal axis, where its range is wide enough.
        apart: whether marks at one place are drawn side by side, so that their error bars can be told apart.
        names: of the places 0, 1, ... where the horizontal axis is of names.
        ticks: of the horizontal axis, where round numbers say less than these; it shows them all.
        signed: whether values are gains: a line marks 0, and numbers have their sign.
    """
    with drawing():
        shown = [(trend, [m for m in trend.marks if _drawn(m, log=log)]) for trend in series]
        xs = [mark.x for _, marks in shown for mark in marks]
        log = log and bool(xs) and max(xs) / min(xs) >= _FLAT
        rows = 0 if len(series) < 2 else (len(series) + 1) // 2
        figure = new_figure(290 + 20 * rows)
        axes = house_axes(figure.add_subplot(), y_label)
        axes.set_xlabel(x_label)
        if not xs:
            return figure
        _limits(axes, [*xs, *ticks], log=log)
        if signed:
            axes.axhline(0, color=INK, linewidth=1.1, alpha=0.75)
        handles = []
        for i, (trend, marks) in enumerate(shown):
            shift = _APART * (i - (len(series) - 1) / 2) if apart else 0.0
            handles.append(_draw(axes, trend, marks, shift))
        axes.margins(y=0.08)
        if names:
            axes.set_xticks(range(len(names)), [shorten(name, 60 // len(names) + 4) for name in names])
        elif ticks:
            axes.set_xticks(ticks, [number(float(tick), "tick") for tick in ticks])
            axes.minorticks_off()
        else:
            scale(axes, "x", number_format="tick", log=log)
        scale(axes, "y", number_format="signed" if signed else ".4g")
        if len(series) > 1:
            legend(figure, handles, [trend.label for trend in series], columns=2)
    return figure


def stacks(rows: Sequence[Stack], *, parts: Sequence[str], x_label: str) -> Figure:
    """Bars of parts one after another, the sum beside each.

    Args:
        rows: a bar each, the first at the top.
        parts: names of the parts.
        x_label: below the horizontal axis.
    """
    with drawing():
        figure = new_figure(96 + 26 * max(len(rows), 2) + 20 * ((len(parts) + 1) // 2))
        axes = house_axes(figure.add_subplot(), "")
        axes.set_xlabel(x_label)
        axes.grid(visible=False, axis="y")
        places = [len(rows) - 1 - i for i in range(len(rows))]
        sums = [0.0] * len(rows)
        handles = []
        for k in range(len(parts)):
            widths = [float(row.parts[k]) for row in rows]
            handles.append(axes.barh(places, widths, 0.66, sums, color=colour(k)))
            sums = [total + width for total, width in zip(sums, widths, strict=True)]
        axes.set_xlim(0, (max(sums, default=0.0) or 1.0) * 1.17)
        for place, total in zip(places, sums, strict=True):
            axes.annotate(
                number(total, "tick"), (total, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(places, [shorten(row.label, 24) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, max(len(rows), 2) - 0.4)
        scale(axes, "x", number_format="tick")
        if len(parts) > 1:
            legend(figure, handles, parts, columns=2)
    return figure


def _drawn(mark: Mark, *, log: bool) -> bool:
    return known(mark.x) and known(mark.y) and (mark.x > 0 or not log)


def _limits(axes: Any, xs: Sequence[float], *, log: bool) -> None:
    low, high = min(xs), max(xs)
    if log:
        axes.set_xscale("log")
        pad = (high / low) ** 0.09
        axes.set_xlim(low / pad, high * pad)
    else:
        pad = 0.09 * (high - low) or 0.5 * abs(high) or 1.0
        axes.set_xlim(low - pad, high + pad)


def _draw(axes: Any, trend: Trend, marks: Sequence[Mark], shift: float) -> Any:
    """The line, its points and their error bars, ``shift`` units to the right of where they are."""
    from matplotlib.transforms import ScaledTranslation

    moved = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    shade = colour(trend.style)
    marks = sorted(marks, key=lambda mark: mark.x)
    for mark in marks:
        if mark.low is not None and mark.high is not None and math.isfinite(mark.high - mark.low):
            ends = [mark.low, mark.high]
            axes.plot([mark.x] * 2, ends, color=shade, linewidth=1.5, alpha=0.65, transform=moved)
    (line,) = axes.plot(
        [mark.x for mark in marks],
        [mark.y for mark in marks],
        color=shade,
        linestyle=dash(trend.style),
        marker=marker(trend.style),
        linewidth=1.7,
        transform=moved,
    )
    # Lines with a transform of their own do not widen the axes' limits by themselves.
    for mark in marks:
        ends = [end for end in (mark.y, mark.low, mark.high) if end is not None and known(end)]
        axes.update_datalim([(mark.x, end) for end in ends])
    axes.autoscale_view(scalex=False)
    return line
