"""Latency percentiles against throughput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mldcn.report.axes import finite, house_axes, legend, scale
from mldcn.report.plots import Curve
from mldcn.report.style import colour, dash, drawing, marker, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def latency_curves(series: Sequence[Curve], *, y_label: str, x_label: str) -> Figure:
    """Curves over throughput, latencies on a logarithmic axis.

    Args:
        series: a percentile each: ``steps`` are throughputs, ``values`` latencies above 0.
        y_label: above the vertical axis.
        x_label: below the horizontal one.
    """
    with drawing():
        figure = new_figure(290 + 20 * ((len(series) + 1) // 2))
        axes = house_axes(figure.add_subplot(), y_label)
        axes.set_xlabel(x_label)
        axes.set_yscale("log")
        lines = []
        for curve in series:
            x, y = finite(curve.steps, curve.values)
            style = {
                "color": colour(curve.style),
                "linestyle": dash(curve.style),
                "marker": marker(curve.style),
            }
            lines += axes.plot(x, y, **style)
        ends = [value for curve in series for value in curve.values]
        if ends:
            axes.set_ylim(min(ends) / 1.3, max(ends) * 1.3)
        axes.set_xlim(left=0)
        scale(axes, "x", number_format="tick")
        scale(axes, "y", number_format=".3g", log=True)
        legend(figure, lines, [curve.label for curve in series], columns=2)
    return figure
