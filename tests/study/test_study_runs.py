"""Real runs of a study: processes, kills, what a row holds."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from study_cases import RECIPE, in_turns, recipe, row

from mldcn.errors import UserError
from mldcn.run import RunFolder
from mldcn.study import engine, load_recipe, run_study
from mldcn.study.bench import Bench
from mldcn.study.rows import read_rows
from mldcn.study.running import Measure, Train
from mldcn.study.tuning import STARTUP

ONE_BUDGET = {"budgets": [{"flops": 20_000}]}


def bench(folder, **changes):
    return Bench.open(recipe(**ONE_BUDGET, **changes), None, folder)


def train(opened, job):
    runs = Train(opened.recipe, opened.out, "click", opened.higher, opened.attainable)
    return runs(job)


def test_a_final_run_s_row_says_what_its_folder_says(folder):
    opened = bench(folder)
    job = opened.planner.final("mldcn", -1, {})[0]
    found = train(opened, job)
    run = RunFolder.open(folder / found.run)
    info, metrics = run.info(), run.read_json("metrics.json")
    assert (found.valid, found.test) == (metrics["valid"]["click"], metrics["test"]["click"])
    assert (found.flops, found.parameters) == (info["flops"], info["parameters"])
    assert (found.steps, found.seconds, found.epochs) == (info["steps"], info["train_seconds"], 2)
    assert found.curve[-1][0] == found.steps
    assert found.best(higher=True) == found.valid["auc"]
    assert found.model_flops == pytest.approx(20_000, rel=0.01)
    assert found.residual == pytest.approx(found.model_flops / 20_000 - 1)
    assert found.interaction["rank"] == job.config.model.interaction["rank"]
    assert found.interaction["mask_ratio"] == 0.5  # spelled out
    assert found.attainable["auc"] > found.test["auc"]
    assert run.predictions.exists()
    assert train(opened, job) == found  # it is not trained again
    measured = Measure((1, 8))(job)
    assert measured.memory_bytes > 4 * sum(found.parameters.values())
    assert set(measured.latency_ms) == {1, 8}
    assert all(0 < times["median"] <= times["p99"] for times in measured.latency_ms.values())


def test_trials_read_no_test_row(folder):
    opened = bench(folder)
    job = opened.planner.trial("dnn", [], higher=True)
    found = train(opened, job)
    run = RunFolder.open(folder / found.run)
    assert found.test is None
    assert set(run.read_json("metrics.json")) == {"valid"}
    assert not run.predictions.exists()
    assert found.seed == recipe().tuning.seed not in recipe().seeds


def test_a_trial_below_the_others_is_stopped(folder):
    opened = bench(
        folder, config={**RECIPE["config"], "training": {"batch_size": 256, "epochs": 5, "patience": 9}}
    )
    better = [
        row(stage="tune", trial=i, curve=tuple((13 * n, 0.9 + i / 100) for n in range(1, 6)))
        for i in range(STARTUP)
    ]
    job = replace(opened.planner.trial("dnn", [], higher=True), before=tuple(better))
    found = train(opened, job)
    assert found.pruned
    assert not found.diverged
    assert (found.epochs, found.steps, len(found.curve)) == (2, 26, 2)
    assert found.valid["auc"] == found.best(higher=True)
    assert found.test is None
    assert not RunFolder(folder / found.run).checkpoints.exists()


def test_a_run_that_breaks_down_has_a_row(folder):
    training = {
        "batch_size": 256,
        "epochs": 2,
        "optimiser": {"lr": 1e30, "clip_norm": None},
        "recovery": {"tries": 1},
    }
    opened = bench(folder, config={**RECIPE["config"], "training": training})
    found = train(opened, opened.planner.final("dnn", -1, {})[0])
    assert found.diverged
    assert found.troubles == 2  # one was taken back
    assert (found.valid, found.test) == ({}, None)


def test_a_folder_with_a_run_of_another_config_is_refused(folder):
    opened = bench(folder)
    job = opened.planner.final("dnn", -1, {})[0]
    train(opened, job)
    other = bench(folder, config={"training": {"batch_size": 512}})
    with pytest.raises(UserError, match="seed-0: holds a run of another config.* Remove the folder"):
        train(other, other.planner.final("dnn", -1, {})[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_study_killed_by_the_system_leaves_no_process_and_ends_as_an_undisturbed_one(
    folder, tmp_path, monkeypatch
):
    small = {**RECIPE, **ONE_BUDGET, "rivals": {"dnn": RECIPE["rivals"]["dnn"]}}
    small["tuning"] = {"trials": 1}
    small["seeds"] = [0, 1]
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(small))
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(folder, undisturbed)
    start = [sys.executable, "-c", "from mldcn.cli import main; main()"]
    command = [*start, "study", str(file), "--out", str(folder), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not read_rows(folder / "rows.jsonl") and process.poll() is None:
        time.sleep(0.05)
    workers = children(process.pid)
    assert any(alive(worker) for worker in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30
    while any(alive(worker) for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)
    before = read_rows(folder / "rows.jsonl")
    assert 0 < len(before) < 3

    in_processes = engine.run_ready
    monkeypatch.setattr(
        engine,
        "run_ready",
        lambda ready, run, *rest: (in_processes if isinstance(run, Train) else in_turns)(ready, run, *rest),
    )
    found = run_study(load_recipe(file), None, folder, jobs=2)
    monkeypatch.setattr(engine, "run_ready", in_turns)
    expected = run_study(load_recipe(file), None, undisturbed, jobs=1)
    assert len(expected.rows) == 3
    assert [untimed(each) for each in found.rows[: len(before)]] == [untimed(each) for each in before]
    assert sorted(map(untimed, found.rows)) == sorted(map(untimed, expected.rows))


def untimed(each):
    """A row without what a clock says."""
    return str(replace(each, seconds=0.0, latency_ms=None, memory_bytes=None, memory_how=None))


def children(pid):
    """The processes that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
