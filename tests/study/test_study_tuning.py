import json
from dataclasses import replace

import pytest
from study_cases import row

from mldcn.study.recipe import Range
from mldcn.study.tuning import STARTUP, Pruned, Pruning, inside, propose

SPACE = {
    "lr": Range(low=1e-4, high=1e-2, log=True),
    "layers": Range(low=1, high=4, integer=True),
    "hidden": ([64, 32], []),
}


def tried(count, quality=lambda settings: 0.5):
    rows = []
    for trial in range(count):
        settings = propose(SPACE, rows, trial, higher=True)
        value = quality(settings)
        rows.append(row(stage="tune", trial=trial, settings=settings, curve=((1, 0.5), (2, value))))
    return rows


def test_proposals_depend_on_the_rows_and_the_seed_alone():
    rows = tried(6)
    assert propose(SPACE, rows, 9, higher=True) == propose(SPACE, list(rows), 9, higher=True)
    assert propose(SPACE, rows, 9, higher=True) != propose(SPACE, rows, 10, higher=True)
    assert all(inside(SPACE, each.settings) for each in rows)


def test_proposals_gather_where_trials_were_good():
    low = {}
    for sign in (-1, 1):
        rows = tried(40, lambda settings, sign=sign: 0.9 + sign * settings["lr"])
        low[sign] = sum(row.settings["lr"] < 0.001 for row in rows[10:])
    assert low[-1] > low[1] + 10


def test_trials_outside_of_the_space_are_no_model_for_others():
    odd = row(stage="tune", trial=0, settings={"lr": 0.5, "layers": 1, "hidden": []})
    assert not inside(SPACE, odd.settings)
    assert propose(SPACE, [odd], 3, higher=True) == propose(SPACE, [], 3, higher=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr": 1e-3, "layers": 2, "hidden": []}, True),
        ({"lr": 1e-3, "layers": 2.5, "hidden": []}, False),
        ({"lr": True, "layers": 2, "hidden": []}, False),
        ({"lr": 1e-3, "layers": 2, "hidden": [1]}, False),
        ({"lr": 1e-3, "layers": 2}, False),
    ],
)
def test_inside(settings, expected):
    assert inside(SPACE, settings) is expected


def evaluated(observer, values):
    for step, value in enumerate(values, 1):
        observer.evaluated(step, {"click": {"auc": value}}, best=False)


def pruning(tmp_path, rows):
    return Pruning(("click", "auc"), SPACE, rows, tmp_path / "history.jsonl", higher=True)


def test_a_trial_below_the_median_is_stopped(tmp_path):
    rows = [replace(r, curve=((1, 0.6), (2, 0.6 + i / 100))) for i, r in enumerate(tried(5))]
    with pytest.raises(Pruned):
        evaluated(pruning(tmp_path, rows), [0.5, 0.55])
    evaluated(pruning(tmp_path, rows), [0.5])  # the first evaluation stops nobody
    evaluated(pruning(tmp_path, rows), [0.5, 0.63])


def test_the_first_trials_are_not_stopped(tmp_path):
    rows = [replace(r, curve=((1, 0.6), (2, 0.7))) for r in tried(STARTUP - 1)]
    evaluated(pruning(tmp_path, rows), [0.1, 0.1])


def test_an_interrupted_trial_is_judged_by_what_it_had_before(tmp_path):
    rows = [replace(r, curve=((10, 0.6), (20, 0.7))) for r in tried(5)]
    observer = pruning(tmp_path, rows)
    lines = [{"step": step, "metrics": {"click": {"auc": 0.5}}} for step in (10, 20)]
    observer.history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    observer.started("trial", 100, 10)
    assert observer.count == 1  # the second was after the checkpoint, and is made again
    with pytest.raises(Pruned):
        observer.evaluated(20, {"click": {"auc": 0.5}}, best=False)
