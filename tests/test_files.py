import errno
import os

import pytest

from mldcn.errors import UserError
from mldcn.files import atomic, locked, scratch
from writers import HOLD, SCRATCH, WRITE, kill, other_process


def test_a_lock_keeps_other_processes_out_names_them_and_dies_with_them(tmp_path):
    folder = tmp_path / "run"
    holder = other_process(HOLD, folder)
    try:
        with pytest.raises(UserError, match=f"{folder}: in use by process {holder.pid}"), locked(folder):
            pass
    finally:
        kill(holder)
    with locked(folder), locked(folder):  # whoever holds it may take it again
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_can_be_waited_for(tmp_path):
    holder = other_process(HOLD.replace("60", "0.3"), tmp_path / "run")
    with locked(tmp_path / "run", wait=True):
        assert holder.wait() == 0
    holder.communicate()


def test_a_write_removes_what_killed_writers_left_but_not_what_living_ones_write(tmp_path):
    target = tmp_path / "a.json"
    living, dead = other_process(WRITE, target), other_process(WRITE, target)
    try:
        kill(dead)
        (tmp_path / ".a.json.mine").write_text("not a temporary")
        assert len(list(tmp_path.iterdir())) == 3
        with atomic(target) as temporary:
            temporary.write_text("whole")
        assert len(list(tmp_path.iterdir())) == 3  # the target, what is not ours, the living one's
    finally:
        kill(living)
    with atomic(target) as temporary:
        temporary.write_text("again")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json.mine", "a.json"]
    assert target.read_text() == "again"


def test_scratch_folders_of_killed_processes_are_removed_by_the_next(tmp_path):
    living, dead = other_process(SCRATCH, tmp_path), other_process(SCRATCH, tmp_path)
    try:
        kill(dead)
        with scratch("test", tmp_path) as folder:
            assert folder.is_dir()
            assert len(list(tmp_path.glob("mldcn-test-*"))) == 2
    finally:
        kill(living)
    with scratch("test", tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_scratch_folders_that_are_in_use_stay(tmp_path):
    with scratch("test", tmp_path) as first:
        (first / "file").write_text("")
        with scratch("test", tmp_path) as second:
            assert first != second
            assert (first / "file").exists()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_files_are_written_and_folders_are_refused(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(UserError, match="gives no locks .No locks available."), locked(tmp_path / "run"):
        pass
    for text in ("one", "two"):
        with atomic(tmp_path / "a") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_are_made_as_the_umask_wants_them(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic(tmp_path / "a") as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"
