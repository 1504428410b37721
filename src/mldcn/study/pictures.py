"""The pictures of a study's report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mldcn.report import Bins, plots
from mldcn.report.blocks import Block, Details, Figure, Figures
from mldcn.report.plots import Curve, Point
from mldcn.report.text import known, slug
from mldcn.report.trends import Mark, Stack, Trend, stacks, trends
from mldcn.run import RunFolder
from mldcn.study.findings import Standing
from mldcn.study.outline import Group, Member, Outline, cost_title, key_title
from mldcn.study.quoted import Quoted
from mldcn.study.rows import RunRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

_SAME = 1.05  # costs within this ratio need no axis
_TICKS = 8
_LINES = 8  # that a plot of curves has room for
_PARTS = ("interaction", "deep", "heads", "embedding")
_QUOTED = "The paper's figures, from its own data and scale: only the shape can be compared."
_BARS = "Bars are 95 % intervals."


@dataclass(frozen=True)
class Picture:
    """A plot with its file name, title and caption."""

    name: str
    plot: Plot
    title: str
    caption: str

    def figure(self) -> Figure:
        """The picture as a block of a page."""
        alt = f"Plot: {self.title}. The numbers are in the tables."
        return Figure(self.name, plots.to_svg(self.plot), self.title, alt, self.caption)


def shown(pictures: Sequence[Picture]) -> list[Block]:
    """Pictures side by side."""
    return [Figures([picture.figure() for picture in pictures])] if pictures else []


def first_shown(pictures: Sequence[Picture], summary: str) -> list[Block]:
    """The first picture, and the others folded under ``summary``."""
    return [*shown(pictures[:1]), *([Details(summary, shown(pictures[1:]))] if pictures[1:] else [])]


def gain_pictures(outline: Outline) -> list[Picture]:
    """Gains against FLOPs and every other cost; where there is one point only, rivals by their gain as well."""
    if outline.recipe.vary or len(outline.points) < 2:
        return [*_ranked(outline), *_scattered(outline)]
    if outline.settings:
        return [*_by_setting(outline), *_scattered(outline)]
    return [*_scaled(outline), *_shares(outline)]


def _mark(outline: Outline, standing: Standing, x: float) -> Mark | None:
    """A standing's gain at a place; the baseline's own is 0."""
    if (standing.rival, standing.point) == outline.summary.baseline:
        return Mark(x, 0.0)
    gain = outline.summary.gain(standing.rival, standing.point)
    if gain is None:
        return None
    return Mark(x, gain.estimate.value, gain.estimate.low, gain.estimate.high)


def _scaled(outline: Outline) -> Iterator[Picture]:
    for cost in outline.costs():
        series = [
            Trend(rival, list(_marks(outline, rival, cost)), style) for rival, style in outline.styles.items()
        ]
        series = [trend for trend in series if trend.marks]
        side = cost == "flops" and outline.recipe.match == "flops"
        plot = trends(
            series,
            x_label=cost_title(cost),
            y_label=f"{outline.metric} gain over {outline.baseline}",
            apart=side,
            ticks=_ticks([budget.flops or 0.0 for budget in outline.recipe.budgets]) if side else (),
        )
        caption = f"Up is better. {_BARS}" + (
            " Rivals at one budget are drawn side by side." if side else " Left is cheaper."
        )
        yield Picture(
            f"gain-by-{slug(cost)}", plot, f"{outline.metric} gain against {cost_title(cost)}", caption
        )


def _marks(outline: Outline, rival: str, cost: str) -> Iterator[Mark]:
    for standing in outline.there:
        if standing.rival == rival and cost in standing.costs:
            mark = _mark(outline, standing, standing.costs[cost])
            if mark is not None:
                yield mark


def _shares(outline: Outline) -> Iterator[Picture]:
    """Shares of the attainable AUC, where that is known."""
    series = []
    for rival, style in outline.styles.items():
        own = [s for s in outline.there if s.rival == rival and s.attainable is not None]
        marks = [Mark(s.costs["flops"], 100 * (s.attainable or 0.0)) for s in own]
        series += [Trend(rival, marks, style)] if marks else []
    if series:
        plot = trends(
            series,
            x_label=cost_title("flops"),
            y_label="% of the attainable AUC above 0.5",
            signed=False,
        )
        caption = "Up is better; 100 % is the AUC of the true probabilities. Means over seeds."
        yield Picture("attainable", plot, "Share of the attainable AUC", caption)


def _by_setting(outline: Outline) -> Iterator[Picture]:
    """Gains where points are settings side by side, that cost no known amount."""
    names = outline.points
    series = []
    for rival, style in outline.styles.items():
        own = [s for s in outline.there if s.rival == rival]
        marks = [_mark(outline, s, float(names.index(s.point))) for s in own]
        series.append(Trend(rival, [mark for mark in marks if mark is not None], style))
    plot = trends(
        [trend for trend in series if trend.marks],
        x_label="setting",
        y_label=f"{outline.metric} gain over {outline.baseline}",
        log=False,
        apart=True,
        names=names,
    )
    yield Picture("gain-by-setting", plot, f"{outline.metric} gain by setting", f"Up is better. {_BARS}")


def _ranked(outline: Outline) -> Iterator[Picture]:
    points = list(_points(outline, None))
    if len(points) > 1:
        plot = plots.intervals(points, x_label=f"{outline.metric} gain over {outline.baseline}", zero=True)
        yield Picture(
            "gains", plot, f"{outline.metric} gain over {outline.baseline}", f"Right is better. {_BARS}"
        )


def _scattered(outline: Outline) -> Iterator[Picture]:
    for cost in outline.costs():
        points = [point for point in _points(outline, cost) if known(point.cost)]
        costs = [point.cost for point in points if point.cost]
        if len(points) > 1 and costs and max(costs) / min(costs) > _SAME:
            plot = plots.against_cost(
                points, y_label=f"{outline.metric} gain over {outline.baseline}", x_label=cost_title(cost)
            )
            caption = f"Up is better, left is cheaper. {_BARS}"
            caption += f" All at {outline.main_point}." if outline.settings else ""
            yield Picture(
                f"gain-by-{slug(cost)}", plot, f"{outline.metric} gain against {cost_title(cost)}", caption
            )


def _points(outline: Outline, cost: str | None) -> Iterator[Point]:
    for group in outline.groups():
        for member in group.members:
            if outline.settings and member.standing.point != outline.main_point:
                continue
            x = member.standing.costs.get(cost) if cost is not None else None
            mark = _mark(outline, member.standing, 0.0)
            if mark is not None:
                yield Point(member.label, mark.y, mark.low, mark.high, x, member.style)


def ablation_pictures(outline: Outline, quoted: Sequence[Quoted]) -> Iterator[tuple[str, list[Picture]]]:
    """For each varied key its gain by value, and beside it, on axes of their own, the figures that are quoted."""
    for key in outline.recipe.vary:
        own = [s for s in outline.there if s.key == key]
        marks = [(s, _mark(outline, s, 0.0)) for s in own]
        found = [(s, mark) for s, mark in marks if mark is not None]
        if not found:
            continue
        rival = found[0][0].rival
        ticks = _ticks([s.axis for s in own if s.axis is not None])
        measured = _valued(
            [(s.point, s.axis, mark) for s, mark in found],
            key_title(key),
            f"{outline.metric} gain over {outline.baseline}",
            outline.styles[rival],
            ticks,
        )
        title = f"{rival}: {outline.metric} gain by {key_title(key)}, measured here"
        caption = f"Up is better. {_BARS} Each value has a cost of its own: see the plot against FLOPs."
        pictures = [Picture(f"ablation-{slug(key_title(key))}", measured, title, caption)]
        for i, table in enumerate(quoted):
            figures = [(s, table.of(s)) for s in own]
            values = [(s.point, s.axis, Mark(0.0, y)) for s, y in figures if y is not None]
            if len(values) > 1:
                name = f"quoted-{slug(key_title(key))}" + (f"-{i + 1}" if i else "")
                plot = _valued(values, key_title(key), table.what, len(outline.styles) + i, ticks)
                pictures.append(Picture(name, plot, f"Quoted from {table.source}", _QUOTED))
        yield key, pictures


def quoted_pictures(outline: Outline, quoted: Sequence[Quoted]) -> list[Picture]:
    """The figures that are quoted for rivals, on axes of their own; of varied keys see above."""
    found = []
    own = [(member.standing, member.style) for group in outline.groups() for member in group.members]
    own = [(standing, style) for standing, style in own if standing.key is None]
    for i, table in enumerate(quoted):
        values = [(outline.label(s), table.of(s), style) for s, style in own]
        points = [Point(label, value, style=style) for label, value, style in values if value is not None]
        if len(points) > 1:
            plot = plots.intervals(points, x_label=table.what)
            found.append(
                Picture(f"quoted-{i + 1}", plot, f"Quoted from {table.source}: {table.what}", _QUOTED)
            )
    return found


def _valued(
    values: Sequence[tuple[str, float | None, Mark]], key: str, what: str, style: int, ticks: Sequence[float]
) -> Plot:
    """A trend over a key's values: to scale where all are numbers, else by their names."""
    numeric = all(axis is not None for _, axis, _ in values)
    places = [axis if numeric and axis is not None else float(i) for i, (_, axis, _) in enumerate(values)]
    marks = [Mark(x, m.y, m.low, m.high) for x, (_, _, m) in zip(places, values, strict=True)]
    names = () if numeric else tuple(point.partition("=")[2] for point, _, _ in values)
    return trends(
        [Trend(what, marks, style)],
        x_label=key,
        y_label=what,
        log=False,
        names=names,
        ticks=ticks if numeric else (),
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """The values themselves, where an axis has room for them."""
    return sorted(set(values)) if len(set(values)) <= _TICKS else []


def curve_pictures(outline: Outline) -> list[Picture]:
    """Learning curves of each group; that of the finding first."""
    found = []
    for group in outline.main_first():
        curves = [_curve(outline.runs(member.standing), member) for member in group.members]
        curves = [curve for curve in curves if curve.steps]
        for i in range(0, len(curves), _LINES):
            part = f"-{i // _LINES + 1}" if len(curves) > _LINES else ""
            plot = plots.curves(
                curves[i : i + _LINES],
                y_label=f"validation {outline.study.facts.monitor}",
                best="max" if outline.study.facts.higher_is_better else "min",
            )
            title = f"Learning curves {group.title}".rstrip()
            caption = "The first seed of each; the point marks the evaluation whose weights were kept."
            found.append(Picture(f"curves-{group.name}{part}", plot, title, caption))
    return found


def _curve(rows: Sequence[RunRow], member: Member) -> Curve:
    curve = rows[0].curve if rows else ()
    return Curve(member.label, [step for step, _ in curve], [value for _, value in curve], member.style)


def cost_pictures(outline: Outline) -> list[Picture]:
    """FLOPs by part of each group, and the parameters; the last (dearest) first."""
    found = []
    for group in outline.main_first():
        for what, parts, x_label in (
            ("FLOPs", _PARTS, "FLOPs an example"),
            ("parameters", ("dense", "embedding"), "parameters"),
        ):
            rows = [(member.label, outline.runs(member.standing)) for member in group.members]
            counts = [
                (label, runs[0].flops if what == "FLOPs" else runs[0].parameters)
                for label, runs in rows
                if runs
            ]
            used = [part for part in parts if any(count.get(part, 0) for _, count in counts)]
            if used:
                bars = [Stack(label, [count.get(part, 0) for part in used]) for label, count in counts]
                plot = stacks(bars, parts=used, x_label=x_label)
                title = f"Where the {what} are {group.title}".rstrip()
                found.append(
                    Picture(f"{what.lower()}-{group.name}", plot, title, "The sum is beside each bar.")
                )
    return found


def calibration_pictures(outline: Outline) -> list[Picture]:
    """Reliability of each group on the test rows; that of the finding first, where the runs are at hand."""
    found = []
    for group in outline.main_first():
        series = list(_reliability(outline, group))
        for i in range(0, len(series), _LINES):
            part = f"-{i // _LINES + 1}" if len(series) > _LINES else ""
            caption = (
                "On the dashed line predictions are right on average; above it they are too low. A larger point "
                "holds more test rows. The first seed of each."
            )
            title = f"Calibration {group.title}".rstrip()
            plot = plots.reliability(
                [bins.series(label, style) for bins, label, style in series[i : i + _LINES]]
            )
            found.append(Picture(f"calibration-{group.name}{part}", plot, title, caption))
    return found


def _reliability(outline: Outline, group: Group) -> Iterator[tuple[Bins, str, int]]:
    for member in group.members:
        runs = outline.runs(member.standing)
        folder = RunFolder(outline.study.out / runs[0].run) if runs else None
        if folder is not None and (folder.path / "reliability.json").exists():
            bins = folder.read_json("reliability.json").get(outline.study.facts.task)
            if bins is not None:
                yield Bins(**bins), member.label, member.style
