"""Every kind of bad log: an error that names file, row, column, value and remedy; with skip, a line of rejects."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import schema

from mldcn import cli
from mldcn.config import DataConfig
from mldcn.data.parsing import parse, salvage
from mldcn.data.reading import open_log
from mldcn.data.rejects import BadRows, RejectsFile
from mldcn.errors import UserError

FEATURES = (
    {"kind": "numeric", "name": "n"},
    {"kind": "categorical", "name": "id"},
    {"kind": "multi", "name": "tags"},
    {"kind": "embedding", "name": "v", "width": 2},
    {"kind": "sequence", "name": "seen", "times": "at", "actions": "did"},
)
OTHERS = {"weight": "w", "position": "p", "time": "t", "request": "r"}
NAMES = ("click", "n", "id", "tags", "v", "seen", "at", "did", "w", "p", "t", "r")
GOOD = {
    "click": "1", "n": "2.5", "id": "a7", "tags": "x|y", "v": "1|2", "seen": "a|b", "at": "5|6", "did": "c|c",
    "w": "1", "p": "3", "t": "10", "r": "q1",
}  # fmt: skip


def line(**cells) -> str:
    return ",".join((GOOD | cells)[name] for name in NAMES)


def text(*lines: str) -> bytes:
    return ("\n".join([",".join(NAMES), *lines]) + "\n").encode()


def read(files, *, on_error="fail", **data):
    """The log's parsed blocks, and what was left out."""
    meaning = schema(FEATURES, **OTHERS)
    blocks, rejects = [], []
    for raw in open_log(files, DataConfig(on_error=on_error, **data), meaning.columns()):
        parsed, good = salvage(raw, lambda block: parse(meaning, block))
        assert parsed.rows == len(good)
        assert good.span == raw.span
        blocks.append(parsed)
        rejects += good.rejects
    return blocks, rejects


def fails(files, **data) -> str:
    with pytest.raises(UserError) as caught:
        read(files, **data)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is wrong -> the row, the column, the value as an error shows it, a word of the problem.
BAD_CELLS = {
    "text in a numeric column": ("n", "two", "'two'", "is not a number; mend the row"),
    "nan": ("n", "NaN", "'NaN'", "is not a number"),
    "infinite": ("n", "-inf", "'-inf'", "is infinite; replace it"),
    "overflow": ("n", "1e999", "'1e999'", "is infinite"),
    "label of 2": ("click", "2", "'2'", "is no label; labels are 0 and 1"),
    "label of -1": ("click", "-1", "'-1'", "is no label"),
    "label text": ("click", "yes", "'yes'", "is no label"),
    "label nan": ("click", "nan", "'nan'", "is no label"),
    "negative weight": ("w", "-0.5", "'-0.5'", "is no weight; give a number of at least 0"),
    "no weight": ("w", "", "an empty cell", "is no weight"),
    "weight beyond float32": ("w", "1e39", "'1e39'", "is no weight"),
    "position of 0": ("p", "0", "'0'", "is no position"),
    "half a position": ("p", "1.5", "'1.5'", "is no position"),
    "no time": ("t", "soon", "'soon'", "is neither a number nor an ISO date-time"),
    "vector of 3": ("v", "1|2|3", "'1|2|3'", "has 3 elements, expected 2"),
    "text in a vector": ("v", "1|b", "'b'", "is not a number"),
    "hole in a vector": ("v", "1|", "''", "is not a number"),
    "infinite in a vector": ("v", "1|inf", "'inf'", "is infinite"),
    "parallel lists": ("at", "5", "'5'", "has 1 elements, but column 'seen' has 2"),
    "parallel actions": ("did", "c|c|c", "'c|c|c'", "has 3 elements, but column 'seen' has 2"),
    "text in times": ("at", "5|then", "'then'", "is neither a number nor an ISO date-time"),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_a_bad_cell_is_named_or_rejected(tmp_path, case):
    column, cell, shown, problem = BAD_CELLS[case]
    log = tmp_path / "log.csv"
    log.write_bytes(text(line(), line(id="b"), line(id="c", **{column: cell}), line(id="d")))
    message = fails([log])
    assert message.startswith(f"{log}: row 3, column {column!r}: {shown} {problem}")
    blocks, rejects = read([log], on_error="skip")
    (reject,) = rejects
    assert reject[:3] == (str(log), 3, column)
    assert reject.value in (cell, shown.strip("'")) or not cell
    assert reject.problem.startswith(problem)
    clean = tmp_path / "clean.csv"
    clean.write_bytes(text(line(), line(id="b"), line(id="d")))
    assert_same(blocks, read([clean])[0])


def assert_same(blocks, others):
    """Both logs say the same, however they were cut into blocks."""
    assert sum(block.rows for block in blocks) == sum(block.rows for block in others)
    for name in ("labels", "weight", "position", "request", "user", "time"):
        np.testing.assert_array_equal(
            *(np.concatenate([getattr(b, name) for b in of]) for of in (blocks, others))
        )
    for group in ("numbers", "vectors"):
        for name in getattr(others[0], group):
            pair = [np.concatenate([getattr(b, group)[name] for b in of]) for of in (blocks, others)]
            np.testing.assert_array_equal(*pair)
    for name in others[0].ids:
        np.testing.assert_array_equal(
            *(np.concatenate([b.ids[name].keys for b in of]) for of in (blocks, others))
        )


BAD_LINES = {
    "too few columns": (b"1,2", "has 2 columns, expected 12; mend or remove the row (the row: '1,2')"),
    "too many columns": (line().encode() + b",more", "has 13 columns, expected 12"),
    "an empty quoted line": (b'""', "has 1 columns, expected 12"),
    "bad UTF-8": (line(id="@").encode().replace(b"@", b"\xe9t\xe9"), r"column 'id': '\xe9t\xe9' is not UTF-8"),
    "bad UTF-8 and too few columns": (b"\xff,1", r"mend or remove the row (the row: '\xff,1')"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_malformed_line_is_named_or_rejected(tmp_path, case):
    bad, message = BAD_LINES[case]
    log = tmp_path / "log.csv"
    log.write_bytes(text(line(), line(id="b")) + bad + b"\n" + (line(id="c") + "\n").encode())
    assert fails([log]).startswith(f"{log}: row 3")
    assert message in fails([log])
    blocks, rejects = read([log], on_error="skip")
    assert [reject[:2] for reject in rejects] == [(str(log), 3)]
    clean = tmp_path / "clean.csv"
    clean.write_bytes(text(line(), line(id="b"), line(id="c")))
    assert_same(blocks, read([clean])[0])


DAMAGE = {
    "empty file": ("log.csv", b"", "is empty; remove it"),
    "header only": ("log.csv", text(), "holds no rows; remove it"),
    "blank lines only": ("log.csv", b"\n\r\n\n", "holds no rows"),
    "missing column": ("log.csv", text(line()).replace(b"tags", b"tag"), "no column 'tags'; did you mean 'tag'?"),
    "duplicate column": ("log.csv", text(line()).replace(b"did", b"at"), "has no column 'did'"),
    "column twice": ("log.csv", text(line() + ",3").replace(b",r\n", b",r,n\n"), "column 'n' is there twice"),
    "schema of another log": ("log.csv", b"user,movie\n1,2\n", "has no column 'n', nor 11 others that"),
    "UTF-16": ("log.csv", text(line()).decode().encode("utf-16"), "is in UTF-16 or no text; write it"),
    "UTF-16 without a mark": ("log.csv", text(line()).decode().encode("utf-16-le"), "is in UTF-16 or no text"),
    "latin header": ("log.csv", b"click,\xe9\n1,2\n", "first line is no header in UTF-8; write the file again"),
    "open quote": ("log.csv", text(line(), line(id='"a')), "row 2, the last: a quote in it is never closed"),
    "truncated gzip": ("log.csv.gz", gzip.compress(text(line()))[:-9], "cut short or damaged after row 0"),
    "flipped gzip": ("log.csv.gz", gzip.compress(text(line()))[:-6] + bytes(6), "incorrect data check"),
    "truncated zstd": ("log.csv.zst", pa.compress(text(line()), "zstd", asbytes=True)[:-3], "cut short or"),
    "no gzip at all": ("log.csv.gz", b"\x1f\x8bno", "cut short or damaged after row 0"),
    "Parquet by name only": ("log.parquet", text(line()), "no readable Parquet file"),
    "not a CSV": ("log.csv", b"PAR1" + bytes(100), "is in UTF-16 or no text"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_damage_stops_in_both_modes(tmp_path, case, on_error):
    name, content, message = DAMAGE[case]
    (tmp_path / name).write_bytes(content)
    found = fails([tmp_path / name], on_error=on_error)
    assert found.startswith(str(tmp_path / name))
    assert message in found


@pytest.mark.parametrize("case", [*BAD_CELLS, *BAD_LINES, *DAMAGE])
def test_the_command_line_says_it_in_one_line(tmp_path, case, capsys, monkeypatch):
    if case in DAMAGE:
        name, content, message = DAMAGE[case]
    elif case in BAD_LINES:
        (bad, message), name = BAD_LINES[case], "log.csv"
        content = text(line(), line()) + bad + b"\n"
    else:
        (column, cell, _, message), name = BAD_CELLS[case], "log.csv"
        content = text(line(), line(**{column: cell}))
    (tmp_path / name).write_bytes(content)
    config = tmp_path / "config.yaml"
    meaning = schema(FEATURES, **OTHERS).model_dump_json()
    split = "{kind: hash, valid: 0, test: 0}"
    config.write_text(f"data: {{train: [{tmp_path / name}], split: {split}}}\nschema: {meaning}\n")
    monkeypatch.setattr("sys.argv", ["mldcn", "describe", str(config)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    assert caught.value.code == 1
    assert captured.out == ""
    assert captured.err.startswith(f"mldcn: {tmp_path / name}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_rows_are_counted_right_far_into_the_second_file(tmp_path, monkeypatch):
    """Blank lines do not count; a record with quoted line ends counts once; each file counts for itself."""
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 4096)
    odd = [line(), "", line(id='"two\nlines"'), "\r", line(id='"\r\n\r\n"')] * 300
    first, second = tmp_path / "1.csv", tmp_path / "2.csv"
    first.write_bytes(text(*odd))
    second.write_bytes(text(*odd, line(n="oops"), line()))
    assert fails([first, second], block_rows=256).startswith(f"{second}: row 901, column 'n': 'oops'")
    second.write_bytes(text(*odd, line(), "short", line()))
    assert fails([first, second], block_rows=256).startswith(f"{second}: row 902 has 1 columns")
    second.write_bytes(text(*odd, line(), "short", line(), line(n="oops"), line(click="5"), *odd, "1,2"))
    blocks, rejects = read([first, second], on_error="skip", block_rows=256)
    assert sum(block.rows for block in blocks) == 900 + 900 + 2 + 900
    assert [(Path(r.file).name, r.row, r.column) for r in rejects] == [
        ("2.csv", 902, ""), ("2.csv", 904, "n"), ("2.csv", 905, "click"), ("2.csv", 1806, ""),
    ]  # fmt: skip


def test_no_header_counts_from_the_first_line(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes("\n".join([line(), line(), line(n="x")]).encode())
    options = {"header": False, "column_names": NAMES}
    assert "row 3, column 'n': 'x'" in fails([log], **options)
    log.write_bytes(b"\xef\xbb\xbf1,2\n")
    assert "row 1 has 2 columns, expected 12; check data.format, data.delimiter" in fails([log], **options)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_marks_make_no_difference(tmp_path, end, monkeypatch):
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 512)
    lines = [",".join(NAMES), *(line(id=f"é{i}") for i in range(60))]
    log = tmp_path / "log.csv"
    log.write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    plain = tmp_path / "plain.csv"
    plain.write_bytes(("\n".join(lines) + "\n").encode())
    assert_same(read([log])[0], read([plain])[0])
    mixed = tmp_path / "mixed.csv"
    ends = ["\n", "\r\n", "\r", "\n\n"]
    mixed.write_bytes("".join(x + ends[i % 4] for i, x in enumerate(lines)).encode())
    assert_same(read([mixed])[0], read([plain])[0])


def test_a_very_long_row_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 4096)
    log = tmp_path / "log.csv"
    log.write_bytes(text(*[line()] * 500, line(id="x" * 10_000), line()))
    assert fails([log]).startswith(f"{log}: row 501 is longer than")


def ids_of(column, *, kind="categorical"):
    meaning = schema([{"kind": kind, "name": "id"}])
    table = pa.table({"id": column, "click": [1] * len(column)})
    return table, meaning


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([2**53 + 1, 2**63 - 1, -(2**63)], pa.int64()), [str(2**53 + 1), str(2**63 - 1), str(-(2**63))]),
        (pa.array([2**64 - 1, 2**63, 0], pa.uint64()), [str(2**64 - 1), str(2**63), "0"]),
        (pa.array([123.0, None, -4.0]), ["123", None, "-4"]),
        (pa.array([123.0, None, 0.5], pa.float32()), ["123", None, "0.5"]),
        (pa.array(["123.0", "123", "-0.0", "1.50"]), ["123", "123", "0", "1.50"]),
        (pa.array([".0", "x.0", None, ""]), [".0", "x.0", None, None]),
        (pa.array(["18446744073709551617", "007"]), ["18446744073709551617", "007"]),
        (pa.array([10**18 + 1, 7]).cast(pa.decimal128(38, 0)), [str(10**18 + 1), "7"]),
        (pa.array(["12.00", "12.50"]).cast(pa.decimal128(10, 2)), ["12", "12.50"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"bytes", None]), ["bytes", None]),
    ],
)  # fmt: skip
def test_ids_keep_every_digit_whatever_their_type(tmp_path, column, texts):
    from mldcn.data import cells
    from mldcn.data.hashing import hash_texts

    table, meaning = ids_of(column)
    path = tmp_path / "log.parquet"
    pq.write_table(table, path)
    (block,) = open_log([path], DataConfig(), meaning.columns())
    assert cells.texts(block, "id").to_pylist() == texts
    ids = parse(meaning, block).ids["id"]
    there = ids.codes[:, 0] >= 0
    assert there.tolist() == [text is not None for text in texts]
    expected = hash_texts(pa.array(texts, pa.string()))
    np.testing.assert_array_equal(ids.keys[ids.codes[there, 0]], expected[there])


@pytest.mark.parametrize("value", [2.0**53 + 2, -1e300, float("inf")])
def test_a_float_that_lost_digits_is_no_id(tmp_path, value):
    table, meaning = ids_of([1.0, value])
    pq.write_table(table, tmp_path / "log.parquet")
    (block,) = open_log([tmp_path / "log.parquet"], DataConfig(), meaning.columns())
    with pytest.raises(UserError, match="row 2, column 'id': .* is too large for an id in a floating column"):
        parse(meaning, block)
    table, meaning = ids_of([[1.0], [2.0, 3.0, value]], kind="multi")
    pq.write_table(table, tmp_path / "log.parquet")
    (block,) = open_log([tmp_path / "log.parquet"], DataConfig(), meaning.columns())
    with pytest.raises(UserError, match="row 2, column 'id': .* is too large"):
        parse(meaning, block)


def parts(folder, count=3, rows=2000, **options):
    folder.mkdir()
    for i in range(count):
        ids = [f"{i}-{j}" for j in range(rows)]
        pq.write_table(
            pa.table({"id": ids, "click": [j % 2 for j in range(rows)]}), folder / f"{i}.parquet", **options
        )
    return schema([{"kind": "categorical", "name": "id"}])


def parsed_parts(folder, meaning, **data):
    blocks = open_log([folder], DataConfig(**data), meaning.columns())
    return [salvage(block, lambda b: parse(meaning, b))[0] for block in blocks]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_one_corrupt_part_of_a_folder_is_named(tmp_path, on_error):
    meaning = parts(tmp_path / "log", write_page_checksum=True, compression="none", use_dictionary=False)
    path = tmp_path / "log" / "1.parquet"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-10], "no readable Parquet file"),
        (whole[: len(whole) // 2], "no readable Parquet file"),
        (
            whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
            "damaged Parquet file, unreadable after row 0",
        ),
        (b"", "is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            parsed_parts(tmp_path / "log", meaning, on_error=on_error)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)


def test_parts_may_differ_in_types_and_order_but_not_in_columns(tmp_path):
    meaning = schema([{"kind": "categorical", "name": "id"}, {"kind": "numeric", "name": "n"}])
    folder = tmp_path / "log"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1, 2], "click": [0, 1], "n": [1, 2]}), folder / "0.parquet")
    pq.write_table(pa.table({"n": ["1", "2"], "id": ["1", "2"], "click": ["0", "1"]}), folder / "1.parquet")
    pq.write_table(
        pa.table({"id": [1.0, 2.0], "click": [False, True], "n": [1.0, 2.0], "x": [0, 0]}),
        folder / "2.parquet",
    )
    nothing = pa.table({"id": [3, 4], "click": [0, 1], "n": pa.nulls(2)})
    pq.write_table(nothing, folder / "3.parquet")
    blocks = parsed_parts(folder, meaning)
    for block in blocks[1:3]:
        assert_same([block], [blocks[0]])
    assert np.isnan(blocks[3].numbers["n"]).all()
    pq.write_table(pa.table({"id": [1], "n": [1.0]}), folder / "4.parquet")
    with pytest.raises(UserError, match=r"4.parquet: has no column 'click'"):
        parsed_parts(folder, meaning)


def test_parquet_texts_that_are_not_utf8(tmp_path):
    values = [b"good", b"\xe9t\xe9", None, b"fine"]
    wrong = pa.array(values, pa.binary()).cast(pa.large_binary())
    array = pa.Array.from_buffers(pa.large_string(), 4, wrong.buffers())
    pq.write_table(pa.table({"id": array, "click": [0, 1, 1, 0]}), tmp_path / "log.parquet")
    meaning = schema([{"kind": "categorical", "name": "id"}])
    with pytest.raises(
        UserError, match=r"row 2, column 'id': '\\xe9t\\xe9' is not UTF-8; write the file again"
    ):
        parsed_parts(tmp_path / "log.parquet", meaning)
    (block,) = parsed_parts(tmp_path / "log.parquet", meaning, on_error="skip")
    assert block.labels[:, 0].tolist() == [0, 1, 0]


def test_times_of_one_column_are_of_one_kind(tmp_path):
    """Zones may be mixed; numbers among date-times may not, whichever is the rarer is bad."""
    log = tmp_path / "log.csv"
    log.write_bytes(
        text(
            line(t="2020-01-01"), line(t="2020-01-01T01:00:00+01:00"), line(t="2020-01-01 00:00:00.000000001")
        )
    )
    (block,), _ = read([log])
    assert block.time.tolist() == [1577836800.0] * 3
    log.write_bytes(text(line(t="2020-01-01"), line(t="7"), line(t="2020-01-02")))
    assert "row 2, column 't': '7' is neither" in fails([log])
    log.write_bytes(text(line(t="8"), line(t="7"), line(t="2020-01-02")))
    assert "row 3, column 't': '2020-01-02' is neither" in fails([log])
    huge = pa.table({"id": ["a", "b"], "click": [0, 1], "t": pa.array([0, 2**60], pa.timestamp("ms"))})
    pq.write_table(huge, tmp_path / "t.parquet")
    meaning = schema([{"kind": "categorical", "name": "id"}], time="t")
    with pytest.raises(UserError, match="row 2, column 't': .*is beyond the times"):
        parsed_parts(tmp_path / "t.parquet", meaning)


def test_the_first_problem_of_a_row_is_kept_and_rows_stay_in_order(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes(
        text(
            line(p="0", click="7"), line(), line(n="?", v="1"), "x", line(v="1"), line(n="inf"), line(id="z")
        )
    )
    blocks, rejects = read([log], on_error="skip")
    assert [(r.row, r.column, r.value) for r in rejects] == [
        (1, "click", "7"), (3, "n", "?"), (4, "", "x"), (5, "v", "1"), (6, "n", "inf"),
    ]  # fmt: skip
    assert [block.rows for block in blocks] == [2]


def test_positions_are_those_of_the_raw_log(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes(text(line(), "x", line(n="?"), line(), "y", line(), "z"))
    meaning = schema(FEATURES, **OTHERS)
    seen = []
    for raw in open_log([log], DataConfig(on_error="skip", block_rows=2), meaning.columns()):
        _, good = salvage(raw, lambda block: parse(meaning, block))
        seen.append((good.first_row, good.span, good.positions().tolist()))
    assert seen == [(1, 3, [0]), (4, 3, [0, 2]), (7, 1, [])]


def test_a_file_of_malformed_lines_alone_gives_an_empty_block(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes(text("x", "y"))
    (block,), rejects = read([log], on_error="skip")
    assert block.rows == 0
    assert [r.row for r in rejects] == [1, 2]


def test_a_split_by_time_needs_times(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes(text(line(), line(t=""), line()))
    meaning = schema(FEATURES, **OTHERS)
    (raw,) = open_log([log], DataConfig(on_error="skip"), meaning.columns())
    parsed, good = salvage(raw, lambda block: parse(meaning, block, timed=True))
    assert parsed.rows == 2
    assert "is no time, and data.split goes by time" in good.rejects[0].problem


def test_the_rejects_file_has_a_line_for_each(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes(text(line(n='"a\nb"'), '"x', '"', line(), line(n="?")))
    _, rejects = read([log], on_error="skip")
    path = tmp_path / "rejects.csv"
    path.touch()
    with RejectsFile(path) as file:
        file.add([])
    assert not path.exists()
    with RejectsFile(path) as file:
        file.add(rejects)
        assert file.count == 3
        file.refuse_all(1)
        with pytest.raises(UserError, match=r"all 3 rows are bad.*row 1, column 'n': 'a.nb' is not a number"):
            file.refuse_all(0)
    assert len(path.read_text().splitlines()) == 4
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["file", "row", "column", "value", "problem"]
    assert [(r["row"], r["column"], r["value"]) for r in rows] == [
        ("1", "n", "a\\nb"), ("2", "", '"x\\n"'), ("4", "n", "?"),
    ]  # fmt: skip


def test_an_error_that_is_not_of_rows_is_not_skipped(tmp_path):
    meaning = schema([{"kind": "numeric", "name": "n"}])
    pq.write_table(pa.table({"n": [[1]], "click": [1]}), tmp_path / "log.parquet")
    (raw,) = open_log([tmp_path / "log.parquet"], DataConfig(on_error="skip"), meaning.columns())
    with pytest.raises(UserError, match="column 'n' holds list") as caught:
        salvage(raw, lambda block: parse(meaning, block))
    assert not isinstance(caught.value, BadRows)
