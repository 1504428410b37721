"""The log of sampled requests: what is in it, that training reads it, and that nothing ever waits for it."""

import errno
import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as by_grpc
import yaml
from serving_clients import expected, rows, serving
from test_repository import ask
from test_server import grpc_tensors, listless

from every_feature import FEATURES, config, log
from mldcn.config import Config, DataConfig, dump_config
from mldcn.config import parse as parse_config
from mldcn.data.parsing import parse
from mldcn.data.prepare import prepare
from mldcn.data.reading import open_log
from mldcn.errors import UserError
from mldcn.run import RunFolder
from mldcn.serving.engine import Scores
from mldcn.serving.server import request_log
from mldcn.serving.server.options import Options, RequestLogging, check_options
from mldcn.serving.server.repository import Version
from mldcn.serving.server.request_log import Asked, RequestLog, row_table
from mldcn.training.fit import fit

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def encoded_again(engine, path):
    """The rows of a file as training reads them."""
    schema = engine.config.log_schema
    [block] = open_log([path], DataConfig(), (), schema.columns())
    return engine.encoder.assemble(parse(schema, block, labels=False))


def split(engine, values):
    constant = {name: values[name][0] for name in values if name in engine.constant}
    return constant, {name: column for name, column in values.items() if name not in constant}


def test_training_reads_what_was_scored(engine, tmp_path):
    values = rows(engine, 50)
    odd = {
        "user": [7, "7", None, 7.0, True],
        "age": [1, 2.5, None, "3", ""],
        "history": [[], None, [1, "i2"], ["i3"], "i1|i2"],
        "history_times": [[], None, [1, 2.5], [3], "4|5"],
        "history_actions": [[], None, ["buy", "view"], ["view"], "buy|buy"],
        "time": [1000, 1500.5, "1700", 1800, 1900],
        "hour": [None, 1, 2, 3, "4"],
        "item": ["i1", "i99", "", "é", 3],
        "tags": ["red", None, "red||new", ["blue"], []],
        "hashed": [10**15, "x", None, 5, 6],
        "price": [1e-300, 0, None, 2.5, 1e30],
        "picture": [None, [1, 2, 3, 4], "1|2|3|4", [0.1, 0.2, 0.3, 0.4], None],
        "distance": [None, -1.0, 0.1, 1, 2],
    }
    for given in (values, listless(values), odd):
        scores = engine.score(given)
        table = row_table("r-1", Version("ads", "1", engine), Asked(given), scores, NOW)
        pq.write_table(table, tmp_path / "part.parquet")
        again, first = encoded_again(engine, tmp_path / "part.parquet"), engine.encode(given)
        np.testing.assert_array_equal(again.ids, first.ids)
        np.testing.assert_array_equal(again.dense, first.dense)
        assert table["candidate"].to_pylist() == list(range(len(scores)))
        assert set(table["request_id"].to_pylist()) == {"r-1"}
        np.testing.assert_array_equal(table["p_save"].to_numpy(), scores.probabilities[:, 1])


def test_a_request_is_the_same_by_either_call(engine):
    values = rows(engine, 6)
    constant, candidates = split(engine, values)
    values |= {name: [value] * 6 for name, value in constant.items()}
    scores = engine.score(values)
    version = Version("ads", "1", engine)
    by_rows = row_table("r", version, Asked(values), scores, NOW)
    by_request = row_table("r", version, Asked(candidates, constant), scores, NOW)
    arrow = {name: pa.array(column) for name, column in candidates.items()}
    assert by_rows.equals(by_request)
    assert by_rows.equals(row_table("r", version, Asked(arrow, constant), scores, NOW))


def test_what_only_training_reads_is_logged_where_it_is_known():
    made = config({"name": "mldcn"}, [FEATURES[0], {"name": "request_id", "kind": "categorical"}])
    schema = made.log_schema.model_copy(update={"request": "session"})
    engine = SimpleNamespace(
        config=SimpleNamespace(log_schema=schema, data=made.data), tasks=("click", "save")
    )
    version = Version("ads", "1", engine)
    values = {"user": ["u", "v"], "request_id": ["mine", None], "position": [3, 1]}
    scores = Scores(np.zeros((2, 2), np.float32))
    table = row_table("r", version, Asked(values), scores, NOW)
    assert table["position"].to_pylist() == ["3", "1"]
    assert table["session"].to_pylist() == ["r", "r"]  # so that metrics by request work
    assert table["request_id"].to_pylist() == ["mine", None]  # a feature's own column goes first


def test_a_server_logs_by_both_transports_and_training_can_use_it(served_run, engine, tmp_path):
    folder = tmp_path / "logged"
    values = listless(rows(engine, 40))
    constant, candidates = split(engine, values)
    with serving(served_run, request_log=RequestLogging(folder, 1.0)) as running:
        assert ask(running.client, values, **{"x-request-id": "web"}).status_code == 200
        with by_grpc.InferenceServerClient(running.grpc) as client:
            client.infer("ads", grpc_tensors(values), request_id="rpc")
        body = {"id": "mine", "user": constant, "candidates": candidates, "top": 2}
        assert running.client.post("/v1/rank", json=body).status_code == 200
        assert ask(running.client, {"user": ["x"]}).status_code == 400
        assert not list(folder.rglob("*.parquet"))  # not due
        metrics = running.server.metrics
    [part] = (folder / "ads").iterdir()
    assert metrics.logged.labels("written")._value.get() == 3
    table = pl.read_parquet(part)
    assert table["request_id"].unique().sort().to_list() == ["mine", "rpc", "web"]
    assert table["served_version"].unique().to_list() == [engine.version]
    first = table.filter(pl.col("request_id") == "rpc")
    np.testing.assert_allclose(first["p_click"], expected(engine, values)[:, 0], atol=1e-6)

    # Labels are joined by request and candidate; then it is a log like any other.
    keys = table.select("request_id", "candidate", position=pl.lit(1))
    labels = keys.with_columns(click=pl.col("candidate") % 2, save=pl.col("candidate") % 3 // 2)
    joined = tmp_path / "joined.parquet"
    table.join(labels, on=["request_id", "candidate"]).write_parquet(joined)
    raw = yaml.safe_load(dump_config(engine.config))
    raw["data"] = {"train": [str(joined)], "split": {"kind": "hash", "valid": 0.2, "test": 0.2}}
    raw["training"] = {"epochs": 1, "batch_size": 16, "threads": 1, "device": "cpu"}
    wanted = parse_config(Config, raw, "test")
    summary = fit(wanted, RunFolder.create(tmp_path / "again"), prepare(wanted, tmp_path / "encoded"))
    assert summary.metrics["test"]["click"]["logloss"] > 0


def test_the_sample_is_the_same_every_time():
    options = RequestLogging(None, 0.25)
    wants = RequestLog.wants
    found = [wants(SimpleNamespace(_options=options), f"r-{i}") for i in range(4000)]
    assert abs(np.mean(found) - 0.25) < 0.03
    assert found == [wants(SimpleNamespace(_options=options), f"r-{i}") for i in range(4000)]
    assert not any(wants(SimpleNamespace(_options=RequestLogging(None, 0.0)), str(i)) for i in range(99))
    assert all(wants(SimpleNamespace(_options=RequestLogging(None, 1.0)), str(i)) for i in range(99))


class Counted(dict):
    def __call__(self, result, requests):
        self[result] = self.get(result, 0) + requests


@pytest.fixture
def given(engine):
    """What a request of four rows leaves to be logged."""
    values = rows(engine, 4)
    return Version("ads", "1", engine), Asked(values), engine.score(values)


def test_a_full_buffer_drops_and_does_not_wait(given, tmp_path, monkeypatch):
    gate, entered = threading.Event(), threading.Event()
    make = request_log.row_table

    def held(*arguments):
        entered.set()
        assert gate.wait(20)
        return make(*arguments)

    monkeypatch.setattr(request_log, "row_table", held)
    counted = Counted()
    logging = RequestLog(RequestLogging(tmp_path, 1.0, waiting_requests=3, waiting_rows=10), counted, "p")
    logging.take("0", *given)
    assert entered.wait(10)  # and so out of the buffer
    for i in range(5):
        logging.take(str(i), *given)
    assert counted == {"no_room": 3}  # two of four rows each; a third would make twelve
    gate.set()
    logging.close()
    assert counted == {"no_room": 3, "written": 3}


def test_a_full_disk_breaks_nothing_and_the_next_file_is_whole(given, tmp_path, monkeypatch, caplog):
    write = pq.write_table
    full = True

    def writes(table, part, **options):
        write(table, part, **options)
        if full:
            part.write_bytes(part.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(request_log.pq, "write_table", writes)
    counted = Counted()
    logging = RequestLog(RequestLogging(tmp_path, 1.0, part_rows=8), counted, "p")
    for i in range(4):
        logging.take(str(i), *given)
    while counted.get("failed", 0) < 4:
        assert logging._thread.is_alive()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    full = False
    logging.take("later", *given)
    logging.close()
    assert counted == {"failed": 4, "written": 1}
    [part] = (tmp_path / "ads").iterdir()
    assert pq.read_table(part)["request_id"].to_pylist() == ["later"] * 4
    assert caplog.text.count("requests cannot be logged") == 1  # not a line for each


def test_files_appear_whole_by_rows_and_by_age(given, tmp_path, monkeypatch):
    seen = []
    write = pq.write_table

    def writes(table, part, **options):
        write(table, part, **options)
        seen.append((part.name, list(tmp_path.rglob("*.parquet"))))

    monkeypatch.setattr(request_log.pq, "write_table", writes)
    now = [0.0]
    counted = Counted()
    options = RequestLogging(tmp_path, 1.0, part_rows=12, part_seconds=0.05)
    logging = RequestLog(options, counted, "p", clock=lambda: now[0])
    for i in range(3):
        logging.take(str(i), *given)
    wait_for(lambda: counted.get("written") == 3)
    version, asked, scores = given
    logging.take("3", *given)
    logging.take("4", Version("ads", "2", version.engine), asked, scores)
    wait_for(lambda: len(logging._begun) == 2)
    assert counted == {"written": 3}
    now[0] = 1.0
    wait_for(lambda: counted.get("written") == 5)
    logging.close()
    assert [len(there) for _, there in seen] == [0, 1, 2]
    assert {name for name, _ in seen} == {".p.tmp"}
    files = sorted(path.name.split("-", 1)[1] for path in (tmp_path / "ads").iterdir())
    assert files == ["1-p-1.parquet", "1-p-2.parquet", "2-p-3.parquet"]


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError


def test_a_folder_that_cannot_be_and_a_rate_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        RequestLog(RequestLogging(tmp_path / "file" / "x"), Counted(), "p")
    with pytest.raises(UserError, match="--log-rate"):
        check_options(Options(request_log=RequestLogging(tmp_path, 2.0)))


def test_an_odd_request_does_not_end_the_log(given, tmp_path):
    counted = Counted()
    logging = RequestLog(RequestLogging(tmp_path, 1.0), counted, "p")
    version, _, scores = given
    logging.take("odd", version, Asked({"unknown": log(1)}), scores)
    logging.take("even", *given)
    logging.close()
    assert counted == {"failed": 1, "written": 1}
