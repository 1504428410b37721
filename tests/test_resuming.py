"""Wherever a run ends before its time, ``mldcn fit --resume`` makes of it what it would have been."""

import os
import shutil
import signal

import numpy as np
import polars as pl
import pytest
import yaml

from mldcn import cli, workflow
from mldcn.config import load_config
from mldcn.errors import UserError
from mldcn.files import locked
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.training import checkpoint, fit
from mldcn.training.observers import MLflow

ROWS = 2500
FILES = (
    "weights.safetensors",
    "metrics.json",
    "history.jsonl",
    "predictions.arrow",
    "calibrators.json",
    "reliability.json",
)


class Killed(BaseException):
    """Stands for a kill: nothing of the package handles it."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a config, its log, and a run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resuming")
    rng = np.random.default_rng(0)
    ad, hour = rng.integers(0, 12, ROWS), rng.integers(0, 24, ROWS)
    click = (rng.random(ROWS) < 1 / (1 + np.exp(-(0.4 * ad - 2.4)))).astype(int)
    pl.DataFrame({"ad": ad, "hour": hour, "click": click}).write_csv(folder / "log.csv")
    raw = {
        "data": {
            "train": [str(folder / "log.csv")],
            "split": {"kind": "hash", "valid": 0.2, "test": 0.2},
        },
        "schema": {
            "features": [
                {"name": "ad", "kind": "categorical", "source": "item"},
                {"name": "hour", "kind": "categorical", "source": "context"},
            ],
            "labels": [{"name": "click"}],
        },
        "model": {"embedding": {"dim": 4, "dropout": 0.1}, "interaction": {"rank": 2, "num_layers": 1}},
        "training": {
            "threads": 1,
            "epochs": 3,
            "patience": 2,
            "batch_size": 128,
            "checkpoint_steps": 4,
            "keep_checkpoints": 1,
            "ema": 0.9,
            "optimiser": {"lr": 0.02},
        },
        "evaluation": {"calibration": "isotonic"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    command("fit", folder / "config.yaml", "--out", folder / "whole")
    return folder


def command(*arguments):
    """Runs a command in this process; gives its exit code, where it leaves with one."""
    return cli.app([str(a) for a in arguments], standalone_mode=False)


def dying(monkeypatch, owner, name, call, *, after=False):
    """Ends the command before (or after) the n-th call of a function."""
    whole, calls = getattr(owner, name), iter(range(1, 10**6))

    def function(*arguments, **options):
        number = next(calls)
        if number == call and not after:
            raise Killed
        result = whole(*arguments, **options)
        if number == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, function)


POINTS = {
    "before the log is read": (workflow, "prepare", 1, False),
    "before training": (workflow, "fit", 1, False),
    "while the run is described": (RunFolder, "write_json", 1, False),
    "before the first checkpoint": (fit, "save_checkpoint", 1, False),
    "inside the first checkpoint": (checkpoint, "checksum", 1, False),
    "at the first step": (fit.Trainer, "_step", 1, False),
    "between two checkpoints": (fit.Trainer, "_step", 7, True),
    "inside a checkpoint": (checkpoint, "write_text", 5, False),
    "between a checkpoint's rename and pruning": (checkpoint, "sync_folder", 3, True),
    "in an evaluation": (fit, "evaluate", 2, False),
    "after better weights, before their checkpoint": (fit, "save_weights", 2, True),
    "after an evaluation, before its checkpoint": (fit.Trainer, "_validate", 2, True),
    "before the conclusion": (fit.Trainer, "_conclude", 1, False),
    "before the test rows are scored": (fit, "fit_calibrators", 1, True),
    "before it is finished": (RunFolder, "finish", 1, False),
    "after its manifest": (RunFolder, "write_info", 3, False),
    "before its checkpoints are removed": (RunFolder, "write_info", 3, True),
    "before its report": (workflow, "write_report", 1, False),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_cut_off_and_resumed_ends_the_same(work, tmp_path, monkeypatch, point):
    target = work / "cut"
    shutil.rmtree(target, ignore_errors=True)
    with monkeypatch.context() as patch:
        dying(patch, *POINTS[point][:3], after=POINTS[point][3])
        with pytest.raises(Killed):
            command("fit", work / "config.yaml", "--out", target)
    command("fit", "--resume", target)
    for name in FILES:
        assert (target / name).read_bytes() == (work / "whole" / name).read_bytes(), name
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in (work / "whole").iterdir())
    assert not list(work.glob(".*"))
    RunFolder.open(target)
    with pytest.raises(UserError, match="nothing to resume"):
        command("fit", "--resume", target)


@pytest.mark.parametrize("moment", [(fit.Trainer, "_step"), (workflow, "prepare"), (fit, "fit_calibrators")])
def test_ctrl_c_at_any_time_says_how_to_go_on(work, tmp_path, monkeypatch, capsys, moment):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*moment, interrupted)
        assert command("fit", work / "config.yaml", "--out", tmp_path / "run") == 130
    assert f"interrupted; go on with\n  mldcn fit --resume {tmp_path / 'run'}" in capsys.readouterr().err


def test_sigterm_ends_a_run_behind_the_step_with_a_checkpoint(work, tmp_path, monkeypatch):
    whole, calls = fit.Trainer._step, iter(range(100))

    def stepping(self, batch):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(fit.Trainer, "_step", stepping)
        assert command("fit", work / "config.yaml", "--out", tmp_path / "run") == 130
    states = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert states == ["step-000000000004", "step-000000000007-between"]
    command("fit", "--resume", tmp_path / "run")
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (work / "whole" / name).read_bytes(), name


def test_force_keeps_the_old_run_until_the_new_log_is_encoded(work, tmp_path, monkeypatch):
    target = tmp_path / "run"
    shutil.copytree(work / "whole", target)
    broken = tmp_path / "broken.csv"
    broken.write_text("ad,hour,click\n1,2,maybe\n")
    with pytest.raises(UserError, match="maybe"):
        command("fit", work / "config.yaml", "--out", target, "--force", "--set", f"data.train=['{broken}']")
    with monkeypatch.context() as patch:
        dying(patch, workflow, "prepare", 1, after=True)
        with pytest.raises(Killed):
            command("fit", work / "config.yaml", "--out", target, "--force")
    Predictor.load(target)
    with pytest.raises(UserError, match="holds a run already"):
        command("fit", work / "config.yaml", "--out", target)
    command("fit", work / "config.yaml", "--out", target, "--force", "--set", "training.epochs=1")
    assert load_config(RunFolder.open(target).config).training.epochs == 1


@pytest.mark.parametrize("how", ["new", "--resume", "--force"])
def test_a_run_that_another_process_writes_is_left_alone(work, tmp_path, how):
    from concurrent.futures import ThreadPoolExecutor

    target = tmp_path / "run"
    if how != "new":
        RunFolder.create(target, (work / "config.yaml").read_text())
    options = {
        "new": [work / "config.yaml", "--out", target],
        "--resume": ["--resume", target],
        "--force": [work / "config.yaml", "--out", target, "--force"],
    }[how]
    # The lock is a thread's, so another thread stands for another process.
    with ThreadPoolExecutor(1) as other, locked(target):
        error = other.submit(command, "fit", *options).exception()
    assert isinstance(error, UserError)
    assert str(error).startswith(f"{target}: in use by process")


@pytest.fixture
def cut(work, tmp_path, monkeypatch):
    """A run that was cut off behind its first evaluation."""
    target = tmp_path / "run"
    with monkeypatch.context() as patch:
        dying(patch, fit.Trainer, "_step", 20)
        with pytest.raises(Killed):
            command("fit", work / "config.yaml", "--out", target)
    return target


@pytest.mark.parametrize("file", ["encoder", "layout.json", "run.json"])
def test_damage_to_what_can_be_written_anew_is_mended(cut, work, file):
    path = cut / file
    for part in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        content = part.read_bytes()
        at = len(content) // 2
        # It has to stay readable, or this is refused: no number may begin with a zero.
        while file == "run.json" and content[at] not in b"23456789":
            at += 1
        part.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    command("fit", "--resume", cut)
    for name in FILES:
        assert (cut / name).read_bytes() == (work / "whole" / name).read_bytes(), name


def test_damage_to_what_cannot_is_refused(cut):
    history = (cut / "history.jsonl").read_bytes()
    (cut / "history.jsonl").write_bytes(history.replace(b"0.", b"1.", 1))
    with pytest.raises(UserError, match=r"history.jsonl: was damaged"):
        command("fit", "--resume", cut)


def test_a_changed_config_is_named_before_its_mistakes_are_looked_for_in_the_log(cut):
    config = cut / "config.yaml"
    config.write_text(config.read_text().replace("name: hour", "name: hous"))
    with pytest.raises(UserError, match=r"not the one .*: schema.*\[1\].name was 'hour' and is 'hous'. Set"):
        command("fit", "--resume", cut)


def test_options_that_there_are_not_are_named_with_their_file(cut):
    config = cut / "config.yaml"
    config.write_text(config.read_text().replace("input_norm: none", "input_norm: no"))
    with pytest.raises(UserError, match=r"run/config.yaml: .*input_norm"):
        command("fit", "--resume", cut)


def test_damaged_best_weights_are_not_taken_for_good(cut, monkeypatch):
    weights = cut / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    # No later evaluation is better, so that the damaged weights would be the run's.
    monkeypatch.setattr(fit.Trainer, "_validate", lambda self: None)
    with pytest.raises(UserError, match="weights.safetensors: was damaged"):
        command("fit", "--resume", cut)


def test_mlflow_goes_on_with_the_same_run(tmp_path, monkeypatch):
    started = []

    class Fake:
        def start_run(self, run_name=None, run_id=None):
            started.append(run_id or run_name)
            return type("Run", (), {"info": type("Info", (), {"run_id": "id-1"})})

        def log_params(self, parameters):
            pass

    monkeypatch.setitem(__import__("sys").modules, "mlflow", Fake())
    note = tmp_path / "mlflow.txt"
    MLflow("name", {}, note, resume=True)
    MLflow("name", {}, note, resume=True)
    MLflow("name", {}, note, resume=False)
    assert started == ["name", "id-1", "name"]


def test_damaged_checkpoints_are_passed_over_and_said(cut, work, capsys):
    newest, *older = sorted((cut / "checkpoints").iterdir(), reverse=True)
    assert not older  # keep_checkpoints is 1 here
    part = newest / "state.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    command("fit", "--resume", cut)
    assert "no checkpoint is whole; training begins anew" in capsys.readouterr().err
    for name in FILES:
        assert (cut / name).read_bytes() == (work / "whole" / name).read_bytes(), name
