"""An engine computes what ``mldcn predict`` does, from values as JSON gives them."""

import json
import math
import threading

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from every_feature import columns, config, log, make_run
from mldcn.data.reading import open_log
from mldcn.errors import UserError
from mldcn.predict import Predictor, predict_file
from mldcn.serving.engine import Engine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = config({"name": "mldcn", "rank": 4, "num_layers": 2}, evaluation={"calibration": "platt"})
    return make_run(tmp_path_factory.mktemp("runs") / "small", made)


@pytest.fixture(scope="module")
def engine(run):
    return Engine.load(run.path, "cpu")


def names(engine):
    return [each.name for each in engine.inputs]


def test_scores_are_those_of_predict_over_every_kind_of_feature(run, engine):
    rows = log(300, seed=1, unseen=True)
    found = engine.score(columns(rows, names(engine)))
    np.testing.assert_array_equal(found.probabilities, Predictor.load(run.path, "cpu").predict_table(rows))
    assert found.probabilities.dtype == np.float32
    assert found.probabilities.std() > 0.05


def test_scores_are_those_of_a_predicted_file(run, engine, tmp_path):
    rows = log(50, seed=2, unseen=True)
    pl.from_arrow(rows).write_parquet(tmp_path / "log.parquet")
    predict_file(Predictor.load(run.path, "cpu"), [tmp_path / "log.parquet"], tmp_path / "scores.parquet")
    expected = pl.read_parquet(tmp_path / "scores.parquet").to_numpy()
    found = engine.score(columns(rows, names(engine)))
    np.testing.assert_array_equal(found.probabilities, expected)


def test_what_json_and_arrow_carry_is_the_same(engine):
    rows = log(40, seed=3)
    plain = columns(rows, names(engine))
    by_json = engine.score(json.loads(json.dumps(plain)))
    by_arrow = engine.score({name: rows.column(name) for name in names(engine)})
    np.testing.assert_array_equal(by_json.probabilities, by_arrow.probabilities)
    assert by_json.missing == by_arrow.missing
    assert by_json.missing["age"] == plain["age"].count(None)
    assert by_json.missing["item"] == plain["item"].count(None)
    assert by_json.missing["history"] == plain["history"].count([])
    assert by_json.missing["picture"] == plain["picture"].count(None)
    assert by_json.unseen["item"] == 0


def test_unseen_ids_are_counted_and_scored(engine):
    rows = columns(log(10), names(engine))
    rows["user"] = ["nobody"] * 4 + [None] * 6
    found = engine.score(rows)
    assert (found.unseen["user"], found.missing["user"]) == (4, 6)
    assert "hashed" not in found.unseen
    assert np.isfinite(found.probabilities).all()


def test_a_rows_score_does_not_depend_on_the_types_of_its_neighbours(engine):
    rows = columns(log(6), names(engine))
    rows["hashed"] = [123, 123.0, "123", "123.0", 2**63, True]
    rows["age"] = [20, 20.0, "20", "20.0", None, math.nan]
    rows["tags"] = [["red"], "red", None, "", ["red", "new"], "red|new"]
    rows["picture"] = [[1, 2.0, "3", 4], "1|2|3|4", None, "", [1.0] * 4, "1|1|1|1"]
    together = engine.encode(rows)
    alone = [engine.encode({name: [values[i]] for name, values in rows.items()}) for i in range(6)]
    np.testing.assert_array_equal(together.ids, np.concatenate([each.ids for each in alone]))
    np.testing.assert_array_equal(together.dense, np.concatenate([each.dense for each in alone]))
    place = next(slot for slot in engine.encoder.layout.ids if slot.feature == "hashed")
    assert len(np.unique(together.ids[:4, place.columns], axis=0)) == 1
    assert together.missing["age"] == 2


def test_a_text_that_means_a_missing_value_is_one(run, tmp_path):
    made = make_run(tmp_path / "run", config({"name": "dnn"}, data={"missing": ["", "NULL"]}))
    engine = Engine.load(made.path, "cpu")
    rows = columns(log(3), names(engine))
    rows["user"], rows["age"] = ["", "NULL", None], ["NULL", None, ""]
    found = engine.score(rows)
    assert (found.missing["user"], found.missing["age"]) == (3, 3)


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
def test_any_number_of_rows(engine, rows):
    assert engine.score(columns(log(rows), names(engine))).probabilities.shape == (rows, 2)


def test_ranking_repeats_what_is_constant(engine):
    rows = columns(log(9, seed=4), names(engine))
    assert engine.constant == {
        "user", "age", "history", "history_times", "history_actions", "time", "hour"
    }  # fmt: skip
    constant = {name: rows[name][3] for name in engine.constant}
    candidates = {name: rows[name] for name in names(engine) if name not in constant}
    expected = engine.score({**{name: [value] * 9 for name, value in constant.items()}, **candidates})
    found = engine.rank(constant, candidates)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    # What is constant by its source may still differ from candidate to candidate.
    hour = {"hour": rows["hour"]}
    expected = engine.score({**{name: [value] * 9 for name, value in constant.items()}, **candidates, **hour})
    found = engine.rank({name: constant[name] for name in constant if name != "hour"}, {**candidates, **hour})
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert len(engine.rank(constant, {name: [] for name in candidates})) == 0


def test_a_list_may_be_left_out_and_a_single_value_not(engine):
    rows = columns(log(3), names(engine))
    empty = {**rows, "tags": [None] * 3}
    without = {name: values for name, values in rows.items() if name != "tags"}
    np.testing.assert_array_equal(engine.score(without).probabilities, engine.score(empty).probabilities)
    with pytest.raises(UserError, match="'age' is lacking; give its value in each row, null where"):
        engine.score({name: values for name, values in rows.items() if name != "age"})


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("age", "old", "row 2, column 'age': 'old' is not a number"),
        ("age", [1], r"row 2, column 'age': \[1\] is no value; send a text"),
        ("age", math.inf, "row 2, column 'age': inf is infinite"),
        ("user", {"id": 1}, "row 2, column 'user': .* is no value"),
        ("user", "\ud800", "row 2, column 'user': .* is no Unicode text"),
        ("user", 1e300, "row 2, column 'user': 1e.300 is "),
        ("tags", [["red"]], "row 2, column 'tags': .* is no value"),
        ("tags", {"red": 1}, "row 2, column 'tags': .* is no value"),
        ("picture", [1.0], "row 2, column 'picture': .* has 1 elements, expected 4"),
        ("picture", [1.0, None, 1.0, 1.0], "row 2, column 'picture': an empty cell stands inside a vector"),
        ("history_times", [1] * 30, "row 2, column 'history_times': .* has 30 elements"),
    ],
)
def test_a_value_that_is_wrong_is_named(engine, column, value, message):
    rows = columns(log(3), names(engine))
    rows[column][1] = value
    with pytest.raises(UserError, match=message):
        engine.score(rows)


def test_columns_that_do_not_fit_are_named(engine):
    rows = columns(log(3), names(engine))
    with pytest.raises(UserError, match="no feature reads 'agee'; did you mean 'age'"):
        engine.score({**rows, "agee": [1, 2, 3]})
    with pytest.raises(UserError, match="'age' has 2 values, but 'user' has 3"):
        engine.score({**rows, "age": [1, 2]})
    with pytest.raises(UserError, match="'hour' is given once for the request and again"):
        engine.rank({"hour": 1}, rows)
    with pytest.raises(UserError, match="'user' is lacking"):
        engine.rank({}, {name: values for name, values in rows.items() if name != "user"})
    engine.score({**rows, "click": [0, 1, 0], "position": [1, 1, 1]})


def test_calls_share_a_batch_and_threads_an_engine(engine):
    calls = [columns(log(n, seed=n), names(engine)) for n in (1, 0, 7, 3)]
    alone = [engine.score(call) for call in calls]
    together = engine.score_rows([engine.encode(call) for call in calls])
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)
        assert (one.missing, one.unseen) == (other.missing, other.unseen)
    wrong = []

    def work():
        for _ in range(5):
            for call, expected in zip(calls, alone, strict=True):
                if not np.array_equal(engine.score(call).probabilities, expected.probabilities):
                    wrong.append(call)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_sample_request_works_and_versions_differ(run, engine, tmp_path):
    engine.check()
    request = json.loads(json.dumps(engine.sample()))
    assert request["constant"].keys() == engine.constant
    found = engine.rank(request["constant"], request["candidates"])
    assert np.ptp(found.probabilities, axis=0).min() > 0
    assert found.unseen["item"] == 0
    other = make_run(tmp_path / "other", config({"name": "dnn"}))
    assert Engine.load(other.path, "cpu").version != engine.version == Engine.load(run.path, "cpu").version
    assert engine.name == "small"
    with pytest.raises(UserError, match="is neither a run's folder nor a bundle"):
        Engine.load(tmp_path)


def test_an_arrow_dictionary_column_is_decoded(engine):
    rows = log(5)
    plain = columns(rows, names(engine))
    coded = {**plain, "user": pa.array(plain["user"]).dictionary_encode()}
    np.testing.assert_array_equal(engine.score(coded).probabilities, engine.score(plain).probabilities)


def test_values_of_a_text_log_are_those_of_its_file(run, engine, tmp_path):
    rows = pl.from_arrow(log(20, seed=5)).select(names(engine))
    lists = [name for name, kind in rows.schema.items() if isinstance(kind, pl.List)]
    text = rows.with_columns(pl.col(lists).cast(pl.List(pl.String)).list.join("|"))
    text.write_csv(tmp_path / "log.csv")
    (block,) = open_log([tmp_path / "log.csv"], engine.config.data, names(engine))
    expected = Predictor.load(run.path, "cpu").predict_block(block)
    as_text = {name: [None if v is None else str(v) for v in text[name].to_list()] for name in text.columns}
    np.testing.assert_array_equal(engine.score(as_text).probabilities, expected)
    np.testing.assert_allclose(engine.score(rows.to_dict(as_series=False)).probabilities, expected, atol=1e-6)
