import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from mldcn.config import Config, parse
from mldcn.datasets.pinads import PinadsConfig, write_log
from mldcn.errors import UserError
from mldcn.files import locked
from mldcn.run import RunFolder
from mldcn.study import load_recipe, run_study
from mldcn.study.engine import Job, _best_trial
from mldcn.study.recipe import nested, overlay

RECIPE = {
    "title": "small",
    "dataset": "pinads",
    "config": {
        "model": {"embedding": {"dim": 4}},
        "training": {"batch_size": 256, "epochs": 1, "monitor": "click/auc"},
    },
    "rivals": {
        "mldcn": {"interaction": {"name": "mldcn", "num_layers": 1, "rank": 24}},
        "dnn": {"interaction": {"name": "dnn", "hidden": [32]}},
    },
    "search": {"model.embedding.dropout": [0.0, 0.1]},
    "seeds": [0, 1],
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    write_log(folder, 4000, PinadsConfig(num_users=300, num_items=100))
    return folder


def test_a_study_runs_its_plan_once_and_grows(log, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    said = []
    rows = run_study(load_recipe(recipe), log, tmp_path / "out", jobs=2, say=said.append)
    assert [row.rival for row in rows] == ["mldcn", "dnn"]
    assert abs(rows[1].flops / rows[0].flops - 1) < 0.01
    assert all(len(row.values("auc")) == 2 for row in rows)
    assert "4 runs, 0 finished before" in said
    assert "4 runs, 2 finished before" in said  # the best trial's first seed is not trained again
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written[0]["test"] == rows[0].test
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
    assert "| mldcn |" in (tmp_path / "out" / "results.md").read_text()
    again = []
    run_study(load_recipe(recipe), log, tmp_path / "out", say=again.append)
    assert "4 runs, 4 finished before" in again
    changed = {**RECIPE, "search": {"model.embedding.dropout": [0.0, 0.2]}}
    recipe.write_text(yaml.safe_dump(changed, sort_keys=False))
    with pytest.raises(UserError, match="trial-01-seed-0: holds a run of another config"):
        run_study(load_recipe(recipe), log, tmp_path / "out")


POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from mldcn.study.engine import _end_with_parent

def work(_):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        list(pool.map(work, range(3)))
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_study_leaves_no_process(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    study = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(study.stdout.readline())
    assert alive(worker)
    study.send_signal(signal.SIGKILL)
    study.communicate()  # ends when nobody can write to the pipe any more: the worker neither
    assert not alive(worker)


def test_a_study_in_use_is_refused(log, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    with ThreadPoolExecutor(1) as other, locked(tmp_path / "out"):
        study = other.submit(run_study, load_recipe(recipe), log, tmp_path / "out")
        with pytest.raises(UserError, match=f"out: in use by process {os.getpid()}"):
            study.result()


@pytest.mark.parametrize(("metric", "best"), [("logloss", 1), ("auc", 2)])
def test_the_best_trial_follows_the_metric_s_direction(tmp_path, metric, best):
    config = parse(
        Config,
        {
            "schema": {"features": [{"name": "a", "kind": "numeric"}], "labels": [{"name": "click"}]},
            "training": {"monitor": metric},
        },
        "test",
    )
    jobs = []
    for trial, value in enumerate((float("nan"), 0.4, 0.6)):
        jobs.append(Job("dnn", trial, 0, tmp_path / str(trial), config))
        RunFolder(tmp_path / str(trial)).write_json("metrics.json", {"valid": {"click": {metric: value}}})
    assert _best_trial(jobs) == best


def test_wrong_recipes_are_refused(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "reference": "wukong"}))
    with pytest.raises(UserError, match="is none of the rivals"):
        load_recipe(file)
    file.write_text(yaml.safe_dump({**RECIPE, "seed": 1}))
    with pytest.raises(UserError, match="did you mean 'seeds'"):
        load_recipe(file)


def test_shipped_recipes_load(request):
    for file in (request.config.rootpath / "recipes").glob("*.yaml"):
        recipe = load_recipe(file)
        assert recipe.reference in recipe.rivals


def test_overlay_and_nested():
    assert nested({"a.b": 1, "a.c": 2}) == {"a": {"b": 1, "c": 2}}
    assert overlay({"a": {"b": 1}, "d": [1]}, {"a": {"c": 2}, "d": [2]}) == {"a": {"b": 1, "c": 2}, "d": [2]}
