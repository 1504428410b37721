import json
import os
import random
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mldcn.config import Config, parse
from mldcn.data import shards, text_log
from mldcn.data.pipeline import ahead, ordered_map, short_turns
from mldcn.data.prepare import prepare
from mldcn.data.splits import TimesOnDisk
from mldcn.errors import UserError

# Ten rows: ids a..j, numbers 0..9, times falling, days in a column.
HEADER = "id,n,t,day,click\n"
ROWS = [f"{'abcdefghij'[i]},{i},{900 - 100 * i},{('mon', 'tue', 'wed')[i % 3]},{i % 2}\n" for i in range(10)]


def log(folder: Path, name="log.csv", rows=ROWS) -> str:
    (folder / name).write_text(HEADER + "".join(rows))
    return str(folder / name)


def config(train, split, *, time=None, **data) -> Config:
    files = [train] if isinstance(train, str) else train
    features = [
        {"kind": "categorical", "name": "id"},
        {"kind": "numeric", "name": "n", "standardise": False},
    ]
    raw = {
        "data": {"train": files, "split": split, "block_rows": 3, **data},
        "schema": {"features": features, "labels": [{"name": "click"}], "time": time},
    }
    return parse(Config, raw, "test.yaml")


def numbers(rows):
    return [int(n) for batch in rows.batches(100) for n in batch.dense[:, 0]]


def all_numbers(data):
    return numbers(data.train), numbers(data.valid), numbers(data.test)


def test_split_by_order(tmp_path):
    data = prepare(config(log(tmp_path), {"kind": "order", "valid": 0.2, "test": 0.3}), tmp_path / "out")
    assert all_numbers(data) == ([0, 1, 2, 3, 4], [5, 6], [7, 8, 9])


def test_split_by_time_takes_the_newest_for_testing(tmp_path):
    data = prepare(
        config(log(tmp_path), {"kind": "time", "valid": 0.2, "test": 0.3}, time="t"), tmp_path / "out"
    )
    assert all_numbers(data) == ([5, 6, 7, 8, 9], [3, 4], [0, 1, 2])
    assert data.train.column("time").max() < data.valid.column("time").min()


def test_rows_of_one_time_fall_together(tmp_path):
    rows = [f"a,{i},{min(i, 7)},mon,0\n" for i in range(10)]
    split = {"kind": "time", "valid": 0.3, "test": 0.1}
    data = prepare(config(log(tmp_path, rows=rows), split, time="t"), tmp_path / "out")
    assert all_numbers(data) == ([0, 1, 2, 3, 4, 5], [6], [7, 8, 9])


@pytest.mark.parametrize("kind", ["order", "time", "hash"])
def test_a_share_of_nothing_leaves_the_part_out(tmp_path, kind):
    data = prepare(
        config(log(tmp_path), {"kind": kind, "valid": 0.5, "test": 0.0}, time="t"), tmp_path / "out"
    )
    assert data.test is None
    assert sorted(numbers(data.train) + numbers(data.valid)) == list(range(10))


def test_split_by_column(tmp_path):
    split = {"kind": "column", "column": "day", "train": "mon", "valid": "tue", "test": "wed"}
    data = prepare(config(log(tmp_path), split), tmp_path / "out")
    assert all_numbers(data) == ([0, 3, 6, 9], [1, 4, 7], [2, 5, 8])


def test_split_by_column_leaves_other_values_out(tmp_path):
    rows = [*ROWS, "k,10,0,,1\n", "l,11,0,sun,1\n"]
    split = {"kind": "column", "column": "day", "train": "mon", "valid": "tue", "test": "wed"}
    data = prepare(config(log(tmp_path, rows=rows), split), tmp_path / "out")
    assert sorted(chain(*all_numbers(data))) == list(range(10))


def test_split_by_files(tmp_path):
    parts = [log(tmp_path, f"{i}.csv", ROWS[i : i + 3]) for i in (0, 3, 6)]
    split = {"kind": "files"}
    data = prepare(config(parts[0], split, valid=[parts[1]], test=[parts[2]]), tmp_path / "out")
    assert all_numbers(data) == ([0, 1, 2], [3, 4, 5], [6, 7, 8])
    data = prepare(config(parts[0], split), tmp_path / "train only")
    assert data.valid is data.test is None


def hashed(tmp_path, name, files=None, **options):
    split = {"kind": "hash", "valid": 0.2, "test": 0.2, **options}
    rows = [f"{i % 100},{i},0,mon,0\n" for i in range(2000)]
    if files is None:
        files = [log(tmp_path, "all.csv", rows)]
    elif files == 2:
        files = [log(tmp_path, "1.csv", rows[:700]), log(tmp_path, "2.csv", rows[700:])]
    return all_numbers(prepare(config(files, split, block_rows=333), tmp_path / name))


def test_split_by_hash_is_a_function_of_seed_and_row(tmp_path):
    parts = hashed(tmp_path, "a")
    assert sorted(chain(*parts)) == list(range(2000))
    assert [len(part) / 2000 for part in parts] == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    assert hashed(tmp_path, "b", files=2) == parts
    assert hashed(tmp_path, "c", seed=1) != parts
    # Known answers: the split of a log must never change.
    assert parts[2][:5] == KNOWN


KNOWN = [1, 4, 18, 25, 27]


def test_split_by_hash_of_a_column_keeps_its_values_together(tmp_path):
    ids = [{number % 100 for number in part} for part in hashed(tmp_path, "a", columns=["id"])]
    assert not ids[0] & ids[1]
    assert not ids[0] & ids[2]
    assert not ids[1] & ids[2]
    assert all(ids)


def test_nothing_is_fitted_on_held_out_rows(tmp_path):
    rows = [*ROWS[:8], "new,1000,0,mon,1\n", "newer,-1000,0,mon,1\n"]
    base = config(log(tmp_path, rows=rows), {"kind": "order", "valid": 0.1, "test": 0.1})
    raw = base.model_dump(mode="json", by_alias=True)
    raw["schema"]["features"][1] |= {"standardise": True}
    raw["schema"]["features"] += [
        {"kind": "numeric", "name": "q", "column": "n", "transform": "quantile", "standardise": False},
        {"kind": "bucketised", "name": "b", "column": "n", "buckets": 4},
    ]
    data = prepare(parse(Config, raw, "x"), tmp_path / "out")
    # A value of the test rows only is out of vocabulary.
    assert next(data.test.batches(1)).ids[0, 0] == 1
    assert next(data.valid.batches(1)).ids[0, 0] == 1
    assert data.encoder.tables["id"].values.to_pylist() == list("abcdefgh")
    numeric = data.encoder.numerics["n"]
    assert (numeric.shift, numeric.scale) == (pytest.approx(3.5), pytest.approx(np.std(np.arange(8))))
    assert max(data.encoder.numerics["q"].grid) == 7
    assert max(data.encoder.boundaries["b"]) < 8


def test_csv_gzip_and_parquet_give_the_same_rows(tmp_path):
    split = {"kind": "order", "valid": 0.2, "test": 0.2}
    table = pa.table({"id": list("abcdefghij"), "n": range(10), "click": [i % 2 for i in range(10)]})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=4)
    one = prepare(config(log(tmp_path), split), tmp_path / "csv")
    other = prepare(config(str(tmp_path / "log.parquet"), split), tmp_path / "parquet")
    for part in ("train", "valid", "test"):
        for a, b in zip(getattr(one, part).batches(4), getattr(other, part).batches(4), strict=True):
            assert a.ids.equal(b.ids)
            assert a.dense.equal(b.dense)


def test_the_bytes_do_not_depend_on_the_threads(tmp_path, monkeypatch):
    rows = [f"{i * 7 % 41},{i},0,mon,{i % 2}\n" for i in range(500)]
    given = config(log(tmp_path, rows=rows), {"kind": "hash"})

    def files(name, cores):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        prepare(given, tmp_path / name)
        return {p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*.arrow"))}

    assert files("one", 1) == files("four", 4)


def test_prepared_rows_are_used_again(tmp_path):
    given = config(log(tmp_path), {"kind": "order"})
    first = prepare(given, tmp_path / "out")
    stages = []
    again = prepare(given, tmp_path / "out", lambda stage, *_: stages.append(stage))
    assert not first.reused
    assert again.reused
    assert stages == []
    assert again.fingerprint == first.fingerprint
    assert numbers(again.train) == numbers(first.train)
    # Another log, another schema, damage: encoded anew.
    log(tmp_path, rows=ROWS[::-1])
    changed = prepare(given, tmp_path / "out")
    assert not changed.reused
    assert numbers(changed.test) == [0]
    assert not prepare(config(log(tmp_path), {"kind": "order", "valid": 0.2}), tmp_path / "out").reused
    file = next((tmp_path / "out" / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-8] + b"12345678")
    assert not prepare(
        config(str(tmp_path / "log.csv"), {"kind": "order", "valid": 0.2}), tmp_path / "out"
    ).reused


def test_every_flipped_byte_is_noticed(tmp_path):
    given = config(log(tmp_path), {"kind": "order"})
    first = prepare(given, tmp_path / "out")
    wanted = all_numbers(first)
    draw = random.Random(0)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(files) == 1 + 2 + 3 * 2
    for path in files:
        for _ in range(3):
            raw = bytearray(path.read_bytes())
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            path.write_bytes(raw)
            again = prepare(given, tmp_path / "out")
            assert not again.reused, path
            assert all_numbers(again) == wanted
            assert again.fingerprint == first.fingerprint


def test_the_fingerprint_tells_contents(tmp_path):
    data = prepare(config(log(tmp_path), {"kind": "order"}), tmp_path / "out")
    facts = data.fingerprint["files"][str(tmp_path / "log.csv")]
    assert facts["bytes"] == (tmp_path / "log.csv").stat().st_size
    assert len(facts["sha256"]) == 64
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["fingerprint"] == data.fingerprint


def test_progress(tmp_path):
    calls = []
    prepare(config(log(tmp_path), {"kind": "order"}), tmp_path / "out", lambda *call: calls.append(call))
    size = (tmp_path / "log.csv").stat().st_size
    assert [call[0] for call in calls] == ["count rows"] * 4 + ["fit"] * 4 + ["encode"] * 4
    assert [call[1] for call in calls] == [3, 6, 9, 10] * 3
    assert all(call[3] == size for call in calls[:8])
    assert all(0 <= call[2] <= call[3] for call in calls)
    assert calls[-1][2] == calls[-1][3]


BAD = {
    "no files": ([], {"kind": "hash"}, {}, "data.train names no file"),
    "shares": (None, {"kind": "hash", "valid": 0.5, "test": 0.5}, {}, "leave no rows for training"),
    "time without a column": (None, {"kind": "time"}, {}, "schema.time names no column"),
    "files beside a rule": (
        None,
        {"kind": "hash"},
        {"test": ["x.csv"]},
        "data.test names files, but data.split is 'hash'",
    ),
    "empty by column": (
        None,
        {"kind": "column", "column": "day", "train": "mon", "valid": "tue", "test": "fri"},
        {},
        r"leaves no test rows, of 10: no cell of column 'day' is 'fri'; .*: mon, tue, wed",
    ),
    "empty by order": (
        None,
        {"kind": "order", "valid": 0.01, "test": 0.3},
        {},
        "leaves no valid rows, of 10: raise",
    ),
    "no such split column": (
        None,
        {"kind": "hash", "columns": ["idd"]},
        {},
        "has no column 'idd'; did you mean 'id'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_splits_are_named(tmp_path, case):
    train, split, data, message = BAD[case]
    with pytest.raises(UserError, match=message):
        prepare(config(log(tmp_path) if train is None else train, split, **data), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name != "log.csv"] == []


def test_a_missing_time_is_named(tmp_path):
    rows = [*ROWS[:4], "k,1,,mon,1\n"]
    with pytest.raises(
        UserError, match=r"log.csv: row 5, column 't': an empty cell is no time, and data.split"
    ):
        prepare(config(log(tmp_path, rows=rows), {"kind": "time"}, time="t"), tmp_path / "out")


def test_a_bad_cell_leaves_nothing_behind(tmp_path):
    rows = [*ROWS, "k,eleven,0,mon,1\n"]
    with pytest.raises(UserError, match=r"log.csv: row 11, column 'n': 'eleven' is not a number"):
        prepare(config(log(tmp_path, rows=rows), {"kind": "order"}), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="out: holds something else than encoded rows; name another folder"):
        prepare(config(log(tmp_path), {"kind": "order"}), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "dear"


def test_an_older_version_is_encoded_anew(tmp_path, monkeypatch):
    given = config(log(tmp_path), {"kind": "order"})
    prepare(given, tmp_path / "out")
    monkeypatch.setattr(shards, "FORMAT", 2)
    assert not prepare(given, tmp_path / "out").reused


def test_a_log_that_changes_meanwhile_is_refused(tmp_path):
    path = log(tmp_path)

    def meddle(stage, *_):
        if stage == "encode":
            log(tmp_path, rows=[*ROWS, "z,0,0,mon,0\n"])

    with pytest.raises(UserError, match="changed while they were read"):
        prepare(config(path, {"kind": "order"}), tmp_path / "out", meddle)


def test_order_statistics_on_disk_are_exact(tmp_path):
    values = np.concatenate(
        [np.random.default_rng(0).normal(size=500) * 1e6, [0.0, -0.0, 1e-300, -1e300, 5, 5]]
    )
    times = TimesOnDisk(tmp_path)
    times.add(values[:100])
    times.add(values[100:])
    times._file.flush()
    for rank in (0, 1, 250, 300, 505):
        assert times._smallest(rank) == np.sort(values)[rank]
    times.close()
    assert list(tmp_path.iterdir()) == []


def test_ahead_keeps_order_bounds_its_lead_and_raises_in_turn():
    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i
        raise UserError("the end")

    results = ahead(items(), lead=2)
    assert next(results) == 0
    seen = [next(results)]
    assert len(taken) <= 4
    with pytest.raises(UserError, match="the end"):
        seen.extend(results)
    assert seen == list(range(1, 20))
    # Left early, the thread ends.
    results = ahead(iter(range(10**9)))
    next(results)
    results.close()


def test_ordered_map_keeps_order_bounds_its_lead_and_raises_in_turn():
    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i
        raise UserError("the end")

    results = ordered_map(lambda i: i * i, items(), workers=3)
    assert next(results) == 0
    assert len(taken) <= 5
    seen = []
    with pytest.raises(UserError, match="the end"):
        for value in results:
            seen.append(value)
    assert seen == [i * i for i in range(1, 20)]


def test_a_base_keeps_its_rows_and_new_ids_follow(tmp_path):
    split = {"kind": "order", "valid": 0.0, "test": 0.0}
    first = [f"{name},{i},0,mon,0\n" for i, name in enumerate("bbbaacc")]
    later = [f"{name},{10 * i},0,mon,0\n" for i, name in enumerate("zzyyyxac")]
    old = prepare(config(log(tmp_path, "1.csv", first), split), tmp_path / "1")
    assert old.encoder.tables["id"].values.to_pylist() == ["b", "a", "c"]

    new = config(log(tmp_path, "2.csv", later), split)
    grown = prepare(new, tmp_path / "2", base=old.encoder)
    assert grown.encoder.tables["id"].values.to_pylist() == ["b", "a", "c", "y", "z", "x"]
    assert grown.encoder.tables["id"].counts.tolist() == [0, 1, 1, 3, 2, 1]
    assert grown.encoder.numerics == old.encoder.numerics
    refreshed = prepare(new, tmp_path / "2", base=old.encoder, statistics="refresh")
    assert not refreshed.reused
    assert refreshed.encoder.numerics["n"].fill == 35
    assert prepare(new, tmp_path / "2", base=old.encoder, statistics="refresh").reused
    assert not prepare(new, tmp_path / "2", base=refreshed.encoder, statistics="refresh").reused


def test_a_base_of_other_features_is_refused(tmp_path):
    split = {"kind": "order", "valid": 0.0, "test": 0.0}
    old = prepare(config(log(tmp_path), split), tmp_path / "1").encoder
    new = config(log(tmp_path), split).model_dump(mode="json", by_alias=True)
    new["schema"]["features"][1]["standardise"] = True
    with pytest.raises(UserError, match="feature 'n' is another of the run to start from"):
        prepare(parse(Config, new, "test.yaml"), tmp_path / "2", base=old)


@pytest.mark.parametrize("odd", ["+7", " 7 ", "7e0"])
@pytest.mark.parametrize("at", [0, 7, 12_000])
def test_numbers_read_as_numbers_are_those_read_as_texts(tmp_path, monkeypatch, odd, at):
    monkeypatch.setattr(text_log, "READ_BYTES", 20_000)
    rows = [f"a,{odd if i == at else '' if i % 5 == 0 else i % 7},0,mon,0\n" for i in range(15_000)]
    split = {"kind": "order", "valid": 0.0, "test": 0.0}
    data = prepare(config(log(tmp_path, rows=rows), split, block_rows=1000), tmp_path / "out")
    filled = [7 if i == at else None if i % 5 == 0 else i % 7 for i in range(15_000)]
    known = [number for number in filled if number is not None]
    mean = np.float32(sum(known) / len(known))
    expected = np.array([mean if number is None else number for number in filled], np.float32)
    found = np.concatenate([batch.dense[:, 0].numpy() for batch in data.train.batches(4096)])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", ["seven", "nan", "inf", "1e999", "0x10", "-"])
def test_a_cell_that_is_no_number_is_named_as_it_stands(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(text_log, "READ_BYTES", 20_000)
    rows = [f"a,{bad if i == 9_000 else i % 7},0,mon,0\n" for i in range(15_000)]
    split = {"kind": "order", "valid": 0.0, "test": 0.0}
    with pytest.raises(UserError, match=rf"log\.csv: row 9001, column 'n': '{bad}' is"):
        prepare(config(log(tmp_path, rows=rows), split, block_rows=1000), tmp_path / "out")
    data = prepare(
        config(log(tmp_path, rows=rows), split, block_rows=1000, on_error="skip"), tmp_path / "out"
    )
    assert data.rejected == 1
    assert len(data.train) == 14_999


def test_short_turns_end_with_their_block():
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), short_turns():
        assert sys.getswitchinterval() < before
        raise KeyError
    assert sys.getswitchinterval() == before
