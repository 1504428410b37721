"""Rows that are only located are those that the parser gives, cell by cell."""

import random
from collections import defaultdict

import numpy as np
import pytest
from data_cases import schema

from mldcn.config import DataConfig
from mldcn.data import cells
from mldcn.data.hashing import WordTexts, first_words, hash_texts, hash_words
from mldcn.data.located import Located
from mldcn.data.parsing import parse
from mldcn.data.reading import LogReader
from mldcn.data.spool import Spool, slim

CELLS = {
    "n": ["", "0", "7", "-3", "-0", "007", "99999999", "-9999999", "12"],
    "odd": ["", "123456789", "-12345678", "1.5", "+3", " 4 ", "1e5", "-0.0", "5"],
    "short": ["", "a", "1.0", "1", "-2.0", ".0", "x.0", "12345678", "é", "日本", "NA"],
    "long": ["", "123456789", "exactly12 ch", "thirteen char", "日本語テキスト", "NA", "1.0", "s"],
}
SCHEMA = schema(
    [
        {"name": "n", "kind": "numeric", "transform": "identity"},
        {"name": "odd", "kind": "numeric", "transform": "identity"},
        {"name": "short", "kind": "categorical"},
        {"name": "long", "kind": "categorical"},
        {"name": "texts", "kind": "categorical", "column": "long"},
    ]
)
PLAIN = "click,n,odd,short,long\n"


def drawn(rows, seed=0, delimiter=","):
    draw = random.Random(seed)
    lines = [delimiter.join(["1", *(draw.choice(column) for column in CELLS.values())]) for _ in range(rows)]
    return PLAIN.replace(",", delimiter) + "".join(f"{line}\n" for line in lines)


def blocks(path, data, located):
    reader = LogReader([path], data, digests=True)
    names = SCHEMA.columns()
    ids = ("short", "long") if located else None
    found = list(reader.blocks(names, numbers=("n", "odd") if located else (), ids=ids))
    return found, reader.digests[str(path)]


def values(blocks):
    """What blocks say, by kind and feature: ids' texts and keys, numbers' bits, labels."""
    found = defaultdict(list)
    for block in blocks:
        parsed = parse(SCHEMA, block)
        for name, ids in parsed.ids.items():
            for code in ids.codes[:, 0].tolist():
                found["text", name].append(None if code < 0 else ids.texts.take([code]).to_pylist()[0])
                found["key", name].append(None if code < 0 else int(ids.keys[code]))
        for name, numbers in parsed.numbers.items():
            found["number", name] += numbers.view(np.uint64).tolist()
        found["label", "click"] += parsed.labels.tolist()
        for name in ("click", "short", "long"):
            found["cell", name] += cells.column(block, name).to_pylist()
    return found


def assert_same(path, data, located):
    """Both ways lead to the same rows; ``located`` says of each block whether it is only located."""
    (fast, digest), (slow, expected) = blocks(path, data, True), blocks(path, data, False)
    assert [isinstance(block.rows, Located) for block in fast] == located
    assert digest == expected
    assert sum(map(len, fast)) == sum(map(len, slow))
    assert [block.first_row for block in fast] == [1 + sum(map(len, fast[:i])) for i in range(len(fast))]
    assert values(fast) == values(slow)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("missing", [("",), ("", "NA"), ("", "thirteen char", "7")])
@pytest.mark.parametrize("end", ["\n", "", "\n\n\n"])
def test_plain_rows(tmp_path, monkeypatch, delimiter, missing, end):
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 700)
    path = tmp_path / "log.csv"
    path.write_text(drawn(300, delimiter=delimiter).rstrip("\n") + end, encoding="utf-8")
    data = DataConfig(delimiter=delimiter, missing=missing, block_rows=128)
    assert_same(path, data, [True, True, True])


def test_blocks_are_cut_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 700)
    monkeypatch.setattr("mldcn.data.reading.BLOCK_BYTES", 3_000)
    path = tmp_path / "log.csv"
    path.write_text(drawn(300), encoding="utf-8")
    found, _ = blocks(path, DataConfig(), True)
    assert len(found) > 3
    assert all(block.rows.text.nbytes < 4_000 for block in found)
    assert_same(path, DataConfig(), [True] * len(found))


@pytest.mark.parametrize(
    "row",
    ['1,1,1,"a",b', "1,1,1,a,b\r", "", "1,1,1,a\0,b"],
    ids=["quote", "carriage return", "blank", "zero"],
)
def test_the_parser_goes_on_where_rows_are_not_plain(tmp_path, monkeypatch, row):
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 700)
    path = tmp_path / "log.csv"
    path.write_text(drawn(200) + row + "\n" + drawn(100, 1).removeprefix(PLAIN), encoding="utf-8", newline="")
    assert_same(path, DataConfig(block_rows=64), [True] * 3 + [False] * 2)


@pytest.mark.parametrize("text", ["\ufeff" + drawn(9), '"click",' + drawn(9).removeprefix("click,")])
def test_a_header_that_is_not_plain_is_the_parsers(tmp_path, text):
    path = tmp_path / "log.csv"
    path.write_text(text, encoding="utf-8")
    assert_same(path, DataConfig(), [False])


@pytest.mark.parametrize("row", [b"1,1,1,a", b"1,1,1,a,b,c", b"1,1,1,\xff,b"])
def test_bad_rows_are_found_and_left_out_as_ever(tmp_path, monkeypatch, row):
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", 2048)
    path = tmp_path / "log.csv"
    path.write_bytes(drawn(200).encode() + row + b"\n" + drawn(100, 1).removeprefix(PLAIN).encode())
    found, _ = blocks(path, DataConfig(block_rows=64, on_error="skip"), True)
    assert isinstance(found[0].rows, Located)
    assert sum(map(len, found)) == 300
    assert [reject.row for block in found for reject in block.rejects] == [201]


def test_short_texts_as_words():
    path_texts = ["", "a", "é", "12345678", "zz.0"]
    words = np.array([int.from_bytes(text.encode(), "little") for text in path_texts], np.uint64)
    texts = WordTexts(words)
    array = texts.take(np.arange(len(words)))
    assert array.to_pylist() == path_texts
    assert texts.heads().tolist() == first_words(array).tolist()
    lengths = np.array([len(text.encode()) for text in path_texts])
    assert hash_words(words, lengths).tolist() == hash_texts(array).tolist()


def test_a_spool_gives_what_it_took_from_memory_and_disk(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(drawn(300), encoding="utf-8")
    parsed = [slim(parse(SCHEMA, block)) for block in blocks(path, DataConfig(block_rows=50), True)[0]]
    for memory in (0, 10_000, 1 << 30):
        spool = Spool(tmp_path / "spool", memory=memory)
        for block in parsed:
            spool.add(block, np.zeros(block.rows, np.int8))
        assert (spool.bytes > 0) == (memory < 1 << 30)
        for mine, (found, _) in zip(parsed, spool.blocks(), strict=True):
            for name, ids in mine.ids.items():
                assert ids.codes.tolist() == found.ids[name].codes.tolist()
                assert ids.keys.tolist() == found.ids[name].keys.tolist()
            np.testing.assert_equal(mine.numbers, found.numbers)
            np.testing.assert_equal(mine.labels, found.labels)
        spool.close()
