"""The plots of a report. Each function gives a matplotlib figure; ``to_svg`` and ``save`` are in ``style``.

A series keeps its colour, line and point style in all plots by its ``style`` number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mldcn.report.axes import Array, finite, house_axes, legend, scale
from mldcn.report.labels import Spot, place_labels
from mldcn.report.style import INK, colour, dash, drawing, marker, new_figure, save, to_svg
from mldcn.report.text import known, number, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "Point",
    "Reliability",
    "against_cost",
    "curves",
    "intervals",
    "reliability",
    "save",
    "to_svg",
]

_NAME = 24  # characters of a name that a plot has room for


@dataclass(frozen=True)
class Curve:
    """A value at some steps of training."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: int = 0


@dataclass(frozen=True)
class Point:
    """A value with the interval around it, if there is one, and what it cost."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    cost: float | None = None
    style: int = 0


@dataclass(frozen=True)
class Reliability:
    """Mean prediction, observed rate and weight (rows) of each bin."""

    label: str
    predicted: Sequence[float]
    observed: Sequence[float]
    weight: Sequence[float]
    style: int = 0


def curves(
    series: Sequence[Curve], *, y_label: str, x_label: str = "training step", best: str = ""
) -> Figure:
    """Learning curves.

    Args:
        series: a curve each; values that are not finite are left out.
        y_label: above the vertical axis.
        x_label: below the horizontal one.
        best: ``max`` or ``min`` marks each curve's best point.
    """
    with drawing():
        wide = any(len(curve.label) > 20 for curve in series)
        rows = 0 if len(series) < 2 else len(series) if wide else (len(series) + 1) // 2
        figure = new_figure(270 + 20 * rows)
        axes = house_axes(figure.add_subplot(), y_label)
        axes.set_xlabel(x_label)
        scale(axes, "x", number_format="tick")
        scale(axes, "y")
        lines = []
        for curve in series:
            x, y = finite(curve.steps, curve.values)
            style: dict[str, Any] = {"color": colour(curve.style), "linestyle": dash(curve.style)}
            lines += axes.plot(x, y, marker=marker(curve.style) if len(x) == 1 else "", **style)
            if best and len(x) > 1:
                at = int(np.argmax(y) if best == "max" else np.argmin(y))
                axes.plot(x[at], y[at], marker(curve.style), color=colour(curve.style), markersize=8)
        _zoom_on_end(axes, series)
        if len(series) > 1:
            legend(figure, lines, [curve.label for curve in series], columns=1 if wide else 2)
    return figure


def intervals(
    points: Sequence[Point], *, x_label: str, attainable: float | None = None, zero: bool = False
) -> Figure:
    """Values with their intervals, the largest at the top.

    Args:
        points: a row each; one whose value is not finite is left out.
        x_label: below the horizontal axis.
        attainable: the value that no model can pass, where it is known: a dashed line.
        zero: whether a line marks 0 (no difference).
    """
    with drawing():
        points = sorted((p for p in points if known(p.value)), key=lambda p: p.value)
        figure = new_figure(86 + 27 * max(len(points), 2))
        axes = house_axes(figure.add_subplot(), "")
        axes.set_xlabel(x_label)
        scale(axes, "x")
        axes.grid(axis="x", color=INK, alpha=0.13)
        axes.grid(visible=False, axis="y")
        if zero:
            axes.axvline(0, color=INK, linewidth=1.1, alpha=0.75)
        for row, point in enumerate(points):
            if known(point.low) and known(point.high):
                axes.plot(
                    [point.low, point.high], [row, row], color=colour(point.style), solid_capstyle="round"
                )
            axes.plot(point.value, row, marker(point.style), color=colour(point.style), markersize=7.5)
        axes.set_yticks(range(len(points)), [shorten(p.label, _NAME) for p in points])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, max(len(points), 2) - 0.4)
        axes.margins(x=0.06)
        if attainable is not None and known(attainable):
            axes.axvline(attainable, color=INK, linestyle=(0, (4, 3)), linewidth=1.3)
            axes.set_title(f"dashed: attainable, {number(attainable, '.4f')}", loc="right")
    return figure


def against_cost(points: Sequence[Point], *, y_label: str, x_label: str) -> Figure:
    """Values against their cost (logarithmic), each point with its name, no name upon another.

    Args:
        points: one each; those without a finite value or a positive cost are left out.
        y_label: above the vertical axis.
        x_label: below the horizontal one.
    """
    with drawing():
        points = [p for p in points if known(p.value) and known(p.cost) and p.cost and p.cost > 0]
        figure = new_figure(270 + 12 * min(len(points), 16))
        axes = house_axes(figure.add_subplot(), y_label)
        axes.set_xlabel(x_label)
        if not points:
            return figure
        costs = [p.cost for p in points if p.cost is not None]
        ends = [end for p in points for end in (p.value, p.low, p.high) if end is not None and known(end)]
        axes.set_xscale("log")
        # Names need room beside the points, also where all models cost the same.
        middle = math.sqrt(min(costs) * max(costs))
        reach = max(2.2, (max(costs) / min(costs)) ** 0.5 * 1.7)
        axes.set_xlim(middle / reach, middle * reach)
        pad = 0.12 * (max(ends) - min(ends)) or 0.01
        axes.set_ylim(min(ends) - pad, max(ends) + pad)
        scale(axes, "x", number_format="tick", log=True)
        scale(axes, "y")
        for point in points:
            if known(point.low) and known(point.high):
                axes.plot(
                    [point.cost] * 2,
                    [point.low, point.high],
                    color=colour(point.style),
                    linewidth=1.4,
                    alpha=0.6,
                )
            axes.plot(point.cost, point.value, marker(point.style), color=colour(point.style), markersize=8)
        spots = [
            Spot(
                p.cost or 0.0,
                p.value,
                p.value if p.low is None else p.low,
                p.value if p.high is None else p.high,
            )
            for p in points
        ]
        place_labels(figure, axes, spots, [shorten(p.label, _NAME) for p in points])
    return figure


def reliability(series: Sequence[Reliability], *, many: int = 3) -> Figure:
    """Observed rate against predicted probability; a point is a bin, its area the bin's weight.

    Axes are logarithmic where the predictions span a factor of 30 or more, as rare clicks do. A bin without
    any positive is then drawn hollow at the bottom.

    Args:
        series: a model each.
        many: above so many models, each gets a small plot of its own.
    """
    with drawing():
        low, high, log = _probability_range(series)
        if len(series) > many:
            return _small_reliability_plots(series, low, high, log=log)
        figure = new_figure(340 + (22 * len(series) if len(series) > 1 else 0))
        axes = _reliability_axes(figure.add_subplot(), "observed rate", low, high, log=log)
        axes.set_xlabel("predicted probability")
        handles = [_draw_bins(axes, model, low, log=log) for model in series]
        if len(series) > 1:
            legend(figure, handles, [model.label for model in series], columns=1)
    return figure


def _small_reliability_plots(series: Sequence[Reliability], low: float, high: float, *, log: bool) -> Figure:
    """Two side by side; laid out by hand, since for many axes matplotlib would take seconds."""
    rows = (len(series) + 1) // 2
    height = 205.0 * rows + 40
    figure = new_figure(height, by_hand=True)
    grid: list[Any] = list(figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True).flat)
    edges = {"left": 0.14, "right": 0.98, "top": 1 - 26 / height, "bottom": 52 / height}
    figure.subplots_adjust(**edges, hspace=0.18, wspace=0.07)
    for axes, model in zip(grid, series, strict=False):
        _reliability_axes(axes, shorten(model.label, 22), low, high, log=log)
        _draw_bins(axes, model, low, log=log)
    for axes in grid[len(series) :]:
        axes.set_visible(False)
    figure.text(0.5, 8 / height, "predicted probability; upwards the observed rate", ha="center")
    return figure


def _draw_bins(axes: Any, model: Reliability, low: float, *, log: bool) -> Any:
    predicted, observed, weight = finite(model.predicted, model.observed, model.weight)
    heaviest = float(weight.max()) if weight.size else 0.0
    area = 12 + 110 * np.clip(weight, 0, None) / heaviest if heaviest > 0 else np.full(weight.size, 30.0)
    none = (observed <= 0) if log else np.zeros(observed.size, dtype=np.bool_)
    some = ~none
    style: dict[str, Any] = {
        "marker": marker(model.style),
        "edgecolors": colour(model.style),
        "clip_on": False,
    }
    axes.plot(predicted[some], observed[some], color=colour(model.style), linewidth=1.2, alpha=0.8)
    axes.scatter(predicted[none], np.full(predicted[none].size, low), area[none], "none", **style)
    return axes.scatter(predicted[some], observed[some], area[some], colour(model.style), **style)


def _zoom_on_end(axes: Any, series: Sequence[Curve]) -> None:
    """Limits that fit what comes after the first quarter of the steps.

    The first evaluations lie so far off that the differences between finished models would not be seen.
    """
    end = max((step for curve in series for step in curve.steps), default=0)
    late = [
        y
        for curve in series
        for x, y in zip(curve.steps, curve.values, strict=True)
        if x >= end / 4 and known(y)
    ]
    if late:
        pad = 0.06 * (max(late) - min(late)) or 0.005
        axes.set_ylim(min(late) - pad, max(late) + pad)


def _reliability_axes(axes: Any, title: str, low: float, high: float, *, log: bool) -> Any:
    house_axes(axes, title)
    axes.plot([low, high], [low, high], color=INK, linestyle=(0, (4, 3)), linewidth=1, alpha=0.7)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    for which in ("x", "y"):
        scale(axes, which, number_format=".3g", log=log)
    return axes


def _probability_range(series: Sequence[Reliability]) -> tuple[float, float, bool]:
    """Common limits of both axes, and whether they are logarithmic."""
    bins = [finite(model.predicted, model.observed) for model in series]
    predicted: Array = np.concatenate([p for p, _ in bins] or [np.zeros(0)])
    observed: Array = np.concatenate([o for _, o in bins] or [np.zeros(0)])
    if not predicted.size:
        return 0.0, 1.0, False
    top = float(max(predicted.max(), observed.max(), 1e-6))
    bottom = float(predicted.min())
    if bottom > 0 and predicted.max() / bottom >= 30:
        positive = np.concatenate([predicted, observed[observed > 0]])
        return float(positive.min()) / 1.4, min(top * 1.4, 1.0), True
    return 0.0, min(top * 1.06, 1.0), False
