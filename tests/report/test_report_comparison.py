from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import HOSTILE, make_run
from test_report_page import check

from mldcn.report import Difference, FeatureSummary, RunSummary, comparison_page, comparison_plots, run_page


def plain_run(i: int, difference: float | None = None) -> RunSummary:
    """A run without curves and bins, for what is said in words."""
    return replace(make_run(i, difference=difference), history=[], reliability={}, flops=None)


def page_text(html: str) -> str:
    return " ".join(check(html).text.split())


def test_a_comparison_says_what_was_run_found_and_comes_next() -> None:
    runs = [
        make_run(0, difference=0.003),
        make_run(1),
        make_run(2, difference=0.0005),
        make_run(3, difference=-0.002),
    ]
    page = comparison_page(
        "Which is best?",
        runs,
        reference="model 1",
        protocol="Trained on the first 80 % of the rows.",
        facts=[("Test rows", "40,000")],
        attainable={"click": {"auc": 0.75, "logloss": 0.13}},
        next_steps=[("On a log of your own:", "mldcn init log.csv")],
        footer="mldcn 0.1.0",
    )
    text = page_text(page.to_html())
    for part in (
        "model 0 has the highest test AUC: 0.7400",
        "Its difference to model 1 is +0.0030 (95% interval +0.0020 to +0.0040): it is shown to be higher.",
        "Shown to be lower than model 1: model 3.",
        "No difference to model 1 shown: model 2.",
        "Trained on the first 80 % of the rows.",
        "mldcn init log.csv",
        "interaction: {name: dnn}",
        "1 min 15 s",
        "Log loss of the true probabilities: 0.1300.",
    ):
        assert part in text
    quality = page.tables[0]
    header, *rows = [line.split(",") for line in quality.csv().splitlines()]
    column = header.index("Share of the attainable")
    assert float(rows[0][column]) == pytest.approx(0.24 / 0.25)
    assert [row[header.index("Reading")] for row in rows] == [
        "higher",
        "reference",
        "no difference shown",
        "lower",
    ]
    assert [figure.name for figure in page.figures] == [
        "auc-click",
        "cost",
        "curve-click",
        "reliability-click",
    ]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.002, "higher"),
        (-0.002, -0.001, "lower"),
        (-0.001, 0.002, "no difference shown"),
        (0.0, 0.002, "no difference shown"),
        (math.nan, math.nan, "not known"),
    ],
)
def test_a_difference_is_only_what_its_interval_bears_out(low: float, high: float, verdict: str) -> None:
    assert Difference(0.001, low, high).verdict == verdict


def test_a_first_place_within_the_interval_is_not_called_a_win() -> None:
    text = page_text(
        comparison_page("t", [plain_run(0, difference=0.0004), plain_run(1)], reference="model 1").to_html()
    )
    assert "the interval contains zero, so no difference is shown." in text
    assert "it is shown to be higher" not in text


def test_without_tested_differences_it_says_so() -> None:
    text = page_text(comparison_page("t", [plain_run(0), plain_run(1)]).to_html())
    assert "No differences were tested: a higher number may be chance." in text


def test_texts_of_runs_are_escaped() -> None:
    runs = [
        replace(
            make_run(i, name=f"{HOSTILE}{i}", tasks=(HOSTILE,), difference=0.1),
            options=HOSTILE,
            config=HOSTILE,
        )
        for i in range(2)
    ]
    page = comparison_page(HOSTILE, runs, reference=HOSTILE, protocol=HOSTILE, facts=[(HOSTILE, HOSTILE)])
    html = page.to_html()
    assert "script" not in check(html).tags
    assert "<script" not in html
    assert set(re.findall(r"https?://[^\"' ]*", html)) == {"http://www.w3.org/2000/svg"}


def test_several_tasks_have_a_table_and_plots_each() -> None:
    runs = [make_run(i, tasks=("Save", "save")) for i in range(2)]
    page = comparison_page("t", runs)
    assert [table.caption for table in page.tables[:2]] == [f"{t}: test metrics" for t in ("Save", "save")]
    names = [figure.name for figure in page.figures]
    # AUC, curve and reliability a task, and the cost of the first
    assert len(names) == len(set(names)) == 2 * 3 + 1
    check(page.to_html())


@pytest.mark.parametrize("count", [1, 10])
def test_any_number_of_runs(count: int) -> None:
    page = comparison_page(
        "t", [make_run(i, difference=0.001 * i - 0.003) for i in range(count)], reference="x"
    )
    check(page.to_html())
    assert len(page.tables[0].rows) == count


def test_one_run_is_not_compared() -> None:
    page = comparison_page("t", [make_run(0)])
    assert "nothing is compared" in page_text(page.to_html())
    assert [figure.name for figure in page.figures] == ["curve-click", "reliability-click"]


def test_what_was_not_measured_is_left_out_or_a_dash() -> None:
    bare = replace(
        make_run(0),
        metrics={"click": {"auc": math.nan, "logloss": 0.2}},
        intervals={},
        history=[],
        reliability={},
        flops=None,
        dense_params=None,
        embedding_params=None,
        seconds=None,
        rows_per_second=None,
        config="",
        options="",
    )
    page = comparison_page("t", [bare, replace(bare, name="other", metrics={"click": {"logloss": 0.3}})])
    html = page.to_html()
    text = page_text(html)
    assert "No model has a test AUC" in text
    assert "nan" not in text.lower()
    assert "None" not in text
    assert page.figures == []
    assert [column.name for column in page.tables[0].columns] == ["Model", "AUC", "Log loss"]
    assert len(page.tables) == 1  # no cost is known


def test_an_unknown_metric_is_shown_under_its_own_name() -> None:
    run = make_run(0)
    metrics = {"click": {"novel": 0.5, "hit@3": 0.3, "auc": 0.7}}
    page = comparison_page("t", [replace(run, metrics=metrics)])
    names = [column.name for column in page.tables[0].columns]
    assert names[-2:] == ["Hit@3", "novel"]
    assert page.tables[0].columns[-2].best == "max"


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        comparison_page("t", [])
    with pytest.raises(ValueError, match="no run has a metric"):
        comparison_page("t", [replace(make_run(0), metrics={}, valid_metrics={})])


def test_a_level_is_shown_as_it_is() -> None:
    runs = [plain_run(0, difference=0.1), plain_run(1)]
    assert "97.5% interval" in page_text(
        comparison_page("t", runs, reference="model 1", level=0.975).to_html()
    )


def test_same_runs_same_bytes_and_same_tables_in_markdown() -> None:
    runs = [make_run(i, difference=0.001) for i in range(2)]
    page, again = comparison_page("t", runs), comparison_page("t", runs)
    assert page.to_html() == again.to_html()
    markdown = page.to_markdown()
    assert "| model 0 (rank 64) | **0.7400 (0.7380 to 0.7420)** |" in markdown
    assert "](auc-click.svg)" in markdown


def test_a_run_keeps_its_colour_in_all_plots() -> None:
    runs = [make_run(0), replace(make_run(1), history=[]), make_run(2)]
    drawn = comparison_plots(runs)
    third = "#0fa1a6"
    for name in ("auc-click", "cost", "curve-click", "reliability-click"):
        figure, _, _ = drawn[name]
        colours = {line.get_color() for axes in figure.axes for line in axes.lines}
        assert third in colours, name


def test_a_single_runs_page() -> None:
    features = [
        FeatureSummary(name=HOSTILE, kind="categorical", source="user", rows=12_000, width=16, missing=0.125),
        FeatureSummary(name="age", kind="numeric"),
    ]
    run = make_run(0, tasks=("click", "save"))
    page = run_page(
        "My run", run, features=features, next_steps=[("Predict:", "mldcn predict runs/a log.csv")]
    )
    text = page_text(page.to_html())
    metrics, cost, overview = page.tables
    assert [(row[0], row[1]) for row in metrics.rows] == [
        ("click", "validation"),
        ("click", "test"),
        ("save", "validation"),
        ("save", "test"),
    ]
    assert "<strong>" not in metrics.html("k")  # nothing is best where there is one model
    assert "12.5%" in text
    assert "12,000" in text
    assert "mldcn predict runs/a log.csv" in text
    assert len(cost.rows) == 1
    assert overview.rows[1][3:] == [None, None, None]


def test_a_browser_draws_the_page_without_scrolling_sideways(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: the page is not drawn")
    page = comparison_page(
        "A comparison", [make_run(i, difference=0.001) for i in range(6)], reference="model 1"
    )
    page.write(tmp_path / "report.html")
    # The page itself runs no script; a page around it measures it, as a phone and a laptop show it.
    measure = "".join(
        f"<iframe id=w{width} src=report.html style='border:0;width:{width}px;height:900px'></iframe>"
        for width in (390, 1280)
    )
    script = (
        "onload = () => { for (const f of document.querySelectorAll('iframe')) {"
        " const d = f.contentDocument.documentElement;"
        " const widths = [...f.contentDocument.querySelectorAll('svg')].map(s => s.getBoundingClientRect().right);"
        " const right = Math.ceil(Math.max(...widths));"
        " document.body.dataset[f.id] = [d.scrollWidth, d.clientWidth, widths.length, right]; } }"
    )
    (tmp_path / "around.html").write_text(
        f"<body>{measure}<script>{script}</script></body>", encoding="utf-8"
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command += [f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "around.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.findall(r'data-w(\d+)="(\d+),(\d+),(\d+),(\d+)"', done.stdout)
    assert len(found) == 2, done.stderr[-2000:]
    for width, content, shown, pictures, right in (map(int, row) for row in found):
        assert content <= shown, f"the page is wider than a screen of {width}"
        assert pictures == 4
        assert right <= width
