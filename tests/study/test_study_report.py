from __future__ import annotations

import csv
import math
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import BUDGETS, RIVALS, ablation_recipe, sample_study, scaling_recipe, single_recipe

from mldcn.report.blocks import Callout, Details, Figure, Heading
from mldcn.report.page import Page
from mldcn.study.outline import Outline
from mldcn.study.quoted import read_quoted
from mldcn.study.report import StudyReport, write_report
from mldcn.study.rows import Study
from mldcn.study.statistics import summarise
from mldcn.study.wording import pair

FEW = {name: {"interaction": {"name": name}} for name in RIVALS[:3]}
TWO = [{"flops": flops} for flops in BUDGETS[:2]]


def small_recipe(**changes):
    return scaling_recipe(**{"rivals": FEW, "budgets": TWO, "limits": {}, "tuning": None, **changes})


def page_of(study: Study) -> Page:
    return StudyReport(study, summarise(study)).page()


def moved(study: Study, rival: str, by: float, scatter: float = 0.0) -> Study:
    """The study with a rival's test AUC moved away from the baseline's, seed by seed."""
    base = {
        (row.point, row.seed): row.test["auc"] for row in study.final if row.rival == study.recipe.baseline
    }
    rows = []
    for row in study.rows:
        if row.stage == "final" and row.rival == rival:
            auc = base[row.point, row.seed] + by + scatter * (row.seed - 1)
            row = replace(row, test={**row.test, "auc": auc})
        rows.append(row)
    return replace(study, rows=tuple(rows))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study of seven rivals at four budgets with 196 runs, all their folders at hand."""
    recipe = scaling_recipe(seeds=[0, 1, 2, 3, 4])
    study = sample_study(recipe, tmp_path_factory.mktemp("large"), folders=True, attainable=0.8)
    assert len(study.rows) == 196
    return page_of(study).write(study.out / "study.html")


def test_a_large_studys_page_stands_alone_and_is_small(large: Path) -> None:
    text = large.read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    assert set(re.findall(r"https?://[^\"' <]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "<script" not in text
    assert not re.findall(r"(?:src|href)=\"(?!#)", text)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_every_runs_config_is_in_a_large_studys_page_behind_a_click(large: Path) -> None:
    text = large.read_text(encoding="utf-8")
    for rival in RIVALS:
        for point in ("50k", "150k", "450k", "1.25M"):
            summary = f"{rival} at {point}, seed 0; that of 1, 2, 3, 4 differs by training.seed alone"
            assert f"<summary>{summary}</summary>" in text
        assert f"<summary>{rival} at 150k, 8 trials</summary>" in text
    assert text.count("feature_109") == 7 * 4 + 7 * 8  # a config a model, and one a trial


def test_sections_come_in_the_readers_order(tmp_path: Path) -> None:
    recipe = small_recipe(limits={"broken_runs": 0})
    page = page_of(sample_study(recipe, tmp_path, folders=True))
    found = [block.text for block in page.blocks if isinstance(block, Heading) and block.level == 2]
    assert found == [
        "Gains against cost",
        "Gains",
        "Rivals against each other",
        "Slopes and saturation",
        "Best for their cost",
        "Constraints",
        "Learning curves",
        "Cost",
        "Calibration",
        "How to read this",
        "Protocol",
        "Effort",
        "Runs",
    ]
    assert isinstance(page.blocks[0], Callout)


def test_files_beside_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "gain-of-old.svg").write_text("old", encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    study = sample_study(small_recipe(budgets=[{"flops": 1e6}]), tmp_path)
    assert write_report(study) == folder / "study.html"
    names = {path.name for path in folder.iterdir()}
    pictures = {name.removesuffix(".svg") for name in names if name.endswith(".svg")}
    assert pictures == {name.removesuffix(".png") for name in names if name.endswith(".png")}
    assert {"gains", "gain-by-memory", "curves-1m", "flops-1m", "parameters-1m"} <= pictures
    assert {"gains-auc.csv", "gains-logloss.csv", "power.csv", "runs.csv", "effort.csv", "cost.csv"} <= names
    assert "gain-of-old.svg" not in names  # of an earlier report
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    text = (folder / "study.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)]*\.svg)\)", text))
    assert linked == {f"{name}.svg" for name in pictures}
    assert "\n## Protocol" in text
    assert "Configs" not in text  # of 200 runs they would make up most of it
    assert (folder / "gains.png").read_bytes().startswith(b"\x89PNG")


def test_gains_are_means_over_seeds_of_paired_differences(tmp_path: Path) -> None:
    study = sample_study(small_recipe(), tmp_path)
    table = next(table for table in page_of(study).tables if table.name == "gains-auc")
    rows = {(row["Model"], row["Model detail"]): row for row in csv.DictReader(table.csv().splitlines())}
    assert list(rows)[:3] != list(rows)[3:]
    assert {point for _, point in list(rows)[:3]} == {"50k"}  # a budget after the other
    auc = {(row.rival, row.point, row.seed): row.test["auc"] for row in study.final}
    for (rival, point), row in rows.items():
        values = [auc[rival, point, seed] for seed in (0, 1, 2)]
        assert float(row["Test AUC"]) == pytest.approx(statistics.fmean(values))
        assert float(row["Deviation (over seeds)"]) == pytest.approx(statistics.stdev(values))
        if (rival, point) == ("dcnv2", "50k"):
            assert row["Reading"] == "baseline"
            assert row["AUC gain (95 % interval)"] == ""
            continue
        paired = [auc[rival, point, seed] - auc["dcnv2", "50k", seed] for seed in (0, 1, 2)]
        half = 4.302653 * statistics.stdev(paired) / math.sqrt(3)  # Student's t, two degrees of freedom
        assert float(row["AUC gain (95 % interval)"]) == pytest.approx(statistics.fmean(paired))
        assert float(row["AUC gain (95 % interval) low"]) == pytest.approx(statistics.fmean(paired) - half)
        assert float(row["AUC gain (95 % interval) high"]) == pytest.approx(statistics.fmean(paired) + half)


def test_a_drop_of_the_log_loss_is_a_gain(tmp_path: Path) -> None:
    study = moved(sample_study(small_recipe(), tmp_path), "mldcn", 0.0)
    rows = tuple(
        replace(row, test={**row.test, "logloss": 0.40 if row.rival == "mldcn" else 0.41 + 0.001 * row.seed})
        for row in study.rows
    )
    table = next(t for t in page_of(replace(study, rows=rows)).tables if t.name == "gains-logloss")
    found = next(csv.DictReader(table.csv().splitlines()))
    assert found["Model"] == "mldcn"  # the lowest is the first
    assert float(found["Log loss drop (95 % interval)"]) == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("by", "scatter", "said", "unsaid"),
    [
        (
            0.01,
            1e-5,
            ["mldcn has the best test AUC at all 2 budgets", "by +0.01", ": shown."],
            ["not shown after"],
        ),
        (0.0002, 1e-3, ["not told apart"], [": better", "shown to beat all others"]),
    ],
)
def test_the_finding_claims_what_its_intervals_bear_out(
    tmp_path: Path, by: float, scatter: float, said: list[str], unsaid: list[str]
) -> None:
    rivals = {name: FEW[name] for name in ("mldcn", "dcnv2")}
    study = sample_study(small_recipe(rivals=rivals), tmp_path)
    study = moved(study, "mldcn", by, scatter)
    first = page_of(study).blocks[0]
    assert isinstance(first, Callout)
    text = f"{first.title} {first.text}"
    for each in said:
        assert each in text
    for each in unsaid:
        assert each not in text
    assert "a gain of 0.001 could" in text  # or could not: the page says which


def test_a_lead_is_the_same_from_both_sides(tmp_path: Path) -> None:
    study = sample_study(small_recipe(), tmp_path)
    outline = Outline(study, summarise(study))
    one, other = (pair(outline, b, a, "50k") for b, a in (("mldcn", "dcnv2"), ("dcnv2", "mldcn")))
    assert one is not None
    assert other is not None
    assert (one.estimate.value, one.estimate.low, one.estimate.high) == pytest.approx(
        (-other.estimate.value, -other.estimate.high, -other.estimate.low)
    )
    assert pair(outline, "mldcn", "dcnv2", "nowhere") is None


def test_pairs_are_shown_as_gains_of_the_one_ahead(tmp_path: Path) -> None:
    study = moved(sample_study(small_recipe(), tmp_path), "dcnv2_lowrank", -0.02, 1e-5)
    page = page_of(study)
    rows = list(csv.DictReader(next(t for t in page.tables if t.name == "pairs-50k").csv().splitlines()))
    assert len(rows) == 3
    for row in rows:
        value, low, high = (float(row[f"AUC gain (95 % interval){end}"]) for end in ("", " low", " high"))
        assert value >= 0
        assert low <= value <= high
    assert {row["against"] for row in rows[:2]} == {"dcnv2_lowrank"}
    beats = next(t for t in page.tables if t.name == "beats")
    assert [row[0] for row in beats.rows] == list(FEW)
    assert "behind" in str(beats.rows[2][1])


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.6])
def test_an_unfinished_study_has_a_page(tmp_path: Path, keep: float) -> None:
    study = sample_study(small_recipe(limits={"broken_runs": 0}), tmp_path, keep=keep)
    text = page_of(study).to_html()
    left = 18 - len(study.final)
    if keep == 0.0:
        assert "No final run is finished yet" in text
    assert f"{left} final runs still to come" in text
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL).lower()


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    study = sample_study(small_recipe(seeds=[0]), tmp_path)
    page = page_of(study)
    table = next(t for t in page.tables if t.name == "gains-auc")
    assert all(
        not row.get("AUC gain (95 % interval) low") for row in csv.DictReader(table.csv().splitlines())
    )
    text = page.to_markdown()
    assert "no interval" in text
    assert "shown to beat all others" not in text


def test_a_run_that_broke_down_is_named(tmp_path: Path) -> None:
    study = sample_study(small_recipe(), tmp_path)
    first = next(row for row in study.rows if row.rival == "mldcn")
    broken = replace(first, diverged=True, valid={}, test=None, curve=(), troubles=3)
    study = replace(study, rows=(broken, *(row for row in study.rows if row is not first)))
    page = page_of(study)
    assert "mldcn at 50k: broke down with seeds 0" in page.to_markdown()
    runs = list(csv.DictReader(next(t for t in page.tables if t.name == "runs").csv().splitlines()))
    assert [row["End"] for row in runs].count("broke down") == 1


def test_an_ablation_stands_beside_quoted_figures_not_among_them(tmp_path: Path) -> None:
    study = sample_study(ablation_recipe(), tmp_path)
    page = page_of(study)
    table = next(t for t in page.tables if t.name == "ablation-rank")
    rows = list(csv.DictReader(table.csv().splitlines()))
    assert [row["Variant"] for row in rows] == ["rank=16", "rank=32", "rank=64", "rank=96"]
    quoted = "AUC gain (quoted: An imagined paper, Table 9)"
    assert [row[quoted] for row in rows] == ["0.0005", "0.0006", "0.0007", ""]
    measured = [float(row["AUC gain (measured here, 95 % interval)"]) for row in rows]
    assert not set(measured) & {0.0005, 0.0006, 0.0007}
    names = {figure.name for figure in page.figures}
    assert {"ablation-rank", "ablation-mask", "quoted-rank"} <= names
    assert "quoted-mask" not in names  # one figure is no line
    picture = next(figure for figure in page.figures if figure.name == "ablation-mask")
    for value in ("none", "first", "first_relu", "full"):
        assert f">{value}</text>" in picture.svg


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ({}, []),
        (
            {"source": "A", "what": "gain", "values": {"x": 1, "y": 0.5}},
            [("A", "gain", {"x": 1.0, "y": 0.5})],
        ),
        (
            {"source": "A", "values": {"x": {"HIT": 0.1, "memory": 70}, "y": {"HIT": 0.3}}},
            [("A", "HIT", {"x": 0.1, "y": 0.3}), ("A", "memory", {"x": 70.0})],
        ),
        (
            {
                "tables": [
                    {"source": "A", "what": "g", "values": {"x": 1}},
                    {"source": "B", "what": "g", "values": {"x": 2}},
                ]
            },
            [("A", "g", {"x": 1.0}), ("B", "g", {"x": 2.0})],
        ),
    ],
)
def test_what_a_recipe_quotes(raw: dict, found: list) -> None:
    assert [(each.source, each.what, each.values) for each in read_quoted(raw)] == found


def test_models_are_held_against_the_limits(tmp_path: Path) -> None:
    recipe = small_recipe(limits={"device_memory_gb": 0.25, "memory_percent": 15})
    page = page_of(sample_study(recipe, tmp_path))
    rows = list(csv.DictReader(next(t for t in page.tables if t.name == "constraints").csv().splitlines()))
    memory = [row["training memory (<= 15 %)"] for row in rows]
    assert len(memory) == 6
    assert {text[0] for text in memory} == {"✓", "✗"}
    for text in memory:
        assert (float(text[1:].split("%")[0]) <= 15) == (text[0] == "✓")
    assert any(isinstance(block, Callout) and block.title.startswith("Recommended") for block in page.blocks)


def test_many_rivals_at_one_budget_are_ranked(tmp_path: Path) -> None:
    page = page_of(sample_study(single_recipe(10), tmp_path))
    names = {figure.name for figure in page.figures}
    assert {"gains", "gain-by-memory", "curves-1m-1", "curves-1m-2"} <= names
    assert "gain-by-flops" not in names  # all cost the same


def test_settings_side_by_side_have_their_names_on_the_axis(tmp_path: Path) -> None:
    budgets = [{"name": "Monday"}, {"name": "Tuesday"}]
    page = page_of(sample_study(small_recipe(match="none", budgets=budgets), tmp_path))
    picture = next(figure for figure in page.figures if figure.name == "gain-by-setting")
    assert ">Monday</text>" in picture.svg
    assert isinstance(page.blocks[0], Callout)
    assert page.blocks[0].title.endswith(" at Monday")  # where the baseline is, not the last
    curves = [figure.name for figure in page.figures if figure.name.startswith("curves")]
    assert curves == ["curves-monday", "curves-tuesday"]


def test_texts_of_a_recipe_are_escaped(tmp_path: Path) -> None:
    study = sample_study(small_recipe(title="<script>alert(1)</script> & | `x`"), tmp_path)
    page = page_of(study)
    assert "<script" not in page.to_html()
    assert "&lt;script&gt;alert(1)" in page.to_html()
    assert "<script" not in page.to_markdown().split("<summary>")[0]


def test_figures_keep_a_rivals_style(tmp_path: Path) -> None:
    study = sample_study(small_recipe(), tmp_path)
    without = replace(
        study, rows=tuple(row for row in study.rows if row.rival != "mldcn" or row.point == "50k")
    )
    outline = Outline(without, summarise(without))
    (_, second) = outline.groups()
    assert [(member.label, member.style) for member in second.members] == [("dcnv2", 1), ("dcnv2_lowrank", 2)]


def test_folded_figures_are_figures_of_the_page(tmp_path: Path) -> None:
    page = page_of(sample_study(small_recipe(), tmp_path))
    folded = [
        block for block in page.blocks if isinstance(block, Details) and "other budgets" in block.summary
    ]
    assert folded
    assert {"curves-50k", "curves-150k"} <= {
        figure.name for figure in page.figures if isinstance(figure, Figure)
    }


@pytest.mark.parametrize(("scheme", "background"), [(1, "rgb(255, 255, 255)"), (0, "rgb(20, 23, 28)")])
def test_a_browser_draws_the_page_without_scrolling_sideways(
    large: Path, tmp_path: Path, scheme: int, background: str
) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: the page is not drawn")
    shutil.copy(large, tmp_path / "study.html")
    # The page itself runs no script; a page around it measures it, as a phone and a laptop show it.
    frames = "".join(
        f"<iframe id=w{width} src=study.html style='border:0;width:{width}px;height:900px'></iframe>"
        for width in (390, 1280)
    )
    script = (
        "onload = () => { for (const f of document.querySelectorAll('iframe')) {"
        " const d = f.contentDocument, e = d.documentElement;"
        " const drawn = [...d.querySelectorAll('svg')].map(s => s.getBoundingClientRect().right);"
        " document.body.dataset[f.id] = [e.scrollWidth, e.clientWidth, drawn.length,"
        " Math.ceil(Math.max(...drawn)), getComputedStyle(d.body).backgroundColor].join('|'); } }"
    )
    around = tmp_path / "around.html"
    around.write_text(f"<body>{frames}<script>{script}</script></body>", encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command += [f"--screenshot={tmp_path / 'shot.png'}", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.findall(r'data-w(\d+)="(\d+)\|(\d+)\|(\d+)\|(\d+)\|([^"]*)"', done.stdout)
    assert len(found) == 2, done.stderr[-2000:]
    for width, content, shown, pictures, right, painted in found:
        assert int(content) <= int(shown), f"the page is wider than a screen of {width}"
        assert int(pictures) > 10
        assert int(right) <= int(width)
        assert painted == background
