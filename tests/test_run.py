import json

import pytest

from mldcn.errors import UserError
from mldcn.run import RunFolder
from writers import HOLD, WRITE, kill, other_process


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


def test_a_run_that_failed_before_its_training_makes_room_and_can_be_resumed(tmp_path):
    run = RunFolder.create(tmp_path / "a", "config", {"note": 1})
    assert RunFolder.open(run.path, finished=False).info() == {"format": 1, "status": "new", "note": 1}
    assert run.config.read_text() == "config"
    with pytest.raises(UserError, match="not finished"):
        RunFolder.open(run.path)
    RunFolder.create(tmp_path / "a").write_info({"status": "running"})
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.create(tmp_path / "a")


def test_a_run_is_created_whole_or_not_at_all(tmp_path, monkeypatch):
    finished(tmp_path / "a")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "write_info", killed)
        RunFolder.create(tmp_path / "a", overwrite=True)
    assert RunFolder.open(tmp_path / "a").weights.exists()
    # Killed between the two renames, with nothing in the old run's place.
    (tmp_path / "a").rename(tmp_path / ".a.replaced")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.rename", killed)
        RunFolder.create(tmp_path / "a", "config")
    run = RunFolder.open(tmp_path / "a", finished=False)
    assert run.config.read_text() == "config"
    run.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # what was replaced is gone


def test_a_run_in_use_is_not_replaced(tmp_path):
    finished(tmp_path / "a")
    holder = other_process(HOLD, tmp_path / "a")
    try:
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
            RunFolder.create(tmp_path / "a", overwrite=True)
    finally:
        kill(holder)
    assert RunFolder.open(tmp_path / "a").weights.exists()


def test_what_a_killed_writer_left_is_no_part_of_a_finished_run(tmp_path):
    run = RunFolder.create(tmp_path / "a")
    run.encoder.mkdir()
    kill(other_process(WRITE, run.encoder / "part"))
    assert len(list(run.encoder.iterdir())) == 1
    run.finish()
    assert list(run.encoder.iterdir()) == []
    assert run.read_json("manifest.json")["crc32"].keys() == {"run.json", "config.yaml"}


@pytest.mark.parametrize("text", ["[]", "{}", '{"crc32": 3}', '{"crc32": {}}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    run = finished(tmp_path / "a")
    (run.path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json: damaged"):
        RunFolder.open(run.path)


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
