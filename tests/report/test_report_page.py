from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_cases import HOSTILE

import mldcn.report.page as page_module
from mldcn.report.blocks import (
    Block,
    Bullets,
    Callout,
    Code,
    Details,
    Figure,
    Figures,
    Heading,
    KeyValues,
    Paragraph,
)
from mldcn.report.page import Page
from mldcn.report.table import Column, Interval, Label, Table
from mldcn.report.text import number, slug

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Balance(HTMLParser):
    """Fails on a closing tag that does not match; collects ids, tags and visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def check(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids)), "an id is used twice"
    return parser


def every_block(text: str) -> list[Block]:
    svg = '<svg viewBox="0 0 1 1"><g id="a"/><use href="#a"/></svg>'
    return [
        Heading(text),
        Heading(text, 3),
        Paragraph(text),
        Bullets([text, text]),
        Code(text),
        KeyValues([(text, text)]),
        Callout(text, text, "next", (text,)),
        Details(text, [Paragraph(text), Code(text)]),
        Figures([Figure("a", svg, text, text, text), Figure("b", svg, text, text)]),
        Table(
            text,
            [Column(name=text, unit=text, note=text), Column(name="n")],
            [[Label(text, text), 1]],
            notes=[text],
        ),
    ]


def test_texts_from_outside_are_escaped_in_every_block() -> None:
    page = Page(HOSTILE, subtitle=HOSTILE, footer=HOSTILE).add(*every_block(HOSTILE))
    html = page.to_html()
    parser = check(html)
    assert "script" not in parser.tags
    assert "<script" not in html
    assert "alert('x')" in parser.text  # still readable, as text
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "<script" not in _without_code(page.to_markdown())


def _without_code(markdown: str) -> str:
    return re.sub(r"(?ms)^(> )?```.*?```$", "", markdown)


def test_a_page_loads_nothing() -> None:
    html = Page("t").add(*every_block("x")).to_html()
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert not {"script", "link", "img", "iframe"} & check(html).tags


def test_the_page_follows_light_and_dark_and_the_screens_width() -> None:
    html = Page("t").to_html()
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport" content="width=device-width' in html
    assert ".table { overflow-x: auto" in html


def test_colours_of_texts_have_contrast_in_both_schemes() -> None:
    css = Path(page_module.__file__).with_name("page.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", part))
        for part in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        for name in ("text", "muted", "link"):
            for behind in ("back", "soft"):
                assert contrast(scheme[name], scheme[behind]) >= 4.5, (name, behind)


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_same_blocks_same_bytes() -> None:
    assert Page("t").add(*every_block("x")).to_html() == Page("t").add(*every_block("x")).to_html()


def test_ids_of_a_picture_are_its_own_on_the_page() -> None:
    html = Page("t").add(*every_block("x")).to_html()
    ids = re.findall(r'<g id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) == 2
    assert re.findall(r'<use href="#([^"]+)"', html) == ids


def test_a_figure_must_be_svg() -> None:
    with pytest.raises(ValueError, match="expected an <svg> element"):
        Figure("a", "<b>", "", "")


def test_contents_link_to_headings() -> None:
    html = Page("t").add(Heading("One"), Heading("Two"), Heading("Two b", 3), Heading("Three")).to_html()
    targets = re.findall(r'<li><a href="#(\w+)">', html)
    assert len(targets) == 3
    assert all(f'<h2 id="{target}">' in html for target in targets)


def test_write_replaces_the_page_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    Page("old").write(path)
    page = Page("new")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, "replace", fail)
        page.write(path)
    assert "<h1>old</h1>" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]  # nothing is left lying about
    page.write(path)
    assert path.read_text(encoding="utf-8") == page.to_html()


def test_write_files_gives_markdown_tables_and_pictures(tmp_path: Path) -> None:
    table = Table("c", [Column(name="m"), Column(name="v")], [["a", 0.5]], "quality")
    figure = Figure("plot", '<svg viewBox="0 0 1 1"></svg>', "Title", "what it shows")
    page = Page("t").add(table, Details("more", [table]), Figures([figure]))
    names = {path.name for path in page.write_files(tmp_path)}
    assert names == {"report.md", "quality.csv", "quality-2.csv", "plot.svg"}
    assert (tmp_path / "quality.csv").read_text(encoding="utf-8") == "m,v\na,0.5\n"
    assert "![what it shows](plot.svg)" in (tmp_path / "report.md").read_text(encoding="utf-8")


TABLE = Table(
    "AUC by model",
    [
        Column(name="Model"),
        Column(name="AUC", format=".4f", best="max"),
        Column(name="Loss", unit="nats", format=".3f", best="min"),
        Column(name="Ratio", format=".2f", best="one"),
        Column(name="Note"),
    ],
    [
        [Label("a", "rank 4"), Interval(0.74121, 0.73, 0.75), 0.2, 1.3, "x|y"],
        ["b", 0.74124, math.nan, 0.8, ""],
        ["c", 0.7, 0.3, float("inf"), None],
    ],
)


def test_best_numbers_are_marked_also_where_they_are_shown_alike() -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", TABLE.html("k"))[1:]
    marked = [re.findall(r"<strong>(.*?)</strong>", row) for row in rows]
    # 0.74121 and 0.74124 are both shown as 0.7412; of 1.3 and 0.8 the nearer to 1 as a ratio is 0.8.
    assert [len(cells) for cells in marked] == [2, 2, 0]
    assert marked[0][0].startswith("0.7412")
    assert marked[0][1] == "0.200"
    assert marked[1] == ["0.7412", "0.80"]


def test_where_all_are_alike_none_is_best() -> None:
    table = Table(
        "t", [Column(name="m"), Column(name="v", format=".2f", best="max")], [["a", 0.501], ["b", 0.502]]
    )
    assert "<strong>" not in table.html("k")
    assert "Bold" not in table.html("k")


def test_what_is_not_known_is_a_dash() -> None:
    html = TABLE.html("k")
    assert "nan" not in html.lower()
    assert "None" not in html
    assert html.count(">–<") == 3  # NaN, an empty text and None
    assert ">∞<" in html


def test_numbers_are_right_aligned_and_texts_are_not() -> None:
    html = TABLE.html("k")
    assert html.count('<th scope="col" class="number">') == 3
    assert '<th scope="col">Note</th>' in html
    assert '<caption id="k">AUC by model</caption>' in html
    assert html.count('scope="row"') == 3


def test_markdown_table() -> None:
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "**AUC by model**"
    assert lines[2:6] == [
        "| Model | AUC | Loss (nats) | Ratio | Note |",
        "| --- | ---: | ---: | ---: | --- |",
        r"| a (rank 4) | **0.7412 (0.7300 to 0.7500)** | **0.200** | 1.30 | x\|y |",
        "| b | **0.7412** | – | **0.80** | – |",
    ]


def test_csv_has_unrounded_numbers_and_a_column_for_each_end_of_an_interval() -> None:
    assert TABLE.csv().splitlines() == [
        "Model,Model detail,AUC,AUC low,AUC high,Loss (nats),Ratio,Note",
        "a,rank 4,0.74121,0.73,0.75,0.2,1.3,x|y",
        "b,,0.74124,,,,0.8,",
        "c,,0.7,,,0.3,inf,",
    ]


def test_a_row_with_a_cell_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0 of 't': 1 cells for 2 columns"):
        Table("t", [Column(name="a"), Column(name="b")], [["x"]])


def test_a_table_without_rows() -> None:
    table = Table("t", [Column(name="a"), Column(name="b", best="max")], [])
    check(table.html("k"))
    assert table.csv() == "a,b\n"


@pytest.mark.parametrize(
    ("value", "spec", "shown"),
    [
        (131_072, "si", "131k"),
        (4_400_000, "si", "4.40M"),
        (4_400_000, "tick", "4.4M"),
        (999_600, "si", "1.00M"),
        (12.0, "si", "12"),
        (0.0, "si", "0"),
        (42.25, "duration", "42.2 s"),
        (59.99, "duration", "1 min 0 s"),
        (125.0, "duration", "2 min 5 s"),
        (3600.0 * 25, "duration", "25 h 0 min"),
        (0.0001, "p", "<0.001"),
        (0.25, "p", "0.250"),
        (-0.00123, "+.4f", "−0.0012"),
        (1234567, "", "1,234,567"),
        (0.123456, "", "0.1235"),
        (None, ".4f", "–"),
        (math.nan, "si", "–"),
        (-math.inf, ".4f", "−∞"),
    ],
)
def test_numbers_as_people_read_them(value: float | None, spec: str, shown: str) -> None:
    assert number(value, spec) == shown


def test_slug_is_safe_as_a_file_name() -> None:
    assert slug("../Good click/30s") == "good-click-30s"
    assert slug("→") == "x"


def test_a_fence_is_longer_than_any_in_the_code() -> None:
    assert Code("```\nx\n```").markdown().startswith("````\n")
