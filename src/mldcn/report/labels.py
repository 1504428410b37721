"""Names beside the points of a plot, none upon another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mldcn.report.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[np.float64]]

_RADII = (9.0, 15.0, 23.0, 33.0, 45.0, 60.0, 80.0, 105.0, 135.0)
_ANGLES = 16
_PASSES = 4  # each name is placed again, knowing where the others are
_MARGIN = 2.0


@dataclass(frozen=True)
class Box:
    """A rectangle in the figure's units."""

    left: float
    bottom: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        along = min(self.bottom + self.height, other.bottom + other.height) - max(self.bottom, other.bottom)
        return max(across, 0.0) * max(along, 0.0)


@dataclass(frozen=True)
class Spot:
    """A point with the ends of its vertical error bar, in the axes' data."""

    x: float
    y: float
    low: float
    high: float


def place_labels(figure: Figure, axes: Axes, spots: Sequence[Spot], names: Sequence[str]) -> list[Box]:
    """Writes a name near each point; one that lies further off is tied to it by a thin line.

    Args:
        figure: its layout is settled here, so nothing that changes it may follow.
        axes: with final limits and scales.
        spots: the points.
        names: one each.

    Returns:
        Where the names are, in the figure's units.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    transform = axes.transData.transform
    where = [(float(x), float(y)) for x, y in (transform((spot.x, spot.y)) for spot in spots)]
    marks = [Box(x - 6, y - 6, 12, 12) for x, y in where]
    for spot in spots:
        (x, low), (_, high) = transform((spot.x, spot.low)), transform((spot.x, spot.high))
        marks.append(Box(float(x) - 1, float(low), 2, float(high - low)))
    extent = axes.get_window_extent()
    frame = Box(extent.x0, extent.y0, extent.width, extent.height)
    sizes = []
    for name in names:
        text = figure.text(0, 0, name, fontsize=11.5)
        size = text.get_window_extent()
        text.remove()
        sizes.append((size.width + 2 * _MARGIN, size.height + _MARGIN))
    boxes = _arrange(where, sizes, marks, frame)
    for (x, y), box, name in zip(where, boxes, names, strict=True):
        middle, base = box.left + box.width / 2, box.bottom + box.height / 2
        near_x = min(max(x, box.left), box.left + box.width)
        near_y = min(max(y, box.bottom), box.bottom + box.height)
        tie = {"arrowstyle": "-", "color": INK, "alpha": 0.45, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        if math.dist((x, y), (near_x, near_y)) > _RADII[1]:
            axes.annotate("", (x, y), (near_x, near_y), xycoords="figure points", arrowprops=tie)
        axes.annotate(
            name,
            (middle, base),
            xycoords="figure points",
            ha="center",
            va="center",
            fontsize=11.5,
            annotation_clip=False,
        )
    return boxes


def _arrange(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    marks: Sequence[Box],
    frame: Box,
) -> list[Box]:
    """Greedy, the topmost point first, then some passes of repair."""
    places = [_candidates(point, size) for point, size in zip(points, sizes, strict=True)]
    # What does not change with the other names: distance, points that are covered, what lies outside.
    fixed = [
        radii + 8 * _overlaps(boxes, _corners(marks)).sum(1) + 30 * _outside(boxes, frame)
        for radii, boxes in places
    ]
    chosen: list[int | None] = [None] * len(points)
    order = sorted(range(len(points)), key=lambda i: (-points[i][1], points[i][0]))
    for _ in range(_PASSES):
        for i in order:
            others = [places[j][1][k] for j, k in enumerate(chosen) if k is not None and j != i]
            upon_names = _overlaps(places[i][1], np.reshape(others, (-1, 4))).sum(1)
            chosen[i] = int(np.argmin(fixed[i] + 20 * upon_names))
    corners = [places[i][1][k] for i, k in enumerate(chosen) if k is not None]
    return [Box(left, bottom, right - left, top - bottom) for left, bottom, right, top in np.asarray(corners)]


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> tuple[Array, Array]:
    """Distances of places around a point, and their corners ``(n, 4)``; the right of it comes first."""
    width, height = size
    radii = np.repeat(_RADII, _ANGLES)
    angles = np.tile(2 * np.pi * np.arange(_ANGLES) / _ANGLES, len(_RADII))
    dx, dy = np.cos(angles), np.sin(angles)
    # The box's nearest edge, not its middle, lies at the radius.
    x = point[0] + radii * dx + width / 2 * (np.sign(dx) * (np.abs(dx) > 0.01))
    y = point[1] + radii * dy + height / 2 * (np.sign(dy) * (np.abs(dy) > 0.4))
    return radii, np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)


def _corners(boxes: Sequence[Box]) -> Array:
    rows = [(box.left, box.bottom, box.left + box.width, box.bottom + box.height) for box in boxes]
    return np.reshape(np.asarray(rows, dtype=np.float64), (-1, 4))


def _overlaps(a: Array, b: Array) -> Array:
    """The areas that boxes of ``a`` and of ``b`` share, ``(len(a), len(b))``."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared: Array = np.clip(high - low, 0, None).prod(axis=2)
    return shared


def _outside(boxes: Array, frame: Box) -> Array:
    areas: Array = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return areas - _overlaps(boxes, _corners([frame]))[:, 0]
