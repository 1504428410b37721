from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from report_cases import HOSTILE

from mldcn.report import plots
from mldcn.report.labels import Spot, place_labels
from mldcn.report.plots import Curve, Point, Reliability
from mldcn.report.style import PALETTE, drawing, new_figure, save, to_svg
from mldcn.report.text import number
from mldcn.report.trends import Mark, Stack, Trend, stacks, trends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "{http://www.w3.org/2000/svg}"
DARK, LIGHT = "#14171c", "#ffffff"


def draw(kind: str, names: list[str]) -> Figure:
    points = [
        Point(name, 0.74 - 0.0002 * i, 0.738, 0.745, 131_000 * (1 + 0.001 * i), i)
        for i, name in enumerate(names)
    ]
    if kind == "curves":
        series = [
            Curve(name, [100, 200, 300], [0.7, 0.72, 0.71 + 0.001 * i], i) for i, name in enumerate(names)
        ]
        return plots.curves(series, y_label="validation AUC", best="max")
    if kind == "intervals":
        return plots.intervals(points, x_label="AUC", attainable=0.75)
    if kind == "cost":
        return plots.against_cost(points, y_label="AUC", x_label="FLOPs")
    if kind == "trends":
        lines = [
            Trend(n, [Mark(5e4 * 9**k, 0.001 * k, 0.0005 * k, 0.002 * k) for k in range(3)], i)
            for i, n in enumerate(names)
        ]
        return trends(lines, y_label="AUC gain", x_label="FLOPs", apart=True)
    if kind == "stacks":
        return stacks([Stack(n, [3e5, 1e5 + i]) for i, n in enumerate(names)], parts=["a", "b"], x_label="n")
    bins = [Reliability(n, [0.002, 0.02, 0.2], [0.0, 0.03, 0.2], [9, 5, 1], i) for i, n in enumerate(names)]
    return plots.reliability(bins)


KINDS = ["curves", "intervals", "cost", "reliability", "trends", "stacks"]


@pytest.mark.parametrize("kind", KINDS)
def test_svg_is_one_well_formed_element_without_references(kind: str) -> None:
    svg = to_svg(draw(kind, ["plain", HOSTILE]))
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox", "").startswith("0 0 440 ")
    assert re.findall(r"https?://[^\"' ]*", svg) == ["http://www.w3.org/2000/svg"]
    assert "<metadata" not in svg
    assert "<style" not in svg  # it would hold for the whole page
    assert root.find(f".//{SVG}script") is None


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_text_in_the_pages_colour_and_font(kind: str) -> None:
    svg = to_svg(draw(kind, ["first model", "second model"]))
    root = ET.fromstring(svg)
    texts = ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]
    if kind == "reliability":
        assert "observed rate" in texts
    assert "first model" in texts
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "#000000" not in svg
    assert "DejaVu" not in svg
    assert "system-ui" in root.get("style", "")
    styles = " ".join(node.get("style", "") for node in root.iter())
    assert "#ffffff" not in styles  # the background is the page's


@pytest.mark.parametrize("kind", KINDS)
def test_same_figure_same_bytes(kind: str) -> None:
    assert to_svg(draw(kind, ["a", "b"])) == to_svg(draw(kind, ["a", "b"]))


def test_a_readers_own_matplotlib_settings_change_nothing() -> None:
    import matplotlib

    expected = to_svg(draw("curves", ["a", "b"]))
    with matplotlib.rc_context(
        {"font.size": 30, "axes.grid": False, "svg.fonttype": "path", "xtick.direction": "in"}
    ):
        assert to_svg(draw("curves", ["a", "b"])) == expected
        assert matplotlib.rcParams["font.size"] == 30  # and the reader's settings stay


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 10])
def test_any_number_of_models(kind: str, count: int) -> None:
    ET.fromstring(to_svg(draw(kind, [f"model {i}" for i in range(count)])))


def test_a_name_with_an_underscore_in_front_is_in_the_legend() -> None:
    root = ET.fromstring(to_svg(draw("curves", ["_hidden", "from $5 to $6"])))
    texts = ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]
    assert "_hidden" in texts
    assert "from $5 to $6" in texts  # as it is, not as a formula


def test_values_that_are_not_finite_are_left_out() -> None:
    nan = math.nan
    ET.fromstring(to_svg(plots.curves([Curve("a", [1, 2, 3], [nan, 0.7, nan])], y_label="y", best="max")))
    ET.fromstring(to_svg(plots.curves([Curve("a", [1, 2], [nan, nan])], y_label="y", best="max")))
    svg = to_svg(plots.intervals([Point("gone", nan), Point("there", 0.7, nan, nan)], x_label="x"))
    assert "gone" not in svg
    assert "there" in svg
    points = [Point("free", 0.7, cost=0.0), Point("unknown", 0.7), Point("paid", 0.7, cost=5.0)]
    svg = to_svg(plots.against_cost(points, y_label="y", x_label="x"))
    assert "paid" in svg
    assert "free" not in svg
    assert "unknown" not in svg
    svg = to_svg(plots.reliability([Reliability("a", [nan, 0.5], [0.1, nan], [1, 1])]))
    assert "nan" not in svg.lower()


def test_a_bin_without_positives_is_drawn_where_the_axes_are_logarithmic() -> None:
    figure = draw("reliability", ["a"])
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    bottom = axes.get_ylim()[0]
    offsets = [tuple(point) for collection in axes.collections for point in collection.get_offsets()]
    assert len(offsets) == 3
    assert min(y for _, y in offsets) == pytest.approx(bottom)


def test_predictions_of_one_scale_have_linear_axes() -> None:
    figure = plots.reliability([Reliability("a", [0.2, 0.5], [0.1, 0.6], [1, 1])])
    assert figure.axes[0].get_xscale() == "linear"


def test_the_best_value_is_at_the_top() -> None:
    figure = plots.intervals([Point("low", 0.6), Point("high", 0.8), Point("mid", 0.7)], x_label="x")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["low", "mid", "high"]


def test_learning_curves_show_the_differences_of_finished_models() -> None:
    steps = list(range(1, 101))
    values = [0.5 if step < 10 else 0.74 for step in steps]
    figure = plots.curves([Curve("a", steps, values)], y_label="y")
    assert figure.axes[0].get_ylim()[0] > 0.7


@pytest.mark.parametrize("spread", [0.0, 0.0001, 0.5])
def test_no_name_lies_upon_another_and_all_lie_in_the_axes(spread: float) -> None:
    with drawing():
        figure = new_figure(390)
        axes = figure.add_subplot()
        axes.set_xlim(-1, 1)
        axes.set_ylim(-1, 1)
        spots = [Spot(spread * math.sin(7 * i), spread * math.cos(5 * i), 0, 0) for i in range(10)]
        boxes = place_labels(figure, axes, spots, [f"a model's name {i}" for i in range(10)])
        extent = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert all(box.overlap(other) == 0 for other in boxes[:i])
        assert box.left >= extent.x0
        assert box.left + box.width <= extent.x1
        assert box.bottom >= extent.y0
        assert box.bottom + box.height <= extent.y1


@pytest.mark.parametrize("behind", [LIGHT, DARK])
def test_each_colour_is_seen_on_light_and_dark(behind: str) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for colour in PALETTE:
        low, high = sorted((luminance(colour), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_save_writes_svg_and_png(tmp_path: Path) -> None:
    figure = draw("cost", ["a", "b"])
    svg = save(figure, tmp_path / "plots" / "cost.svg").read_text(encoding="utf-8")
    assert svg == to_svg(figure) + "\n"
    png = save(figure, tmp_path / "plots" / "cost.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert png == save(figure, tmp_path / "again.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["cost.png", "cost.svg"]
    with pytest.raises(ValueError, match=r"saved as \.svg or \.png"):
        save(figure, tmp_path / "cost.bmp")


def test_importing_reports_costs_no_matplotlib() -> None:
    code = "import sys, mldcn.report; sys.exit(int('matplotlib' in sys.modules or 'torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_marks_at_one_place_are_drawn_side_by_side_at_their_own_heights() -> None:
    def crosses(apart: bool) -> list[tuple[float, float]]:
        lines = [Trend(name, [Mark(1e5, 0.001 * i), Mark(1e6, 0.002)], i) for i, name in enumerate("abc")]
        figure = trends(lines, y_label="y", x_label="x", apart=apart)
        (axes,) = figure.axes
        figure.draw_without_rendering()
        found = [line for line in axes.lines if line.get_marker() != "None" and len(line.get_xdata()) == 2]
        return [tuple(line.get_transform().transform((1e5, 0.0))) for line in found]

    together, side_by_side = crosses(apart=False), crosses(apart=True)
    assert len({round(x, 3) for x, _ in together}) == 1
    assert [x - side_by_side[1][0] for x, _ in side_by_side] == pytest.approx([-5, 0, 5])
    assert len({round(y, 3) for _, y in side_by_side}) == 1


def test_error_bars_lie_within_the_axes() -> None:
    figure = trends(
        [Trend("a", [Mark(1e5, 0.0, -0.9, 0.9), Mark(1e6, 0.1, math.nan, 0.2), Mark(1e6, 0.1, None, None)])],
        y_label="y",
        x_label="x",
    )
    low, high = figure.axes[0].get_ylim()
    assert low < -0.9
    assert high > 0.9


@pytest.mark.parametrize(("far", "kind"), [(1e6, "log"), (1.1e5, "linear")])
def test_a_wide_range_of_costs_is_drawn_by_ratio(far: float, kind: str) -> None:
    figure = trends([Trend("a", [Mark(1e5, 0.0), Mark(far, 0.1)])], y_label="y", x_label="x")
    assert figure.axes[0].get_xscale() == kind
    assert len(figure.axes[0].get_xticks()) >= 2


def test_what_cannot_be_drawn_by_ratio_is_left_out() -> None:
    figure = trends(
        [
            Trend(
                "a",
                [Mark(0.0, 0.1), Mark(math.inf, 0.1), Mark(1e5, math.nan), Mark(1e5, 0.2), Mark(9e5, 0.3)],
            )
        ],
        y_label="y",
        x_label="x",
    )
    (line,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert list(line.get_xdata()) == [1e5, 9e5]


def test_places_can_have_names() -> None:
    figure = trends(
        [Trend("a", [Mark(0.0, 0.1), Mark(1.0, 0.2)])],
        y_label="y",
        x_label="mask",
        log=False,
        names=("none", "full"),
    )
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["none", "full"]


def test_parts_of_a_bar_lie_one_after_another_with_the_sum_beside() -> None:
    figure = stacks([Stack("a", [3e5, 1e5]), Stack("b", [1e5, 0])], parts=["deep", "heads"], x_label="FLOPs")
    (axes,) = figure.axes
    bars = [
        (patch.get_x(), patch.get_width(), round(patch.get_y() + patch.get_height() / 2))
        for patch in axes.patches
    ]
    assert bars == [(0, 3e5, 1), (0, 1e5, 0), (3e5, 1e5, 1), (1e5, 0, 0)]  # the first row is at the top
    assert {text.get_text() for text in axes.texts} == {"400k", "100k"}


def test_a_gain_of_nothing_has_no_sign() -> None:
    assert [number(value, "signed") for value in (0.0, -1e-19, 0.0012, -0.5)] == ["0", "0", "+0.0012", "−0.5"]
