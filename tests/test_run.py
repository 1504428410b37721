import json

import pytest

from mldcn.errors import UserError
from mldcn.run import RunFolder, atomic


def finished(path):
    run = RunFolder.create(path)
    run.weights.write_bytes(b"weights")
    run.finish()
    return run


def test_a_finished_run_opens(tmp_path):
    finished(tmp_path / "a")
    assert RunFolder.open(tmp_path / "a").info()["status"] == "finished"


def test_a_run_is_not_overwritten_unasked(tmp_path):
    finished(tmp_path / "a")
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.create(tmp_path / "a")
    assert not RunFolder.create(tmp_path / "a", overwrite=True).weights.exists()


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is no run's folder"):
        RunFolder.create(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_run_that_failed_before_its_training_makes_room(tmp_path):
    run = RunFolder.create(tmp_path / "a")
    with pytest.raises(UserError, match="failed before its training began"):
        RunFolder.open(run.path, finished=False)
    RunFolder.create(tmp_path / "a").write_info({"status": "running"})
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.create(tmp_path / "a")


@pytest.mark.parametrize("killed_in", ["write_json", "write_info"])
def test_a_run_killed_while_it_finishes_keeps_its_checkpoints(tmp_path, monkeypatch, killed_in):
    run = RunFolder.create(tmp_path / "a")
    run.write_info({"status": "running"})
    run.checkpoints.mkdir()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, killed_in, killed)
        run.finish()
    assert run.checkpoints.exists()
    assert RunFolder.open(run.path, finished=False).info()["status"] == "running"
    run.finish()
    assert not run.checkpoints.exists()
    RunFolder.open(run.path)


def test_damage_is_found(tmp_path):
    run = finished(tmp_path / "a")
    run.weights.write_bytes(b"weighty")
    with pytest.raises(UserError, match="weights.safetensors: damaged"):
        RunFolder.open(run.path)
    run.weights.unlink()
    with pytest.raises(UserError, match="missing from the run"):
        RunFolder.open(run.path)


def test_unfinished_and_foreign_versions_are_refused_by_name(tmp_path):
    run = RunFolder.create(tmp_path / "a")
    run.write_info({"status": "running"})
    with pytest.raises(UserError, match="not finished"):
        RunFolder.open(run.path)
    (run.path / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        RunFolder.open(run.path)
    with pytest.raises(UserError, match="is no run's folder"):
        RunFolder.open(tmp_path / "nothing")
    (run.path / "run.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        RunFolder.open(run.path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"
