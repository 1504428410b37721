import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mldcn.config import DataConfig
from mldcn.data.reading import LogReader, expand, open_log, table_blocks
from mldcn.errors import UserError


def rows_of(files, data=None, columns=("a", "b"), **options):
    blocks = list(
        open_log([files] if isinstance(files, Path) else files, data or DataConfig(), columns, **options)
    )
    return [
        row for block in blocks for row in zip(*(block.table[c].to_pylist() for c in columns), strict=True)
    ]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_text_stays_text_and_empty_is_missing(tmp_path):
    log = write(tmp_path / "log.csv", "a,b,c\n007,1.50,x\n,,y\n")
    assert rows_of(log) == [("007", "1.50"), (None, None)]


def test_zeros_blanks_and_nan_are_not_missing_unless_named(tmp_path):
    log = write(tmp_path / "log.csv", "a,b\nNA,nan\n0, \n")
    assert rows_of(log) == [("NA", "nan"), ("0", " ")]
    assert rows_of(log, DataConfig(missing=("NA", " "))) == [(None, "nan"), ("0", None)]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed(tmp_path, ending):
    path = tmp_path / f"log.tsv{ending}"
    kind = {".gz": "gzip", ".zst": "zstd"}[ending]
    with pa.CompressedOutputStream(str(path), kind) as sink:
        sink.write(b"a\tb\n1\t2\n")
    assert rows_of(path) == [("1", "2")]


def test_byte_order_mark_mixed_line_ends_quotes_and_blank_lines(tmp_path):
    log = write(tmp_path / "log.csv", b'\xef\xbb\xbfa,b\r\n"x,1","two\nlines"\n\ny,"say ""hi"""\r\n')
    assert rows_of(log) == [("x,1", "two\nlines"), ("y", 'say "hi"')]


def test_no_header(tmp_path):
    log = write(tmp_path / "log.tsv", "1\t2\n3\t4\n")
    assert rows_of(log, DataConfig(header=False, column_names=("a", "b"))) == [("1", "2"), ("3", "4")]


def test_blocks_have_the_asked_size_and_number_their_rows(tmp_path):
    first = write(tmp_path / "1.csv", "a,b\n" + "".join(f"{i},{i}\n" for i in range(5)))
    second = write(tmp_path / "2.csv", "b,a\n9,8\n")
    blocks = list(open_log([first, second], DataConfig(block_rows=2), ["a", "b"]))
    assert [(Path(b.file).name, b.first_row, len(b)) for b in blocks] == [
        ("1.csv", 1, 2),
        ("1.csv", 3, 2),
        ("1.csv", 5, 1),
        ("2.csv", 1, 1),
    ]
    assert blocks[-1].table["a"].to_pylist() == ["8"]


def test_many_read_buffers_make_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 64)
    rows = [(f"id-{i}", "x" * (i % 7)) for i in range(500)]
    log = write(tmp_path / "log.csv", "a,b\n" + "".join(f"{a},{b}\n" for a, b in rows))
    assert rows_of(log, DataConfig(block_rows=33)) == [(a, b or None) for a, b in rows]


def test_parquet_keeps_types_and_knows_missing_texts(tmp_path):
    table = pa.table({"a": [1, None, 3], "b": ["x", "", "NA"], "c": [[1.0], [], None]})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=2)
    data = DataConfig(missing=("", "NA"))
    assert rows_of(tmp_path / "log.parquet", data, ("a", "b", "c")) == [
        (1, "x", [1.0]),
        (None, None, []),
        (3, None, None),
    ]


def test_optional_columns_are_read_where_they_are(tmp_path):
    log = write(tmp_path / "log.csv", "a,b\n1,2\n")
    block = next(open_log([log], DataConfig(), ["a"], optional=["b", "z"]))
    assert block.table.column_names == ["a", "b"]


def test_folders_patterns_and_order(tmp_path):
    for name in ("2.csv", "1.csv", "_SUCCESS"):
        write(tmp_path / name, "a,b\n1,2\n")
    assert [p.name for p in expand([tmp_path])] == ["1.csv", "2.csv"]
    assert [p.name for p in expand([str(tmp_path / "?.csv")])] == ["1.csv", "2.csv"]


def test_progress_and_digest(tmp_path):
    log = write(tmp_path / "log.csv", "a,b\n1,2\n")
    reader = LogReader([log], DataConfig(), digests=True)
    list(reader.blocks(["a"]))
    assert reader.bytes_done == reader.bytes_total == 8
    again = LogReader([write(tmp_path / "same.csv", "a,b\n1,2\n")], DataConfig(), digests=True)
    list(again.blocks(["b"]))
    assert list(reader.digests.values()) == list(again.digests.values())


def test_table_blocks():
    blocks = list(table_blocks(pa.table({"a": [1, 2, 3]}), 2))
    assert [(b.file, b.first_row, b.table["a"].to_pylist()) for b in blocks] == [
        ("table", 1, [1, 2]),
        ("table", 3, [3]),
    ]


def gzipped(text: bytes, keep: float) -> bytes:
    whole = gzip.compress(text)
    return whole[: int(len(whole) * keep)]


LONG = b"a,b\n" + b"".join(b"%d,%d\n" % (i * 7919 % 10007, i * 104729 % 1299709) for i in range(20_000))

BAD_LOGS = {
    "too few columns": ("log.csv", b"a,b\n1,2\n3\n", r"log.csv: row 2 has 1 columns, expected 2"),
    "too many columns": (
        "log.csv",
        b"a,b\n1,2\n3,4\n5,6,7\n",
        r"row 3 has 3 columns, expected 2; mend or remove",
    ),
    "another format": ("log.csv", b"a,b\n1\t2\n", r"row 1 has 1 columns, expected 2; check data.format"),
    "near name": ("log.csv", b"aa,b\n1,2\n", r"log.csv: has no column 'a'; did you mean 'aa'\?"),
    "no such column": ("log.csv", b"xyz,b\n1,2\n", r"has no column 'a'; known: b, xyz"),
    "duplicate column": ("log.csv", b"a,b,a\n1,2,3\n", r"column 'a' is there twice"),
    "empty file": ("log.csv", b"", r"log.csv: is empty"),
    "header only": ("log.csv", b"a,b\n", r"log.csv: holds no rows"),
    "bad UTF-8": ("log.csv", b"a,b\n1,2\n3,\xff\xfe\n", r"row 2, column 'b': '\\xff\\xfe' is not UTF-8"),
    "bad UTF-8 header": ("log.csv", b"a,\xff\n1,2\n", r"first line is no header in UTF-8"),
    "truncated gzip": (
        "log.csv.gz",
        gzipped(LONG, 0.6),
        r"log.csv.gz: the compressed file is cut short or damaged",
    ),
    "damaged Parquet": ("log.parquet", b"PAR1 no more", r"log.parquet: no readable Parquet file"),
    "unknown ending": ("log.txt", b"a,b\n1,2\n", r"log.txt: its ending says no format .* set data.format"),
}


@pytest.mark.parametrize("case", BAD_LOGS)
def test_bad_logs_are_named(tmp_path, case):
    name, content, message = BAD_LOGS[case]
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / name)


def test_the_cut_row_of_a_truncated_file_is_counted(tmp_path):
    log = write(tmp_path / "log.csv.gz", gzipped(LONG, 0.6))
    with pytest.raises(UserError, match=r"after row 1\d{4} "):
        rows_of(log)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.csv", "a,b\n1,2\n")
    with pytest.raises(UserError, match="trian.csv: no such file; did you mean 'train.csv'"):
        rows_of(tmp_path / "trian.csv")
    with pytest.raises(UserError, match="empty folder"):
        (tmp_path / "void").mkdir()
        rows_of(tmp_path / "void")


def test_no_header_without_names(tmp_path):
    log = write(tmp_path / "log.csv", "1,2\n")
    with pytest.raises(UserError, match="column_names must name the columns"):
        rows_of(log, DataConfig(header=False))


def test_a_folder_with_one_corrupt_part_names_it(tmp_path):
    pq.write_table(pa.table({"a": ["1"], "b": ["2"]}), tmp_path / "part-0.parquet")
    whole = (tmp_path / "part-0.parquet").read_bytes()
    write(tmp_path / "part-1.parquet", whole[:-20])
    with pytest.raises(UserError, match="part-1.parquet: no readable Parquet"):
        rows_of(tmp_path)


def test_a_row_group_is_not_held_whole(tmp_path):
    rows = 300_000
    ids = pa.array(range(10**12, 10**12 + rows)).cast(pa.string())
    table = pa.table({"a": ids, "b": ids, "c": ids})
    pq.write_table(
        table, tmp_path / "log.parquet", row_group_size=rows, compression="none", use_dictionary=False
    )
    whole = table.nbytes
    del table, ids
    before = pa.total_allocated_bytes()
    held = [
        pa.total_allocated_bytes() - before
        for _ in open_log([tmp_path / "log.parquet"], DataConfig(block_rows=4096), ["a", "b", "c"])
    ]
    assert len(held) == 74
    assert max(held) < whole / 2


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_wide_rows_make_shorter_blocks_with_the_same_rows(tmp_path, monkeypatch, name):
    monkeypatch.setattr("mldcn.data.reading.BLOCK_BYTES", 20_000)
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 4_096)
    monkeypatch.setattr("mldcn.data.parquet_log._BATCH_BYTES", 4_096)
    rows = [(str(i), "x" * (7 * i % 900)) for i in range(1, 300)]
    if name == "log.csv":
        write(tmp_path / name, "a,b\n" + "".join(f"{a},{b}\n" for a, b in rows))
    else:
        columns = dict(zip("ab", map(list, zip(*rows, strict=True)), strict=True))
        pq.write_table(pa.table(columns), tmp_path / name, use_dictionary=False)
    blocks = list(open_log([tmp_path / name], DataConfig(block_rows=200), ["a", "b"]))
    assert max(block.table.nbytes for block in blocks) < 40_000
    assert len(blocks) > 4
    assert [block.first_row for block in blocks[1:]] == [b.first_row + len(b) for b in blocks[:-1]]
    assert rows_of(tmp_path / name) == [(a, b or None) for a, b in rows]


def test_a_program_that_stops_at_a_bad_row_exits_cleanly(tmp_path):
    log = write(tmp_path / "log.csv", "a,b\n" + "1,2\n" * 2000 + "3\n" + ("x" * 3000 + ",2\n") * 20_000)
    script = (
        "import sys; from mldcn.config import DataConfig; from mldcn.data.reading import open_log\n"
        f"for block in open_log([{str(log)!r}], DataConfig(), ['a', 'b']): pass\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "row 2001 has 1 columns" in done.stderr
        assert "Fatal" not in done.stderr
