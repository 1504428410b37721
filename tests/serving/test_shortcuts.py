"""Ids of values that came before are those that encoding anew would give."""

import random
import threading

import numpy as np
import pyarrow as pa
import pytest
from serving_cases import columns, config, log, make_run

from mldcn.errors import UserError
from mldcn.serving import encoding
from mldcn.serving.encoding import Part, RawEncoder
from mldcn.serving.engine import Engine

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


def test_memory_is_bounded(pair, monkeypatch):
    monkeypatch.setattr(encoding, "REMEMBERED", 10)
    remembering, plain = pair
    for trial in range(5):
        given = rows(plain, 8, trial)
        given["user"] = [f"{trial}-{i}" for i in range(7)] + ["z" * 65]
        same(remembering.encode(given), plain.encode(given))
        for memory in remembering._memories:
            assert len(memory._known) <= 10
            assert "z" * 65 not in memory._known


def test_threads_may_share_it(pair, monkeypatch):
    monkeypatch.setattr(encoding, "REMEMBERED", 20)
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

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
