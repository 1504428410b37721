"""Names beside the points of a plot, none upon another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mldcn.report.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    boxes: list[Box | None] = [None] * len(points)
    order = sorted(range(len(points)), key=lambda i: (-points[i][1], points[i][0]))
    for _ in range(_PASSES):
        for i in order:
            others = [box for j, box in enumerate(boxes) if box is not None and j != i]
            boxes[i] = min(_candidates(points[i], sizes[i]), key=lambda c: _cost(c, others, marks, frame))[1]
    return [box for box in boxes if box is not None]


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> list[tuple[float, Box]]:
    """Places around a point with their distances; the right of it comes first."""
    width, height = size
    found = []
    for radius in _RADII:
        for k in range(_ANGLES):
            angle = 2 * math.pi * k / _ANGLES
            dx, dy = math.cos(angle), math.sin(angle)
            # The box's nearest edge, not its middle, lies at the radius.
            x = point[0] + radius * dx + width / 2 * (1 if dx > 0.01 else -1 if dx < -0.01 else 0)
            y = point[1] + radius * dy + height / 2 * (1 if dy > 0.4 else -1 if dy < -0.4 else 0)
            found.append((radius, Box(x - width / 2, y - height / 2, width, height)))
    return found


def _cost(candidate: tuple[float, Box], others: Sequence[Box], marks: Sequence[Box], frame: Box) -> float:
    radius, box = candidate
    outside = box.width * box.height - box.overlap(frame)
    upon_names = sum(box.overlap(other) for other in others)
    upon_points = sum(box.overlap(mark) for mark in marks)
    return 20 * upon_names + 8 * upon_points + 30 * outside + radius
