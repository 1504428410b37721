"""``POST /v1/rank``: one user and context, candidates as columns, objects or an Arrow stream."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from serving_clients import expected, rows

from every_feature import columns, log
from mldcn.serving.server.ranking import ARROW_KEY, ARROW_TYPE


@pytest.fixture
def request_of(engine):
    """A request of some candidates, and the rows that it stands for."""

    def make(count, seed=3):
        values = rows(engine, count, seed)
        constant = {name: values[name][0] for name in engine.constant}
        candidates = {name: column for name, column in values.items() if name not in engine.constant}
        whole = {name: [constant[name]] * count for name in constant} | candidates
        user = {each.name: constant[each.name] for each in engine.inputs if each.source == "user"}
        context = {name: value for name, value in constant.items() if name not in user}
        return {"user": user, "context": context, "candidates": candidates}, whole

    return make


def ask(server, body, **headers):
    return server.client.post("/v1/rank", content=json.dumps(body), headers=headers)


@pytest.mark.parametrize("count", [1, 2, 200])
def test_candidates_are_ordered_by_the_first_task(server, engine, request_of, count):
    body, whole = request_of(count)
    found = ask(server, {**body, "id": "r1", "probabilities": True}).json()
    wanted = expected(engine, whole)
    order = np.argsort(-wanted[:, 0], kind="stable")
    np.testing.assert_allclose(found["scores"], wanted[order, 0], atol=1e-6)
    np.testing.assert_allclose(wanted[found["ranking"], 0], found["scores"], atol=1e-6)
    assert sorted(found["ranking"]) == list(range(count))
    for place, task in enumerate(engine.tasks):
        np.testing.assert_allclose(found["probabilities"][task], wanted[found["ranking"], place], atol=1e-6)
    assert (found["model"], found["version"], found["id"]) == ("ads", engine.version, "r1")


def test_an_objective_weighs_the_tasks_and_top_cuts(server, engine, request_of):
    body, whole = request_of(30)
    found = ask(server, {**body, "objective": {"click": 0.5, "save": -2.0}, "top": 5}).json()
    values = expected(engine, whole) @ np.array([0.5, -2.0], np.float32)
    assert found["ranking"] == np.argsort(-values, kind="stable")[:5].tolist()
    np.testing.assert_allclose(found["scores"], np.sort(values)[::-1][:5], atol=1e-5)
    assert "probabilities" not in found


def test_candidates_may_be_objects(server, request_of):
    body, _ = request_of(4)
    names = list(body["candidates"])
    objects = [dict(zip(names, row, strict=True)) for row in zip(*body["candidates"].values(), strict=True)]
    for each in objects:
        if each["item"] is None:
            del each["item"]
    assert ask(server, {**body, "candidates": objects}).json() == ask(server, body).json()


def test_equal_candidates_stay_in_order(server, request_of):
    body, _ = request_of(1)
    same = {name: column * 6 for name, column in body["candidates"].items()}
    assert ask(server, {**body, "candidates": same}).json()["ranking"] == list(range(6))


def test_no_candidates_give_an_empty_ranking(server, request_of):
    body, _ = request_of(2)
    for none in ([], {}, {"item": []}):
        found = ask(server, {**body, "candidates": none, "probabilities": True}).json()
        assert (found["ranking"], found["scores"]) == ([], [])
        assert found["probabilities"] == {"click": [], "save": []}


def arrow(body, table) -> bytes:
    head = {name: value for name, value in body.items() if name != "candidates"}
    table = table.replace_schema_metadata({ARROW_KEY: json.dumps(head)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def ask_arrow(server, content, accept="application/json"):
    headers = {"Content-Type": ARROW_TYPE, "Accept": accept}
    return server.client.post("/v1/rank", content=content, headers=headers)


def test_an_arrow_stream_is_ranked_as_json_is(server, request_of):
    body, _ = request_of(50)
    table = log(50, 3, unseen=True).select(list(body["candidates"]))
    assert columns(table, table.column_names) == body["candidates"]
    item = table["item"].combine_chunks().dictionary_encode()
    table = table.set_column(table.column_names.index("item"), "item", item)
    body["probabilities"] = True
    by_json = ask(server, body).json()
    assert ask_arrow(server, arrow(body, table)).json() == by_json
    answer = ask_arrow(server, arrow(body, table), ARROW_TYPE)
    assert answer.headers["content-type"] == ARROW_TYPE
    found = pa.ipc.open_stream(answer.content).read_all()
    assert found["candidate"].to_pylist() == by_json["ranking"]
    np.testing.assert_array_equal(found["score"].to_numpy(), np.array(by_json["scores"], np.float32))
    assert found.column_names == ["candidate", "score", "p_click", "p_save"]
    assert json.loads(found.schema.metadata[ARROW_KEY])["model"] == "ads"


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_arrow_stream_is_refused(server, codec):
    table = pa.table({"item": ["i1"] * 1000, "d": pa.array(["x"] * 1000).dictionary_encode()})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    response = ask_arrow(server, bytes(sink.getvalue()))
    assert response.status_code == 400
    assert "compressed" in response.json()["error"]


def test_what_is_no_arrow_stream_is_refused(server, request_of):
    body, _ = request_of(20)
    whole = arrow(body, pa.table(body["candidates"]))
    rng = np.random.default_rng(0)
    for size in (0, 3, 8, len(whole) // 2):
        response = ask_arrow(server, whole[:size])
        assert response.status_code == 400, response.text
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        assert ask_arrow(server, bytes(damaged)).status_code in (200, 400, 404, 413)
    assert "Arrow's struct" in ask_arrow(server, arrow(body, pa.table({"item": [{"a": 1}]}))).json()["error"]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"usr": {}}, 400, "usr: Extra inputs"),
        ({"user": [1]}, 400, "user: "),
        ({"candidates": 3}, 400, "candidates"),
        ({"top": -1}, 400, "top: "),
        ({"objective": {"like": 1.0}}, 400, "objective.like: .* click, save"),
        ({"objective": {"click": 1e300}}, 400, "objective.click"),
        ({"model": "other"}, 404, "no model 'other'"),
        ({"version": "1"}, 404, "no version '1'"),
        ({"context": {"user": "u1"}}, 400, "'user' is given in user and in context"),
        ({"user": {}}, 400, "lacking"),
        ({"context": {"item": "i1"}}, 400, "'item' is given once for the request and again"),
        ({"candidates": {"item": [{"a": [{}]}]}}, 400, "'item': a value is a text"),
        ({"timeout_ms": 0}, 400, "timeout_ms"),
    ],
)
def test_a_wrong_request_is_refused(server, request_of, change, status, message):
    body, _ = request_of(1)
    response = ask(server, {**body, **change})
    assert response.status_code == status, response.text
    assert re.search(message, response.json()["error"])


WILD = [
    None,
    True,
    -1,
    2**53 + 1,
    2**63,
    -(2**64),
    10**400,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "nan",
    "-1e999",
    "\ud800",
    "\0",
    "a|b||c",
    "\u202e",
    "9" * 5000,
    [],
    [None],
    ["a", 1],
    [1.5, "x", None],
    [float("inf")] * 4,
    [1e300] * 4,
    [[1]],
    {},
    [{}],
]


def nested(depth):
    return f"{'[' * depth}1{']' * depth}"


def test_wild_values_are_answered_or_refused_never_more(server, request_of):
    body, _ = request_of(3)
    rng = np.random.default_rng(0)
    places = [(block, name) for block in ("user", "context", "candidates") for name in body[block]]
    for _ in range(2):
        for value in WILD:
            wild = json.loads(json.dumps(body))
            for number in rng.choice(len(places), 2, replace=False):
                block, name = places[number]
                column = wild[block]
                column[name] = [value, *column[name][1:]] if block == "candidates" else value
            response = ask(server, wild)
            assert response.status_code in (200, 400, 413), (value, places[number], response.text)
    for block, name in places:
        for value in WILD:
            wild = json.loads(json.dumps(body))
            wild[block][name] = [value] * 3 if block == "candidates" else value
            response = ask(server, wild)
            assert response.status_code in (200, 400, 413), (value, name, response.text)


@pytest.mark.parametrize("depth", [5, 300, 900, 990, 100_000])
def test_deep_values_are_refused(server, request_of, depth):
    body, _ = request_of(1)
    whole = json.dumps({**body, "user": {"age": "HERE"}}).replace('"HERE"', nested(depth))
    response = server.client.post("/v1/rank", content=whole)
    assert response.status_code == 400
    whole = '{"inputs": [], "parameters": {"routing_key": ' + nested(depth) + "}}"
    assert server.client.post("/v2/models/ads/infer", content=whole).status_code == 400


def test_other_content_types_are_refused(server):
    response = server.client.post("/v1/rank", content=b"a,b", headers={"Content-Type": "text/csv"})
    assert response.status_code == 415


def test_the_description_names_every_call(server):
    found = server.client.get("/openapi.json").json()
    assert {"/v1/rank", "/v2", "/v2/health/ready", "/v2/models/{model}/infer", "/metrics"} <= set(
        found["paths"]
    )
    form = found["components"]["schemas"]["RankRequest"]
    assert {"user", "context", "candidates", "objective", "top"} <= set(form["properties"])
    assert server.client.get("/docs").status_code == 200


def test_the_description_holds_together(server):
    """Every reference of the description leads somewhere."""
    text = server.client.get("/openapi.json").text
    found = json.loads(text)
    for name in re.findall(r'"\$ref":\s*"#/components/schemas/([^"]+)"', text):
        assert name in found["components"]["schemas"], name


def test_the_sample_is_a_request_that_works(server, engine):
    found = server.client.get("/v1/sample").json()
    assert found["model"] == "ads"
    assert set(found["user"]) | set(found["context"]) == engine.constant
    answer = ask(server, found).json()
    wanted = engine.rank(found["user"] | found["context"], found["candidates"]).probabilities[:, 0]
    np.testing.assert_allclose(answer["scores"], np.sort(wanted)[::-1], atol=1e-6)
    assert server.client.get("/v1/sample?model=none").status_code == 404


def described():
    """The Python lines of docs/server.md."""
    text = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_lines_of_the_description_work(server, tmp_path):
    blocks = [block for block in described() if "127.0.0.1" in block]
    assert len(blocks) == 2
    for block in blocks:
        block = block.replace("127.0.0.1:8000", server.host).replace("127.0.0.1:8001", server.grpc)
        (tmp_path / "lines.py").write_text(block, encoding="utf-8")
        assert len(runpy.run_path(str(tmp_path / "lines.py"))["answer"])


def test_the_lines_that_join_outcomes_work(tmp_path, monkeypatch):
    (joining,) = (block for block in described() if "127.0.0.1" not in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logged" / "ads").mkdir(parents=True)
    places = {"request_id": ["a", "a", "b"], "candidate": [0, 1, 0]}
    pl.DataFrame(places | {"item": ["x", "y", "z"]}).write_parquet("logged/ads/1.parquet")
    pl.DataFrame(places | {"click": [0, 1, 0], "position": [1, 0, 0]}).write_parquet("outcomes.parquet")
    Path("lines.py").write_text(joining, encoding="utf-8")
    runpy.run_path("lines.py")
    assert pl.read_parquet("train.parquet").sort("item")["click"].to_list() == [0, 1, 0]
