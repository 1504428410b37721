"""A full disk: one clear error, nothing half-written, and with room again the same result."""

import contextlib
import resource

import pytest
from common import digest_encoded, digest_files, digest_results, write_small_log
from disk_full import check, small_disk
from lives import commands

from mldcn import workflow
from mldcn.config import load_config
from mldcn.data.prepare import prepare
from mldcn.errors import DiskFullError
from mldcn.files import atomic, locked, no_room, writing
from mldcn.predict import Predictor, predict_file
from mldcn.run import RunFolder


@contextlib.contextmanager
def files_of_at_most(size):
    """As if the disk filled up when a file reaches this size; needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A log's config, and its encoded rows."""
    folder = tmp_path_factory.mktemp("small")
    config = load_config(write_small_log(folder, 1500, epochs=1))
    prepare(config, folder / "encoded")
    return config, folder


def test_an_atomic_write_without_room_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    full = pytest.raises(DiskFullError, match="file.txt.*free some space")
    with files_of_at_most(100), full, atomic(path) as temporary:
        temporary.write_bytes(bytes(1000))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_words_of_libraries_are_understood_and_other_errors_pass():
    assert no_room(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not no_room(OSError(13, "Permission denied"))
    with pytest.raises(PermissionError), writing(None):
        raise PermissionError(13, "Permission denied")


def test_a_lock_needs_no_room(tmp_path):
    with files_of_at_most(0), locked(tmp_path / "folder"):
        pass


@pytest.mark.parametrize("size", [0, 1000, 20_000, 200_000])
def test_encoding_fails_clearly_and_comes_to_the_same_later(small, tmp_path, size):
    config, folder = small
    with files_of_at_most(size), pytest.raises(DiskFullError, match=f"{tmp_path}.*free some space"):
        prepare(config, tmp_path / "encoded")
    assert not (tmp_path / "encoded").exists()
    again = prepare(config, tmp_path / "encoded")
    assert digest_encoded(again) == digest_encoded(prepare(config, folder / "encoded"))
    assert digest_files(tmp_path / "encoded") == digest_files(folder / "encoded")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoded"]


@pytest.mark.parametrize("size", [100, 10_000])
def test_training_fails_clearly_and_goes_on_later(small, tmp_path, size):
    config, folder = small
    if not (folder / "run").exists():
        workflow.train(config, RunFolder(folder / "run"))
    run = RunFolder(tmp_path / "run")
    with files_of_at_most(size), pytest.raises(DiskFullError, match="free some space"):
        workflow.train(config, run)
    begun = (run.path / "config.yaml").exists()
    workflow.train(config, run, resume=begun)
    assert digest_results(run.path) == digest_results(folder / "run")
    log = str(folder / "pinads.parquet")
    with files_of_at_most(size), pytest.raises(DiskFullError, match="scores.csv"):
        predict_file(Predictor.load(run.path), [log], tmp_path / "scores.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_disk_that_is_full_under_every_command(tmp_path):
    log = write_small_log(tmp_path / "log", 1500, epochs=1).parent / "pinads.parquet"
    wanted = ("fit", "predict")
    try:
        with small_disk(tmp_path / "disk") as disk:
            counts, _, violations = check(
                disk,
                tmp_path / "store",
                log,
                points=3,
                wanted=lambda log: [command for command in commands(log) if command.name in wanted],
            )
    except PermissionError as error:
        pytest.skip(str(error))
    assert not violations, "\n".join(violations)
    assert all(counts[name]["refused"] for name in wanted)
