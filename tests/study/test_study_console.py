import dataclasses

import pytest
from rich.console import Console
from study_cases import recipe, row

from mldcn import study_console
from mldcn.study.engine import PlanLine, Standing
from mldcn.study.rows import Facts, Study
from mldcn.study_console import StudyProgress, duration, outcome, results_table

FACTS = Facts(
    dataset="pinads",
    log={},
    rows={"train": 3200, "valid": 400, "test": 400},
    features=25,
    task="click",
    monitor="click/auc",
    higher_is_better=True,
    threads=1,
    jobs=2,
    device="cpu",
    machine="a machine",
    versions={},
    seconds=5.0,
)
ROWS = (
    row(trial=0),
    row(trial=0, seed=1, test={"auc": 0.63}),
    row(trial=0, seed=2, test=None, diverged=True, valid={}, curve=()),
)


@pytest.fixture
def study(tmp_path):
    return Study(recipe(), ROWS, tmp_path, FACTS)


def test_a_line_says_what_a_run_came_to(study):
    assert outcome(study, ROWS[0]) == "dnn at 20k, seed 0: validation click/auc 0.60000, 1 s"
    assert outcome(study, ROWS[2]) == "dnn at 20k, seed 2: broke down, 1 s"
    stopped = row(stage="tune", trial=3, pruned=True)
    assert outcome(study, stopped) == "dnn at 20k, trial 3: validation click/auc 0.60000, stopped early, 1 s"


def printed(shown):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_the_table_so_far_holds_means_and_counts(study):
    text = printed(results_table(study))
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "0.6200 (2)" in lines["dnn"]
    assert lines["mldcn"].count("–") == 2


def test_without_a_terminal_there_are_plain_lines(study, monkeypatch, capsys):
    monkeypatch.setattr(study_console, "err", Console(stderr=True, width=200))
    shown = StudyProgress()
    line = PlanLine("dnn", "20k", "hidden=59", 20_010, 0.0005, 10_000, 2, 1, 12.0)
    standing = Standing(0, 3, 200.0, (), dataclasses.replace(study, rows=()))
    shown.planned([line], standing)
    plan = capsys.readouterr()
    assert "3,200 train, 400 valid, 400 test rows; 0 runs finished, 3 left, about 3 min" in plan.out
    assert "20,010" in plan.out
    assert "+0.05%" in plan.out
    shown.moved(standing, None)
    shown.moved(Standing(1, 2, 100.0, ("dnn at 20k, seed 1",), study), ROWS[0])
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "dnn at 20k, seed 0: validation click/auc 0.60000, 1 s; 1 runs finished, 2 left, about 2 min"
    ]


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
