"""An encoding that is interrupted, spills or runs on other threads ends with the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mldcn.config import Config, dump_config, parse
from mldcn.data import passes as passes_module
from mldcn.data import prepare as prepare_module
from mldcn.data import shards
from mldcn.data.fitting import Store
from mldcn.data.prepare import prepare
from mldcn.errors import UserError

ROWS = 300
FEATURES = [
    {"kind": "categorical", "name": "ad", "encoding": {"kind": "vocabulary", "min_count": 2}},
    {"kind": "categorical", "name": "user"},
    {"kind": "categorical", "name": "place", "encoding": {"kind": "hash", "rows": 50, "hashes": 2}},
    {"kind": "multi", "name": "words", "max_length": 3},
    {"kind": "numeric", "name": "price", "transform": "log"},
    {"kind": "numeric", "name": "age", "transform": "quantile", "missing_indicator": True},
    {"kind": "bucketised", "name": "age_bucket", "column": "age", "method": "quantile", "buckets": 5},
]
SPLITS = {
    "hash": {"kind": "hash", "valid": 0.2, "test": 0.2},
    "time": {"kind": "time", "valid": 0.2, "test": 0.2},
    "order": {"kind": "order", "valid": 0.2, "test": 0.2},
    "files": {"kind": "files"},
}


def write_log(path: Path, seed: int, bad: bool) -> str:
    draw = np.random.default_rng(seed)
    lines = ["ad,user,place,words,price,age,time,click"]
    for i in range(ROWS):
        words = "|".join(f"w{w}" for w in draw.integers(0, 30, draw.integers(0, 5)))
        age = "" if i % 9 == 0 else str(draw.integers(10, 90))
        price = "dear" if bad and i % 50 == 3 else f"{draw.gamma(2):.3f}"
        user, ad, place = int(draw.pareto(0.4)) % 10**6, draw.integers(0, 40), draw.integers(0, 200)
        lines.append(f"a{ad},u{user},{place},{words},{price},{age},{draw.integers(0, 1000)},{i % 2}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def config(folder: Path, split: str, *, bad: bool = False) -> Config:
    logs = [write_log(folder / f"{seed}.csv", seed, bad) for seed in range(4)]
    data = {"train": logs, "split": SPLITS[split], "block_rows": 60, "on_error": "skip" if bad else "fail"}
    if split == "files":
        data |= {"train": logs[:2], "valid": logs[2:3], "test": logs[3:]}
    schema = {"features": FEATURES, "labels": [{"name": "click"}], "time": "time"}
    return parse(Config, {"data": data, "schema": schema}, "test")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """A power cut is not tested, so the disk need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def small(monkeypatch):
    """Shard files of few rows, so that there are several."""
    monkeypatch.setattr(shards, "FILE_ROWS", 150)


def spilling(monkeypatch):
    monkeypatch.setattr(prepare_module, "Store", lambda runs, encoder, _: Store(runs, encoder, 20_000))


class Stop(Exception):
    """A death."""


def dying(after: int):
    calls = 0

    def progress(*_):
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    return progress


@pytest.mark.parametrize(
    ("split", "spills"), [("hash", False), ("time", True), ("order", False), ("files", True)]
)
def test_interrupted_anywhere_the_result_is_the_same(tmp_path, monkeypatch, small, split, spills):
    log = config(tmp_path, split, bad=True)
    prepare(log, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    assert "rejects.csv" in expected
    if spills:
        spilling(monkeypatch)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    out = tmp_path / "out"
    calls, died = 0, 0

    def progress(*_):
        nonlocal calls
        calls += 1
        # Sooner or later: each attempt gets a little further than the one before.
        if calls >= 2 + 5 * died:
            raise Stop

    for _ in range(200):
        calls = 0
        try:
            data = prepare(log, out, progress)
            break
        except Stop:
            died += 1
            assert not out.exists()
    assert died > 5
    assert content(out) == expected
    assert data.rejected == expected["rejects.csv"].count(b"\n") - 1 == 24
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"whole", "out", *(f"{i}.csv" for i in range(4))}


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_and_spilling_change_nothing(tmp_path, monkeypatch, small, threads):
    log = config(tmp_path, "hash")
    prepare(log, tmp_path / "expected")
    monkeypatch.setattr(passes_module, "cores", lambda: threads)
    spilling(monkeypatch)
    prepare(log, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_an_interruption_saves_work(tmp_path, monkeypatch):
    log = config(tmp_path, "hash")
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Stop):
        prepare(log, tmp_path / "out", dying(15))
    parsed = []
    monkeypatch.setattr(passes_module, "parse", counting(passes_module.parse, parsed))
    prepare(log, tmp_path / "out")
    # 20 blocks, some 12 of which were done.
    assert 0 < len(parsed) < 11


def counting(work, calls):
    def counted(*args, **options):
        calls.append(args)
        return work(*args, **options)

    return counted


@pytest.mark.parametrize("after", [3, 15, 28])
def test_damaged_state_is_discarded(tmp_path, monkeypatch, small, after):
    log = config(tmp_path, "hash")
    prepare(log, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Stop):
        prepare(log, tmp_path / "out", dying(after))
    partial = tmp_path / "out.partial"
    kept = content(partial)
    draw = np.random.default_rng(after)
    assert kept
    for name in sorted(draw.choice(list(kept), 6, replace=False)):
        whole = kept[name]
        for file, data in kept.items():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).write_bytes(data)
        damaged = bytearray(whole)
        if damaged:
            damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
        (partial / name).write_bytes(damaged)
        prepare(log, tmp_path / "out")
        assert content(tmp_path / "out") == expected, name
        for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


def test_foreign_state_is_discarded(tmp_path, monkeypatch):
    log, other = config(tmp_path, "hash"), config(tmp_path, "order")
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Stop):
        prepare(other, tmp_path / "out", dying(10))
    prepare(log, tmp_path / "out")
    prepare(log, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_mistake_in_the_log_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    log = config(tmp_path, "hash")
    with (tmp_path / "3.csv").open("a") as file:
        file.write("a,b,c,d,e,f,g,h\n")
    with pytest.raises(UserError, match=r"3\.csv: row 301"):
        prepare(log, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {f"{i}.csv" for i in range(4)}


KILLED = """
import os, signal, sys
from pathlib import Path
from mldcn.config import Config, parse, read_yaml
from mldcn.data import prepare as module
module.CHECKPOINT_SECONDS = 0.0
calls = 0
def progress(*_):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
module.prepare(parse(Config, read_yaml(sys.argv[1]), "test"), Path(sys.argv[2]), progress)
"""


def test_killed_and_started_again(tmp_path):
    log = config(tmp_path, "time", bad=True)
    (tmp_path / "config.yaml").write_text(dump_config(log))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(tmp_path / "out"), "48"]
    assert subprocess.run(command, check=False).returncode == -9
    assert (tmp_path / "out.partial" / "state.json").exists()
    prepare(log, tmp_path / "out")
    prepare(log, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".lock", ".partial")]


def test_the_lock_of_one_killed_at_its_very_end_goes_with_the_next(tmp_path):
    given = config(tmp_path, "hash")
    prepare(given, tmp_path / "encoded")
    lock = tmp_path / ".encoded.lock"
    lock.write_text("1234567\n")
    assert prepare(given, tmp_path / "encoded").reused
    assert not lock.exists()
