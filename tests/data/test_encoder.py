import json
import math

import numpy as np
import pyarrow as pa
import pytest
from data_cases import block, schema
from hypothesis import given, settings
from hypothesis import strategies as st

from mldcn.data import encoder as encoder_module
from mldcn.data.encoder import Encoder
from mldcn.data.hashing import hash_texts
from mldcn.errors import UserError


def encoded(features, labels=({"name": "click"},), others=None, **columns):
    """Encodes columns, fitted on the same."""
    encoder = Encoder.fit(schema(features, labels, **(others or {})), [block(**columns)])
    return encoder, encoder.encode(block(**columns))


def test_categorical_and_numeric_rows_by_eye():
    encoder, rows = encoded(
        [{"kind": "categorical", "name": "ad"}, {"kind": "numeric", "name": "age"}],
        ad=["x", "y", "x", None],
        age=["1", "3", None, " 3 "],
        click=["0", "1", "true", None],
    )
    assert rows.ids.tolist() == [[2], [3], [2], [0]]
    np.testing.assert_allclose(
        rows.dense[:, 0], np.array([1 - 7 / 3, 2 / 3, 0, 2 / 3]) / np.std([1, 3, 3]), rtol=1e-6
    )
    np.testing.assert_array_equal(rows.labels[:, 0], [0, 1, 1, math.nan])
    assert rows.weight.tolist() == [1] * 4
    assert rows.position.tolist() == [0] * 4
    assert encoder.layout.tables == {"ad": 4}
    assert encoder.layout.num_id_columns == 1
    assert encoder.layout.num_dense_columns == 1


def test_an_id_is_one_whether_text_integer_or_float():
    features = [{"kind": "categorical", "name": "ad"}]
    texts, _ = encoded(features, ad=["123", "123", "9"], click=["0", "1", "0"])
    for values in (pa.array([123, 9, None]), pa.array([123.0, 9.0, math.nan]), pa.array(["123", "9", None])):
        assert texts.encode(block(ad=values, click=[0, 1, 0])).ids[:, 0].tolist() == [2, 3, 0]
    dictionary = pa.array(["9", "123"]).dictionary_encode()
    assert texts.encode(block(ad=dictionary, click=[0, 1])).ids[:, 0].tolist() == [3, 2]


def test_multi_from_text_and_from_lists():
    features = [{"kind": "multi", "name": "tags", "max_length": 2}]
    clicks = ["0", "1", "0"]
    encoder, rows = encoded(features, tags=["a|b|c", None, "a"], click=clicks)
    assert rows.ids.tolist() == [[2, 3], [0, 0], [2, 0]]
    lists = encoder.encode(block(tags=[["a", "b", "c"], [], ["a"]], click=clicks))
    assert lists.ids.tolist() == rows.ids.tolist()
    # c is beyond max_length in every row, so it has no row of its own.
    assert encoder.layout.tables == {"tags": 4}


def test_an_empty_piece_is_missing():
    _, rows = encoded([{"kind": "multi", "name": "tags"}], tags=["a||b"], click=["1"])
    assert rows.ids[0, :4].tolist() == [2, 0, 3, 0]


def test_two_hashes_stand_side_by_side():
    hashing = {"kind": "hash", "rows": 50, "hashes": 2}
    encoder, rows = encoded(
        [{"kind": "multi", "name": "tags", "max_length": 3, "encoding": hashing}],
        tags=["a|b", "b"],
        click=["1", "0"],
    )
    assert encoder.layout.tables == {"tags": 52}
    first, second = rows.ids[:, :3], rows.ids[:, 3:]
    assert first[0, 1] == first[1, 0] >= 2
    assert second[0, 1] == second[1, 0] >= 2
    assert (first[:, 2] == 0).all()
    assert (second[:, 2] == 0).all()
    assert rows.ids.max() < 52


SEQUENCE = [
    {"kind": "categorical", "name": "ad"},
    {
        "kind": "sequence",
        "name": "seen",
        "share": "ad",
        "max_length": 2,
        "times": "seen_at",
        "actions": "did",
    },
]


def test_sequences_are_newest_first_with_ages_and_actions():
    encoder, rows = encoded(
        SEQUENCE,
        others={"time": "now"},
        ad=["x", "y"],
        seen=["x|y|x", None],
        seen_at=["1|90|99", None],
        did=["click|save|hide", None],
        now=["100", "100"],
        click=["1", "0"],
    )
    # x: one ad and one kept element; y: the same; x before y by value. Actions: hide before save.
    assert rows.ids.tolist() == [[2, 2, 3, 2, 3], [3, 0, 0, 0, 0]]
    np.testing.assert_allclose(rows.dense, [[math.log(2), math.log(11)], [0, 0]], rtol=1e-6)
    assert encoder.layout.tables == {"ad": 4, "seen.actions": 4}
    assert [(slot.feature, slot.role, slot.table, slot.start) for slot in encoder.layout.ids] == [
        ("ad", "values", "ad", 0),
        ("seen", "values", "ad", 1),
        ("seen", "actions", "seen.actions", 3),
    ]


def test_events_after_now_count_as_now():
    _, rows = encoded(
        SEQUENCE,
        others={"time": "now"},
        ad=["x"],
        seen=["x"],
        seen_at=["500"],
        did=["a"],
        now=["100"],
        click=["1"],
    )
    assert rows.dense.tolist() == [[0, 0]]


def test_embeddings_come_as_they_are_and_missing_ones_as_zeros():
    feature = {"kind": "embedding", "name": "v", "width": 2}
    fixed = pa.array([[3.0, 4.0], None], pa.list_(pa.float32(), 2))
    for vectors in (["3|4", None], [[3.0, 4.0], None], [[3.0, 4.0], []], fixed):
        _, rows = encoded([feature], v=vectors, click=["1", "0"])
        assert rows.dense.tolist() == [[3, 4], [0, 0]]


def test_bucketised():
    features = [
        {"kind": "bucketised", "name": "a", "method": "log2"},
        {"kind": "bucketised", "name": "b", "method": "boundaries", "boundaries": [0.0, 1.0]},
        {"kind": "bucketised", "name": "c", "buckets": 2},
    ]
    encoder, rows = encoded(
        features,
        a=["1", "3", "1", None],
        b=["-1", "0.5", "0.5", None],
        c=["1", "2", "3", "4"],
        click=["1"] * 4,
    )
    # a: 1 and floor(ln(3)^2) = 1 are one bucket. b: bucket 1 twice. c: cut at 3.
    assert rows.ids.tolist() == [[2, 3, 2], [2, 2, 2], [2, 2, 3], [0, 0, 3]]
    assert encoder.layout.tables == {"a": 3, "b": 4, "c": 4}


def test_weight_position_keys_and_time():
    others = {"weight": "w", "position": "p", "request": "r", "user": "u", "time": "t", "max_position": 3}
    encoder, rows = encoded(
        [{"kind": "categorical", "name": "ad"}],
        others=others,
        ad=["x"] * 3,
        w=["0", "0.5", "2"],
        p=["1", "9", None],
        r=["q1", "q1", None],
        u=[7, 8, None],
        t=["2020-01-01", "2020-01-01T00:00:01.5", "1970-01-01 00:00:10"],
        click=["1"] * 3,
    )
    assert rows.weight.tolist() == [0, 0.5, 2]
    assert rows.position.tolist() == [1, 3, 0]
    assert encoder.layout.num_positions == 3
    assert rows.request[0] == rows.request[1] != 0
    assert rows.request[2] == 0
    assert rows.user.tolist() == hash_texts(pa.array(["7", "8", None])).view(np.int64).tolist()
    assert rows.time.tolist() == [1577836800, 1577836801.5, 10]


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        (["5", "6.5"], [5, 6.5]),
        (["2020-01-01T00:00:00Z", "2020-01-01T01:00:00+01:00"], [1577836800, 1577836800]),
        (pa.array([1_577_836_800_000], pa.timestamp("ms")), [1577836800]),
        (pa.array([18262], pa.date32()), [1577836800]),
        (pa.array([5, None]), [5, math.nan]),
    ],
)
def test_times(values, seconds):
    _, rows = encoded(
        [{"kind": "categorical", "name": "ad"}],
        others={"time": "t"},
        ad=["x"] * len(values),
        t=values,
        click=["1"] * len(values),
    )
    np.testing.assert_array_equal(rows.time, seconds)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["0", "1", "", None], None),
        (["False", "TRUE", " 1 ", None], [0, 1, 1, math.nan]),
        ([0, 1, None, 1], [0, 1, math.nan, 1]),
        ([0.0, 1.0, math.nan, 1.0], [0, 1, math.nan, 1]),
        ([False, True, None, True], [0, 1, math.nan, 1]),
    ],
)
def test_labels(values, labels):
    features = [{"kind": "categorical", "name": "ad"}]
    if labels is None:
        with pytest.raises(UserError, match="log.csv: row 13, column 'click': '' is no label"):
            encoded(features, ad=["x"] * 4, click=values)
        return
    _, rows = encoded(features, ad=["x"] * 4, click=values)
    np.testing.assert_array_equal(rows.labels[:, 0], labels)


def test_tasks_from_one_column_by_threshold():
    labels = [
        {"name": "long", "column": "dwell", "at_least": 30},
        {"name": "any", "column": "dwell", "at_least": 1},
    ]
    _, rows = encoded(
        [{"kind": "categorical", "name": "ad"}], labels, ad=["x"] * 3, dwell=["30", "2.5", None]
    )
    np.testing.assert_array_equal(rows.labels, [[1, 1], [0, 1], [math.nan] * 2])


def test_without_labels():
    spec = schema([{"kind": "categorical", "name": "ad"}], weight="w", user="u")
    encoder = Encoder.fit(spec, [block(ad=["x"], click=["1"], w=["2"], u=["a"])])
    rows = encoder.encode(block(ad=["x", "z"], u=["a", None]), labels=False)
    assert rows.ids.tolist() == [[2], [1]]
    assert np.isnan(rows.labels).all()
    assert rows.weight.tolist() == [1, 1]
    assert rows.user[1] == 0 != rows.user[0]
    assert encoder.columns(labels=False) == (("ad",), ("w", "u"))
    with pytest.raises(UserError, match="has no column 'click'"):
        encoder.encode(block(ad=["x"], w=["1"], u=["a"]))


AD, NUMBER = {"kind": "categorical", "name": "ad"}, {"kind": "numeric", "name": "n"}
BAD_CELLS = {
    "text in a numeric column": (
        [NUMBER],
        {"n": ["1", "2x"]},
        r"row 12, column 'n': '2x' is not a number; mend",
    ),
    "nan text": ([NUMBER], {"n": ["1", "NaN"]}, r"row 12, column 'n': 'NaN' is not a number"),
    "infinite text": ([NUMBER], {"n": ["-inf", "1"]}, r"row 11, column 'n': '-inf' is infinite"),
    "too large a number": ([NUMBER], {"n": ["1e999", "1"]}, r"row 11, column 'n': '1e999' is infinite"),
    "infinite number": ([NUMBER], {"n": [1.0, math.inf]}, r"row 12, column 'n': inf is infinite"),
    "lists in a numeric column": ([NUMBER], {"n": [[1], [2]]}, r"column 'n' holds list.*another kind"),
    "lists in a categorical column": ([AD], {"ad": [["x"], ["y"]]}, r"column 'ad' holds lists; .*multi"),
    "structures": (
        [AD],
        {"ad": [{"x": 1}, {"x": 2}]},
        r"column 'ad' holds struct<x: int64>, which is no text",
    ),
    "lists of lists": (
        [{"kind": "multi", "name": "ad"}],
        {"ad": [[["x"]], [["y"]]]},
        r"column 'ad' holds lists",
    ),
    "no such column": ([AD], {"add": ["x", "y"]}, r"has no column 'ad'; did you mean 'add'"),
    "label": ([AD], {"ad": ["x", "y"], "click": ["0", "2"]}, r"row 12, column 'click': '2' is no label"),
    "number label": ([AD], {"ad": ["x", "y"], "click": [0, 5]}, r"row 12, column 'click': 5 is no label"),
    "weight": ([AD], {"ad": ["x", "y"], "w": ["1", "-1"]}, r"row 12, column 'w': '-1' is no weight"),
    "missing weight": (
        [AD],
        {"ad": ["x", "y"], "w": [None, "1"]},
        r"row 11, column 'w': an empty cell is no weight",
    ),
    "position": ([AD], {"ad": ["x", "y"], "p": ["1", "0"]}, r"row 12, column 'p': '0' is no position"),
    "time": ([AD], {"ad": ["x", "y"], "t": ["2020-01-01", "soon"]}, r"row 12, column 't': 'soon' is neither"),
    "embedding width": (
        [{"kind": "embedding", "name": "v", "width": 2}],
        {"v": ["1|2", "1|2|3"]},
        r"row 12, column 'v': '1\|2\|3' has 3 elements, expected 2",
    ),
    "embedding text": (
        [{"kind": "embedding", "name": "v", "width": 2}],
        {"v": ["1|2", "1|x"]},
        r"row 12, column 'v': 'x' is not a number",
    ),
    "embedding hole": (
        [{"kind": "embedding", "name": "v", "width": 2}],
        {"v": [[1.0, 2.0], [None, 1.0]]},
        r"row 12, column 'v': an empty cell stands inside a vector",
    ),
    "sequence lengths": (
        [{"kind": "sequence", "name": "s", "actions": "a"}],
        {"s": ["x", "x|y"], "a": ["p", "p"]},
        r"row 12, column 'a': 'p' has 1 elements, but column 's' has 2",
    ),
    "sequence time": (
        [{"kind": "sequence", "name": "s", "times": "at"}],
        {"s": ["x|y", "x|y"], "at": ["1|2", "1|late"], "t": ["3", "3"]},
        r"row 12, column 'at': 'late' is neither",
    ),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_bad_cells_are_named(case):
    features, columns, message = BAD_CELLS[case]
    others = {
        key: name for key, name in {"weight": "w", "position": "p", "time": "t"}.items() if name in columns
    }
    with pytest.raises(UserError, match=f"log.csv: .*{message}"):
        encoded(features, others=others, **{"click": ["0", "1"], **columns})


def test_numbers_in_odd_dress():
    _, rows = encoded(
        [NUMBER | {"standardise": False}],
        n=[" 1", "+2.5", "1e3", "-.5", "12345678901234567890"],
        click=["1"] * 5,
    )
    np.testing.assert_allclose(rows.dense[:, 0], [1, 2.5, 1000, -0.5, 12345678901234567890], rtol=1e-6)


def test_a_bad_cell_late_in_a_large_block_is_found():
    values = [str(i) for i in range(5000)]
    values[4321] = "oops"
    with pytest.raises(UserError, match="row 4332, column 'n': 'oops'"):
        encoded([NUMBER], n=values, click=["1"] * 5000)


def test_no_rows():
    with pytest.raises(UserError, match="no training rows"):
        Encoder.fit(schema([AD]), [])


def full_encoder():
    features = [
        *SEQUENCE,
        {"kind": "numeric", "name": "n", "transform": "quantile", "missing_indicator": True},
        {"kind": "bucketised", "name": "m", "buckets": 3},
        {"kind": "categorical", "name": "h", "encoding": {"kind": "hash", "rows": 9}},
    ]
    spec = schema(features, time="now")
    rows = block(
        ad=["x", "y", "x/é"],
        seen=["x|y", None, "y"],
        seen_at=["1|2", None, "3"],
        did=["a|b", None, "a"],
        now=[5, 6, 7],
        n=["1", None, "3"],
        m=["1", "2", "3"],
        h=["p", "q", None],
        click=["0", "1", None],
    )
    return Encoder.fit(spec, [rows]), rows


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
        for name in one.__dataclass_fields__
    )


def test_saved_and_loaded(tmp_path):
    encoder, rows = full_encoder()
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert again.layout == encoder.layout
    assert again.schema == encoder.schema
    assert same(again.encode(rows), encoder.encode(rows))


def test_damage_and_other_versions_are_refused(tmp_path, monkeypatch):
    full_encoder()[0].save(tmp_path)
    vocabulary = tmp_path / "vocabulary-000.ids"
    whole = vocabulary.read_bytes()
    vocabulary.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(UserError, match=r"vocabulary-000.ids: damaged \(its checksum is another\)"):
        Encoder.load(tmp_path)
    vocabulary.unlink()
    with pytest.raises(UserError, match="vocabulary-000.ids: missing"):
        Encoder.load(tmp_path)
    raw = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps({**raw, "format": encoder_module.FORMAT + 1}))
    with pytest.raises(UserError, match="encoder of format 3; this version of mldcn reads format 2"):
        Encoder.load(tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps({**raw, "numerics": {"n": {}}}))
    vocabulary.write_bytes(whole)
    with pytest.raises(UserError, match="encoder.json: damaged"):
        Encoder.load(tmp_path)
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(UserError, match="encoder.json: damaged"):
        Encoder.load(tmp_path)


IDS = st.sampled_from(["a", "b", "1", "2.0", "é", "a longer id than a word"])
CELLS = {
    "categorical": st.none() | IDS,
    "multi": st.none() | st.lists(IDS, min_size=1, max_size=4),
    "sequence": st.none() | st.lists(IDS, min_size=1, max_size=4),
    "numeric": st.none() | st.integers(-10, 10),
    "bucketised": st.none() | st.integers(-10, 10),
    "embedding": st.none() | st.lists(st.integers(-4, 4), min_size=2, max_size=2),
}


@st.composite
def logs(draw):
    """A random schema, and a log of it both as lists and as text."""
    kinds = draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=5))
    count = draw(st.integers(1, 8))
    features, columns = [], {"click": draw(st.lists(st.sampled_from([0, 1]), min_size=count, max_size=count))}
    for number, kind in enumerate(kinds):
        name = f"f{number}"
        feature = {"kind": kind, "name": name}
        if kind == "embedding":
            feature["width"] = 2
        elif kind != "numeric" and draw(st.booleans()):
            feature["encoding"] = {
                "kind": "hash",
                "rows": draw(st.integers(1, 20)),
                "hashes": draw(st.integers(1, 2)),
            }
        if kind == "numeric":
            feature["transform"] = draw(st.sampled_from(["identity", "signed_log", "quantile"]))
            feature["missing_indicator"] = draw(st.booleans())
        features.append(feature)
        columns[name] = draw(st.lists(CELLS[kind], min_size=count, max_size=count))
    return features, columns


def as_text(cell):
    if cell is None:
        return None
    return "|".join(map(str, cell)) if isinstance(cell, list) else str(cell)


@settings(max_examples=40, deadline=None)
@given(logs())
def test_random_logs_encode_alike_as_text_as_typed_columns_and_after_saving(tmp_path_factory, case):
    features, columns = case
    typed = block(**columns)
    text = block(
        **{name: pa.array([as_text(cell) for cell in cells], pa.string()) for name, cells in columns.items()}
    )
    encoder = Encoder.fit(schema(features), [text])
    rows = encoder.encode(text)
    assert same(rows, encoder.encode(typed))
    assert same(rows, Encoder.fit(schema(features), [typed]).encode(typed))
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save(folder)
    assert same(rows, Encoder.load(folder).encode(text))
    assert not np.isnan(rows.dense).any()
    for slot in encoder.layout.ids:
        part = rows.ids[:, slot.columns]
        assert ((part >= 0) & (part < encoder.layout.tables[slot.table])).all()
        # What was trained on is in the vocabulary.
        assert (part != 1).all()
