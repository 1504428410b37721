"""Damaged raw logs: an error in one line, or rows whose changes the damage explains; never anything else."""

import csv
import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import schema

from mldcn.config import DataConfig
from mldcn.data.parsing import parse, salvage
from mldcn.data.reading import open_log
from mldcn.errors import UserError

ROWS = 80
COPIES = 60
MEANING = schema(
    [
        {"kind": "numeric", "name": "n"},
        {"kind": "categorical", "name": "id"},
        {"kind": "multi", "name": "tags"},
        {"kind": "embedding", "name": "v", "width": 2},
    ],
    time="t",
)
COLUMNS = MEANING.columns()


def table() -> pa.Table:
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "n": rng.normal(size=ROWS).round(3),
            "id": [f"id-{i % 17}é" for i in range(ROWS)],
            "tags": [[f"t{j}" for j in range(i % 4)] for i in range(ROWS)],
            "v": [[i / 2, -i / 4] for i in range(ROWS)],
            "t": [f"2020-01-{i % 28 + 1:02} 10:00:00" for i in range(ROWS)],
            "click": [i % 2 for i in range(ROWS)],
        }
    )


def as_csv() -> bytes:
    lines = [",".join(COLUMNS)]
    for row in table().to_pylist():
        cells = ["|".join(map(str, c)) if isinstance(c, list) else str(c) for c in (row[n] for n in COLUMNS)]
        # A quoted cell with a line end here and there.
        cells[1] = f'"{cells[1]},\n{cells[1]}"' if row["n"] > 1 else cells[1]
        lines.append(",".join(cells))
    return ("\n".join(lines) + "\n").encode()


def as_parquet(**options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(), sink, row_group_size=30, **options)
    return sink.getvalue()


PLAIN = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
LOGS = {
    "log.csv": as_csv,
    "log.csv.gz": lambda: gzip.compress(as_csv(), mtime=0),
    "log.csv.zst": lambda: pa.compress(as_csv(), "zstd", asbytes=True),
    "plain.parquet": lambda: as_parquet(**PLAIN),
    "snappy.parquet": lambda: as_parquet(compression="snappy"),
    "zstd.parquet": lambda: as_parquet(compression="zstd", write_page_checksum=True, data_page_version="2.0"),
}


def damaged(whole: bytes, rng) -> tuple[bytes, int, bytes]:
    """A damaged copy, where the damage begins, and the bytes that it takes away or puts in."""
    at = int(rng.integers(len(whole)))
    few = bytes(rng.integers(256, size=int(rng.integers(1, 5)), dtype=np.uint8))
    match rng.integers(5):
        case 0:
            return whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :], at, b""
        case 1:
            return whole[:at] + few + whole[at:], at, few
        case 2:
            return whole[:at] + whole[at + len(few) :], at, whole[at : at + len(few)]
        case 3:
            return whole[:at] + few + whole[at + len(few) :], at, few + whole[at : at + len(few)]
    return whole[:at], at, whole[at:]


def rows_of(path, on_error="fail"):
    """The log's cells as rows of texts, read and parsed."""
    rows = []
    for raw in open_log([path], DataConfig(on_error=on_error, block_rows=32), COLUMNS):
        _, good = salvage(raw, lambda block: parse(MEANING, block))
        rows += [tuple(map(str, row.values())) for row in good.table.to_pylist()]
    return rows


def outcome(path, on_error="fail"):
    """The rows, or None after an error that is one line and names the file."""
    try:
        return rows_of(path, on_error)
    except UserError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return None


@pytest.mark.parametrize("name", LOGS)
def test_damage_is_an_error_or_explained(tmp_path, name, recwarn, capfd):
    whole, path = LOGS[name](), tmp_path / name
    path.write_bytes(whole)
    clean, rng = rows_of(path), np.random.default_rng(len(name))
    assert len(clean) == ROWS
    outcomes = []
    for _ in range(COPIES):
        content, at, touched = damaged(whole, rng)
        path.write_bytes(content)
        found, kept = outcome(path), outcome(path, "skip")
        outcomes.append(found is not None)
        if found is not None:
            assert kept == found
        if name == "log.csv":
            check_neighbourhood(whole, at, touched, clean, found)
            check_neighbourhood(whole, at, touched, clean, kept)
        elif name == "log.csv.gz" and content != whole:
            # The checksum covers all but the header of the file.
            assert found in (None, clean)
            assert kept in (None, clean)
    assert not all(outcomes)
    # Nothing is complained of beside the error, such as an exception in a callback.
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def check_neighbourhood(whole, at, touched, clean, found):
    """In a text log, damage that touches no quote changes the rows it hits, and no other."""
    if found is None:
        return
    whole_records = len(list(csv.reader(io.StringIO(whole[:at].decode("utf-8", "replace"))))) - 1
    before = max(whole_records - 1, 0)
    assert found[:before] == clean[:before]
    if b'"' not in touched + whole[at : at + 1] and len(touched) < 9:
        after = len(clean) - before - 5
        assert after <= 0 or found[-after:] == clean[-after:]
        assert len(clean) - 5 <= len(found) <= len(clean) + 5


def test_every_flipped_bit_of_a_page_with_a_checksum_is_noticed(tmp_path):
    whole, path = LOGS["plain.parquet"](), tmp_path / "log.parquet"
    places = [i for i in range(len(whole) - 4) if whole[i : i + 3] == b"id-"]
    # Those of the footer's statistics are not of a page.
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    places = [place for place in places if place < len(whole) - footer][2:-2]
    assert len(places) > ROWS // 2
    wrong = 0
    for place in places:
        path.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
        wrong += outcome(path) is not None
    assert wrong <= 6, "bytes of statistics in page headers, at most"
