"""Random schemas and logs, as CSV and Parquet, are read and encoded as a slow, plain reading has them."""

import bisect
import math
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_cases import schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hashing import mixed, plain_hash

from mldcn.config import DataConfig
from mldcn.data.encoder import Encoder
from mldcn.data.reading import open_log, table_blocks

# Anything that UTF-8 can hold, but the list delimiter and nothing at all.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), min_size=1, max_size=9)
TEXTS = st.sampled_from(["a", "b", "1", "2.0", "-0.0", "é", "NA", "a longer id than a word"]) | WORDS
WHOLE = st.integers(-3, 3) | st.sampled_from([2**53 + 1, 2**63 - 1, -(2**63)])
IDS = {
    pa.string(): TEXTS,
    pa.int64(): WHOLE,
    pa.uint64(): st.sampled_from([0, 7, 2**63, 2**64 - 1]),
    pa.float64(): st.integers(-(2**53), 2**53).map(float),
    pa.bool_(): st.booleans(),
}
NUMBERS = {
    pa.int64(): WHOLE,
    pa.float64(): st.floats(-1e6, 1e6, width=32),
    pa.string(): st.sampled_from(["1", "-2.5", "1e3", " 4", "+.5"]),
}
EXTREMES = st.sampled_from([1e308, -1e308, 5e-324, 0.1, 2.0**53, -0.0])


@st.composite
def features(draw, name, tables):
    """A feature, its columns' types and cells."""
    kind = draw(st.sampled_from(["numeric", "bucketised", "categorical", "multi", "embedding", "sequence"]))
    feature = {"kind": kind, "name": name}
    if kind == "numeric":
        feature["transform"] = draw(st.sampled_from(["identity", "signed_log", "quantile"]))
        feature["standardise"] = draw(st.booleans())
        feature["missing_indicator"] = draw(st.booleans())
        if draw(st.booleans()):
            feature |= {"transform": "quantile", "standardise": False}
            return feature, {name: (pa.float64(), st.none() | EXTREMES)}
    if kind in ("numeric", "bucketised"):
        of = draw(st.sampled_from(list(NUMBERS)))
        if kind == "bucketised":
            feature["method"] = draw(st.sampled_from(["quantile", "boundaries", "log2"]))
            if feature["method"] == "boundaries":
                feature["boundaries"] = [-1.5, 0.0, 2.0]
            else:
                feature["buckets"] = draw(st.integers(2, 5))
        return feature, {name: (of, st.none() | NUMBERS[of])}
    if kind == "embedding":
        feature["width"] = 3
        vectors = st.none() | st.lists(st.floats(-9, 9, width=16), min_size=3, max_size=3)
        return feature, {name: (pa.list_(pa.float32()), vectors)}
    if draw(st.booleans()) and tables:
        feature["share"] = draw(st.sampled_from(tables))
    elif draw(st.booleans()):
        feature["encoding"] = {
            "kind": "hash",
            "rows": draw(st.integers(1, 50)),
            "hashes": draw(st.integers(1, 2)),
        }
    else:
        feature["encoding"] = {"kind": "vocabulary", "min_count": draw(st.integers(1, 3))}
    of = draw(st.sampled_from(list(IDS)))
    if kind == "categorical":
        return feature, {name: (of, st.none() | IDS[of])}
    feature["max_length"] = draw(st.integers(1, 4))
    of = pa.string() if of == pa.bool_() else of
    columns = {name: (pa.list_(of), st.none() | st.lists(IDS[of], min_size=1, max_size=6))}
    if kind == "sequence" and draw(st.booleans()):
        feature |= {"times": f"{name}.times", "actions": f"{name}.did"}
        columns[name] = (pa.list_(of), st.none() | st.lists(IDS[of], min_size=1, max_size=3))
        columns[f"{name}.times"] = (pa.list_(pa.int64()), None)
        columns[f"{name}.did"] = (pa.list_(pa.string()), None)
    return feature, columns


@st.composite
def logs(draw):
    """A schema, and the log's columns: name -> (type, cells)."""
    rows = draw(st.integers(1, 12))
    found, columns, tables = [], {}, []
    for number in range(draw(st.integers(1, 4))):
        feature, cells = draw(features(f"f{number}", tables))
        if feature["kind"] in ("categorical", "multi", "sequence") and "share" not in feature:
            tables.append(feature["name"])
        found.append(feature)
        for name, (of, values) in cells.items():
            if values is not None:
                columns[name] = (of, draw(st.lists(values, min_size=rows, max_size=rows)))
        if "times" in feature:
            lengths = [len(row or ()) for row in columns[feature["name"]][1]]
            columns[feature["times"]] = (pa.list_(pa.int64()), [list(range(n)) or None for n in lengths])
            columns[feature["actions"]] = (
                pa.list_(pa.string()),
                [["c", "d", "c"][:n] or None for n in lengths],
            )
    columns["click"] = (
        pa.int64(),
        draw(st.lists(st.none() | st.integers(0, 1), min_size=rows, max_size=rows)),
    )
    columns["now"] = (pa.int64(), draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows)))
    return found, columns


def as_text(cell):
    """A cell as another program would write it: floats with a fraction, lists joined."""
    if cell is None:
        return ""
    if isinstance(cell, list):
        return "|".join(map(as_text, cell))
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def write_csv(path, columns, delimiter, quote_all, end):
    """RFC 4180; Python's own writer leaves a carriage return bare where lines end in a line feed."""

    def quoted(cell):
        text = as_text(cell)
        special = quote_all or not {delimiter, '"', "\r", "\n"}.isdisjoint(text)
        return '"' + text.replace('"', '""') + '"' if special else text

    lines = [columns, *zip(*(cells for _, cells in columns.values()), strict=True)]
    text = "".join(delimiter.join(map(quoted, line)) + end for line in lines)
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.CompressedOutputStream(str(path), kind) if kind else path.open("wb") as sink:
        sink.write(text.encode())


def encoded(meaning, blocks):
    """The fitted encoder and its rows, in one array a field."""
    blocks = list(blocks)
    encoder = Encoder.fit(meaning, blocks)
    parts = [encoder.encode(block) for block in blocks]
    names = ("ids", "dense", "labels", "time", "request")
    return encoder, {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=logs(),
    delimiter=st.sampled_from([",", ";", "\t"]),
    quote_all=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    ending=st.sampled_from([".csv", ".csv.gz", ".csv.zst"]),
    block_rows=st.integers(1, 6),
    read_bytes=st.sampled_from([1 << 10, 1 << 20]),
)
def test_every_format_encodes_as_the_plain_reading(
    tmp_path_factory, monkeypatch, case, delimiter, quote_all, end, ending, block_rows, read_bytes
):
    monkeypatch.setattr("mldcn.data.text_log.READ_BYTES", read_bytes)
    found, columns = case
    meaning = schema(found, time="now")
    folder = tmp_path_factory.mktemp("log")
    text, typed = folder / f"log{ending}", folder / "log.parquet"
    write_csv(text, columns, delimiter, quote_all, end)
    table = pa.table({name: pa.array(cells, of) for name, (of, cells) in columns.items()})
    pq.write_table(table, typed, row_group_size=5)
    data = DataConfig(delimiter=delimiter, block_rows=block_rows)
    encoder, rows = encoded(meaning, open_log([text], data, meaning.columns()))
    for blocks in (open_log([typed], data, meaning.columns()), table_blocks(table, block_rows)):
        other, others = encoded(meaning, blocks)
        assert other.layout == encoder.layout
        for name, values in rows.items():
            np.testing.assert_array_equal(values, others[name])
    check_against_plain_reading(found, columns, encoder, rows)


def check_against_plain_reading(found, columns, encoder, rows):
    plain = {name: cells for name, (_, cells) in columns.items()}
    known = [math.nan if cell is None else cell for cell in plain["click"]]
    np.testing.assert_array_equal(rows["labels"][:, 0], known)
    np.testing.assert_array_equal(rows["time"], plain["now"])
    given = {feature["name"]: feature for feature in found}
    seen: dict[str, list] = {}
    for slot in encoder.layout.ids:
        feature = given[slot.feature]
        name = feature["actions"] if slot.role == "actions" else slot.feature
        ids = [plain_ids(feature, cell, encoder) for cell in plain[name]]
        cells = rows["ids"][:, slot.columns].tolist()
        width = slot.length * slot.hashes
        for row, texts in zip(cells, ids, strict=True):
            texts = texts + [None] * (slot.length - len(texts))
            assert len(row) == width
            which = [number // slot.length for number in range(width)]
            seen.setdefault(slot.table, []).extend(zip(texts * slot.hashes, row, which, strict=True))
    for table, pairs in seen.items():
        owner = given[table.removesuffix(".actions")]
        check_table(owner if table in given else {}, pairs)
    for slot in encoder.layout.dense:
        check_dense(given[slot.feature], plain, rows["dense"][:, slot.columns])


def plain_ids(feature, cell, encoder):
    """The ids of a cell, as texts."""
    if cell is None:
        return []
    if feature["kind"] == "bucketised":
        return [str(bucket(feature, float(cell), encoder.boundaries.get(feature["name"], ())))]
    cells = cell if isinstance(cell, list) else [cell]
    length = feature.get("max_length", 1)
    cells = cells[::-1][:length] if feature["kind"] == "sequence" else cells[:length]
    return [plain_id(cell) for cell in cells]


def plain_id(cell):
    text = as_text(cell)
    whole = re.fullmatch(r"(-?[0-9]+)\.0", text)
    if isinstance(cell, float):
        return str(int(cell))  # Python's integers have every digit
    return ("0" if text == "-0.0" else whole[1]) if whole else text


def bucket(feature, number, boundaries):
    if feature["method"] == "log2":
        return math.floor(math.log(number) ** 2) if number > 2 else math.floor(number)
    return bisect.bisect_right(feature.get("boundaries", boundaries), number)


def check_table(feature, pairs):
    """Each id has the row that its hash says, or one of its own, more frequent ids first."""
    options = feature.get("encoding", {"kind": "vocabulary"})
    assert all((row == 0) == (text is None) for text, row, _ in pairs)
    pairs = [pair for pair in pairs if pair[0] is not None]
    if options["kind"] == "hash":
        for text, row, which in pairs:
            assert row == mixed(plain_hash(text) ^ (which + 1)) % options["rows"] + 2
        return
    counts = Counter(text for text, _, _ in pairs)
    least = options.get("min_count", 1)
    rows = {}
    for text, row, _ in pairs:
        if feature.get("method") == "quantile":
            assert row == 2 + int(text)
        elif counts[text] < least:
            assert row == 1
        else:
            assert row >= 2
            assert rows.setdefault(text, row) == row
    assert len(set(rows.values())) == len(rows)
    ordered = [counts[text] for text in sorted(rows, key=rows.get)]
    assert ordered == sorted(ordered, reverse=True)


def check_dense(feature, plain, dense):
    cells = plain[feature["name"]]
    if feature["kind"] == "embedding":
        np.testing.assert_array_equal(dense, [cell or [0] * 3 for cell in cells])
        return
    if feature["kind"] == "sequence":
        for row, times, now in zip(dense.tolist(), plain[feature["times"]], plain["now"], strict=True):
            newest = (times or [])[::-1][: feature["max_length"]]
            ages = [math.log1p(max(now - time, 0)) for time in newest]
            np.testing.assert_allclose(row, ages + [0.0] * (len(row) - len(ages)), rtol=1e-6)
        return
    known = [float(cell) for cell in cells if cell is not None]
    change = {
        "identity": lambda x: x,
        "signed_log": lambda x: math.copysign(math.log1p(abs(x)), x),
        "quantile": lambda x: (sum(k < x for k in known) + sum(k <= x for k in known)) / (2 * len(known)),
    }[feature["transform"]]
    values = [None if cell is None else change(float(cell)) for cell in cells]
    there = [value for value in values if value is not None]
    mean = math.fsum(there) / len(there) if there else 0.0
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in there) / len(there)) if there else 0.0
    shift, scale = 0.0, 1.0
    if feature["standardise"]:
        shift, scale = mean, deviation if deviation > 1e-12 * max(1.0, abs(mean)) else 1.0
    expected = [((mean if value is None else value) - shift) / scale for value in values]
    expected = np.clip(expected, -np.finfo(np.float32).max, np.finfo(np.float32).max)
    # Far from zero, a small difference of large numbers is what is left.
    loose = 1e-6 * max([1.0, *(abs(x) / scale for x in there)])
    np.testing.assert_allclose(dense[:, 0], expected.astype(np.float32), rtol=1e-5, atol=loose)
    if feature["missing_indicator"]:
        np.testing.assert_array_equal(dense[:, 1], [cell is None for cell in cells])
