"""The short ways of encoding give what the whole way gives, and are taken."""

import math
import random

import numpy as np
import pyarrow as pa
import pytest
from in_threads import in_threads

from every_feature import columns, config, log, make_run
from mldcn.errors import UserError
from mldcn.serving import shortcuts
from mldcn.serving.encoding import Part
from mldcn.serving.engine import Engine
from mldcn.serving.raw import RawEncoder

VALUES = ["u1", "u2", "nobody", "", "NA", None, 7, "7", "07", -3, 2**60, 10**25, "x" * 500, "é", " u1"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    made = config({"name": "dnn", "hidden": [4]})
    return Engine.load(make_run(tmp_path_factory.mktemp("runs") / "small", made).path, "cpu").encoder


@pytest.fixture
def pair(encoder):
    """One that remembers, one that does not."""
    names = {feature.name for feature in encoder.schema.features}
    return RawEncoder(encoder, names, ["", "NA"]), Part(encoder, names, ["", "NA"])


def rows(part, count=40, seed=0):
    return columns(log(count, seed, unseen=True), [each.name for each in part.columns.inputs])


def same(a, b):
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.dense, b.dense)
    assert (a.unseen, a.missing) == (b.unseen, b.missing)


def test_any_values_in_any_company_have_the_ids_that_they_have_alone(pair):
    remembering, plain = pair
    draw = random.Random(0)
    for trial in range(30):
        given = rows(plain, 12, trial)
        for name in ("user", "item", "hashed"):
            given[name] = draw.choices(VALUES, k=12)
        same(remembering.encode(given), plain.encode(given))


def test_values_that_are_equal_in_python_but_not_alike_are_not_confused(pair):
    remembering, plain = pair
    given = rows(plain, 4)
    for values in (
        [1, 0, 1, 0],
        [True, False, True, False],
        [1.0, 0.0, 1.5, -0.0],
        ["1", "0", "True", "1.0"],
    ):
        given["hashed"] = values
        same(remembering.encode(given), plain.encode(given))


def test_arrow_columns_and_no_rows_at_all(pair):
    remembering, plain = pair
    given = rows(plain)
    by_arrow = given | {name: pa.array(given[name]) for name in ("user", "item", "hashed")}
    for _ in range(2):
        same(remembering.encode(by_arrow), plain.encode(given))
    nothing = {name: [] for name in given}
    same(remembering.encode(nothing), plain.encode(nothing))


@pytest.mark.parametrize(
    "wrong",
    [{"user": ["u1", "u2", {"a": 1}]}, {"age": [1, 2, "old"]}, {"user": ["u1"]}, {"usr": [1, 2, 3]}],
)
def test_mistakes_are_named_as_without_memory(pair, wrong):
    remembering, plain = pair
    given = rows(plain, 3)
    remembering.encode(given)
    given |= wrong
    with pytest.raises(UserError) as found:
        remembering.encode(given)
    with pytest.raises(UserError) as expected:
        plain.encode(given)
    assert str(found.value) == str(expected.value)


def outcome(part, given):
    """What encoding gives, or says."""
    try:
        found = part.encode(given)
    except UserError as error:
        return str(error)
    return found.ids.tolist(), found.dense.tolist(), found.unseen, found.missing


NUMBERS = [
    1,
    0.5,
    -2,
    0,
    1e300,
    2**53 + 1,
    2**63,
    10**25,
    10**400,
    None,
    math.nan,
    math.inf,
    True,
    "3",
    "x",
    "NA",
    [1],
]
ELEMENTS = ["i1", "i2", "nobody", "", "NA", "12.0", None, 7, 7.0, True, "a|b", ["i1"], "x" * 500]
PICTURES = [[0.5, 1, -2, 1e300], [0, 0, 0, 0], [1, 2, 3], [], None, "1|2|3|4", "", [1, None, 2, 3]]
PICTURES += [
    ["1", "2", "3", "4"],
    [math.inf, 0, 0, 0],
    [True, False, True, True],
    [[1], [2], [3], [4]],
    5,
    "NA",
]


@pytest.mark.parametrize("odd", [0.02, 0.3])
def test_any_mixture_of_values_is_encoded_or_refused_alike(pair, odd):
    remembering, plain = pair
    draw = random.Random(odd)

    def lists(elements, usual):
        row = [draw.choice(elements if draw.random() < odd else usual) for _ in range(draw.randrange(9))]
        return draw.choice([row, None, "|".join(map(str, row))]) if draw.random() < odd else row

    read = 0
    for trial in range(300):
        given = rows(plain, 5, trial)
        for name in ("age", "hour", "price", "distance", "time"):
            given[name] = [draw.choice(NUMBERS) if draw.random() < odd / 2 else each for each in given[name]]
        if draw.random() < odd:
            given["picture"][draw.randrange(5)] = draw.choice(PICTURES)
        given["tags"] = [lists(ELEMENTS, ["red", "blue"]) for _ in range(5)]
        if draw.random() < odd:
            given["history"] = [lists(ELEMENTS, ["i1", "i2"]) for _ in range(5)]
            given["history_times"] = [
                draw.choice([each and [5] * len(each), None]) for each in given["history"]
            ]
            given["history_actions"] = [each and ["view"] * len(each) for each in given["history"]]
        if draw.random() < odd:
            del given[draw.choice(list(given))]
        found, expected = outcome(remembering, given), outcome(plain, given)
        assert found == expected
        read += not isinstance(expected, str)
    assert 10 < read < 300


def test_usual_values_take_the_short_way_once_they_are_known(pair, monkeypatch):
    remembering, plain = pair
    cases = []
    for seed in range(3):
        given = rows(plain, 30, seed)
        cases += [given, given | {"tags": [text and text.split("|") for text in given["tags"]]}]
        cases.append({name: values for name, values in given.items() if name != "tags"})
    for case in cases:
        same(remembering.encode(case), plain.encode(case))
    monkeypatch.setattr(Part, "encode", lambda *_: pytest.fail("the whole way"))
    for case in cases:
        remembering.encode(case)


def test_only_new_values_are_looked_up(pair, monkeypatch):
    remembering, _ = pair
    asked = []
    encode = Part.encode

    def watched(part, values):
        asked.extend(values["user"] if list(values) == ["user"] else [])
        return encode(part, values)

    monkeypatch.setattr(Part, "encode", watched)
    given = rows(remembering, 3)
    for users in (["a", "b", "a"], ["b", "c", "b"], ["c", "a", None]):
        remembering.encode(given | {"user": users})
    assert asked == ["a", "b", "c", None]


def test_parts_share_what_the_whole_has_met(pair):
    remembering, plain = pair
    given = rows(plain, 20)
    remembering.encode(given)
    part = remembering.of(["user", "hashed", "hour"])
    asked = {name: given[name] for name in ("user", "hashed", "hour")}
    expected = Part(plain.encoder, ["user", "hashed", "hour"], ["", "NA"]).encode(asked)
    same(part.encode(asked), expected)
    assert all(part._shortcuts[name] is remembering._shortcuts[name] for name in asked)


def test_memory_is_bounded(pair, monkeypatch):
    monkeypatch.setattr(shortcuts, "REMEMBERED", 10)
    remembering, plain = pair
    for trial in range(5):
        given = rows(plain, 8, trial)
        given["user"] = [f"{trial}-{i}" for i in range(7)] + ["z" * 65]
        same(remembering.encode(given), plain.encode(given))
        known = remembering._shortcuts["user"]._memory._known
        assert 0 < len(known) <= 10
        assert "z" * 65 not in known


def test_threads_may_share_it(pair, monkeypatch):
    monkeypatch.setattr(shortcuts, "REMEMBERED", 20)
    remembering, plain = pair
    cases = [rows(plain, 30, seed) for seed in range(12)]
    expected = [plain.encode(case) for case in cases]
    failed = []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(30):
            i = draw.randrange(len(cases))
            if not np.array_equal(remembering.encode(cases[i]).ids, expected[i].ids):
                failed.append(i)

    in_threads(work)
    assert not failed
