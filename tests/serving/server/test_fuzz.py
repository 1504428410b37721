"""Whatever is sent: never a crash, never a 500, and a good request is answered afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gzip
import json
import socket
from collections import Counter

import grpc
import httpx
import numpy as np
import pyarrow as pa
import pytest
from serving_clients import rows, serving
from test_repository import texts
from test_server import listless

from mldcn.errors import UserError
from mldcn.serving.refused import Refused
from mldcn.serving.server import http
from mldcn.serving.server.grpc_messages import MESSAGES, SERVICE
from mldcn.serving.server.grpc_server import parse_infer
from mldcn.serving.server.metrics import Metrics
from mldcn.serving.server.options import Limits, Options
from mldcn.serving.server.ranking import ARROW_KEY, ARROW_TYPE
from mldcn.serving.server.repository import Repository
from mldcn.serving.server.service import Service
from mldcn.serving.server.wire import columns_of

ALLOWED = {
    200,
    400,
    404,
    413,
    415,
    503,
    504,
}  # 503: too many at once; 504: a mutation made the deadline short
WILD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**40, 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), "", " ", "\0", "\ud800", "NaN", "null", "a" * 3000, "é€😀", "|", "||", "1e999", "-", [], [[]],
    [None], ["a", 1], [1.5, None], {}, {"a": 1}, [{}], [[[["deep"]]]], "\u202e", "0x10", "١٢",
]  # fmt: skip


SHAPES = [[3], [3], [], [0], [-1], [3, 1], [1, 3], [2**40], [3, 2**40], [1, 1, 3]]


@pytest.fixture(scope="module")
def good(engine):
    """Requests that work: JSON and Arrow for /v1/rank, JSON and binary for the protocol, a gRPC message."""
    values = rows(engine, 3)
    user = {name: values[name][0] for name in engine.constant}
    candidates = {name: column for name, column in values.items() if name not in user}
    rank = {"model": "ads", "user": user, "candidates": candidates, "top": 2, "probabilities": True}
    rank |= {"objective": {"click": 1.0}, "timeout_ms": 5000.0, "routing_key": "u1", "id": "x"}
    inputs = [
        {"name": name, "shape": [3], "datatype": "BYTES", "data": column}
        for name, column in texts(listless(values)).items()
    ]
    infer = {"id": "7", "inputs": inputs, "outputs": [{"name": "p_click"}], "parameters": {"timeout": 10**6}}
    table = pa.table({name: pa.array(column) for name, column in candidates.items()})
    head = {name: value for name, value in rank.items() if name != "candidates"}
    arrow = pa.BufferOutputStream()
    table = table.replace_schema_metadata({ARROW_KEY: json.dumps(head)})
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    raws = [_raw(each["data"]) for each in inputs]
    binary = [
        {**{k: v for k, v in each.items() if k != "data"}, "parameters": {"binary_data_size": len(raw)}}
        for each, raw in zip(inputs, raws, strict=True)
    ]
    packed = json.dumps({"inputs": binary, "parameters": {"binary_data_output": True}}).encode()
    message = MESSAGES["ModelInferRequest"](model_name="ads", id="7")
    for each, raw in zip(inputs, raws, strict=True):
        message.inputs.add(name=each["name"], datatype="BYTES", shape=[3])
        message.raw_input_contents.append(raw)
    return {
        "rank": rank,
        "infer": infer,
        "arrow": bytes(arrow.getvalue()),
        "binary": (packed, b"".join(raws)),
        "message": message.SerializeToString(),
    }


def _raw(values):
    parts = [("" if value is None else value).encode() for value in values]
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


class Mutations:
    """Requests that were good before something happened to them."""

    def __init__(self, good, seed=0):
        self.good = good
        self.rng = np.random.default_rng(seed)

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def document(self, document):
        """JSON with some places lost, doubled, renamed or filled with other values."""
        document = copy.deepcopy(document)
        for _ in range(self.pick([1, 1, 2, 5])):
            where = document
            for _ in range(self.pick([1, 2, 3, 4])):
                inside = [key for key in _keys(where) if isinstance(where[key], dict | list) and where[key]]
                if not inside:
                    break
                where = where[self.pick(inside)]
            keys = _keys(where)
            if not keys:
                continue
            key = self.pick(keys)
            deed = self.pick(["lose", "fill", "fill", "fill", "rename", "more"])
            if deed == "lose":
                del where[key]
            elif deed == "fill":
                where[key] = copy.deepcopy(self.pick(WILD))
            elif isinstance(where, list):
                where.append(copy.deepcopy(where[key]))
            elif deed == "rename":
                where[self.pick(["", "x" * 300, "user", "item", "history", "\0", "data"])] = where.pop(key)
            else:
                where[self.pick(["position", "click", "nobody", "version"])] = copy.deepcopy(self.pick(WILD))
        return json.dumps(document).encode()

    def bytes(self, body):
        """Bytes flipped, cut, put in or doubled."""
        body = bytearray(body)
        for _ in range(self.pick([1, 2, 8])):
            place = int(self.rng.integers(len(body) + 1))
            deed = self.pick(["flip", "flip", "cut", "insert", "repeat"])
            if deed == "flip" and place < len(body):
                body[place] = int(self.rng.integers(256))
            elif deed == "cut":
                del body[place : place + int(self.rng.integers(1, 40))]
            elif deed == "insert":
                body[place:place] = self.rng.bytes(int(self.rng.integers(1, 9)))
            elif deed == "repeat":
                body[place:place] = body[place : place + 30]
        return bytes(body)

    def http(self):
        """A path, headers and a body."""
        kind = self.pick(["rank", "rank", "infer", "infer", "arrow", "binary", "packed", "noise"])
        headers = {"content-type": "application/json"}
        path = "/v2/models/ads/infer" if kind in ("infer", "binary") else "/v1/rank"
        if kind in ("rank", "infer"):
            good = self.good[kind]
            wild = self.rng.random() < 0.8
            body = self.document(good) if wild else self.bytes(json.dumps(good).encode())
        elif kind == "arrow":
            headers["content-type"] = ARROW_TYPE
            body = self.bytes(self.good["arrow"])
        elif kind == "binary":
            head, raw = self.good["binary"]
            if self.rng.random() < 0.5:
                head = self.document(json.loads(head))
            else:
                raw = self.bytes(raw)
            length = len(head) if self.rng.random() < 0.9 else self.pick([0, 1, -1, 10**9, "x", "9" * 30])
            headers["inference-header-content-length"] = str(length)
            body = head + raw
        elif kind == "packed":
            headers["content-encoding"] = self.pick(["gzip", "deflate", "br", "gzip, gzip"])
            body = self.bytes(gzip.compress(json.dumps(self.good["rank"]).encode()))
        else:
            headers["content-type"] = self.pick(["application/json", ARROW_TYPE, "text/plain", "é".encode()])
            body = self.rng.bytes(int(self.rng.integers(0, 300)))
            path = self.pick(["/v1/rank", "/v2/models/ads/infer", "/v2/models/%00/infer", "/v1/none"])
        return path, headers, body


def _keys(document):
    return list(document) if isinstance(document, dict) else list(range(len(document)))


@contextlib.asynccontextmanager
async def application(path):
    """The server but for its sockets, in this event loop."""
    options = Options(limits=Limits(rows=1000, body_bytes=1 << 20), device="cpu")
    metrics = Metrics()
    repository = Repository([(None, path)], "cpu")
    service = Service(repository, options, metrics)
    service.start()
    await repository.load()
    transport = httpx.ASGITransport(http.build(service), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        try:
            yield client, service
        finally:
            await service.stop()


def test_ten_thousand_malformed_requests_break_nothing(served_run, good, caplog):
    """3,200 of them by HTTP, in the event loop of the server; 6,800 are gRPC messages, below."""
    mutations = Mutations(good)
    statuses = Counter()

    async def one(client):
        path, headers, body = mutations.http()
        found = await client.post(path, headers=headers, content=body)
        statuses[found.status_code] += 1
        assert found.status_code in ALLOWED, (path, headers, body, found.text)
        if found.status_code != 200:
            assert set(found.json()) == {"error"}, (path, body)
            assert "Traceback" not in found.text
            assert str(served_run) not in found.text

    async def ask_all():
        async with application(served_run) as (client, _):
            wanted = (await client.post("/v1/rank", json=good["rank"])).json()
            for _ in range(400):
                await asyncio.gather(*(one(client) for _ in range(8)))
            assert (await client.post("/v1/rank", json=good["rank"])).json() == wanted
            arrow = await client.post("/v1/rank", content=good["arrow"], headers={"content-type": ARROW_TYPE})
            assert arrow.json() == wanted
            head, raw = good["binary"]
            headers = {"inference-header-content-length": str(len(head))}
            binary = await client.post("/v2/models/ads/infer", content=head + raw, headers=headers)
            assert binary.status_code == 200
            assert (await client.post("/v2/models/ads/infer", json=good["infer"])).status_code == 200

    asyncio.run(ask_all())
    # Most were bad, or the mutations test nothing; some still were good, or they are too wild to get far.
    assert statuses[400] > 1_500
    assert statuses[200] > 100
    assert statuses[503] < 100
    assert "internal error" not in caplog.text


def test_malformed_messages_are_refused_as_such(engine, good):
    """6,800 messages to what the gRPC method does with them; only refusals may come of it."""
    mutations = Mutations(good, 1)
    found = Counter()
    for i in range(6_800):
        message = MESSAGES["ModelInferRequest"].FromString(good["message"])
        if mutations.rng.random() < 0.5:
            with contextlib.suppress(Exception):  # gRPC itself refuses what is no message
                message = MESSAGES["ModelInferRequest"].FromString(mutations.bytes(good["message"]))
        else:
            tensor = mutations.pick(message.inputs)
            tensor.datatype = mutations.pick(["BYTES", "FP32", "INT64", "BOOL", "BF16", "", "FP64"])
            del tensor.shape[:]
            tensor.shape.extend(mutations.pick(SHAPES))
            if mutations.rng.random() < 0.5:
                del message.raw_input_contents[:]
                tensor.contents.bytes_contents.extend([b"\xff", b"1", b""])
                tensor.contents.fp32_contents.extend([float("nan")] * 3)
            message.parameters["timeout"].string_param = "x" if mutations.rng.random() < 0.1 else ""
            if not message.parameters["timeout"].string_param:
                del message.parameters["timeout"]
        try:
            asked = parse_infer(message, None, Limits(rows=1000))
            columns = columns_of(asked.tensors, engine, Limits(rows=1000))
            if i % 20 == 0:  # to encode them all takes long
                engine.encode(columns)
            found["answered"] += 1
        except (Refused, UserError):
            found["refused"] += 1
    assert found["refused"] > 1_000
    assert found["answered"] > 100


def test_random_bytes_on_both_ports(served_run, good, caplog):
    rng = np.random.default_rng(2)
    mutations = Mutations(good, 3)
    with serving(served_run) as running:
        for address in (running.host, running.grpc):
            host, port = address.split(":")
            for start in (b"", b"POST /v1/rank HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
                for _ in range(15):
                    with socket.create_connection((host, int(port)), timeout=5) as raw:
                        raw.sendall(start + rng.bytes(int(rng.integers(1, 2000))))
        codes = Counter()
        with grpc.insecure_channel(running.grpc) as channel:
            names = ("ModelInfer", "ModelMetadata", "None")
            methods = [channel.unary_unary(f"/{SERVICE}/{name}") for name in names]
            for i in range(600):
                body = rng.bytes(60) if i % 3 else mutations.bytes(good["message"])
                try:
                    methods[i % 7 % 3](body, timeout=10)
                    codes["OK"] += 1
                except grpc.RpcError as error:
                    codes[error.code().name] += 1
        refused = running.client.get("/metrics").text
        answer = running.client.post("/v1/rank", json=good["rank"])
        assert answer.status_code == 200
    assert set(codes) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
    counted = [line for line in refused.splitlines() if "requests_total" in line]
    assert not [line for line in counted if '"500"' in line or '"INTERNAL"' in line]
    assert "DecodeError" not in caplog.text


def test_schemathesis_finds_nothing_wrong_with_the_description(server, good):
    """Requests made from /openapi.json, valid and not; answers are as described there."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (mldcn[dev])")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    schema = schemathesis.openapi.from_url(f"{server.http}/openapi.json")
    quiet = settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    checked = Counter()

    def check(case):
        response = case.call(base_url=server.http, timeout=20)
        checked[case.operation.label] += 1
        assert response.status_code < 500 or response.status_code == 503, (case, response.text)
        case.validate_response(response, checks=[response_schema_conformance, status_code_conformance])

    for found in schema.get_all_operations():
        quiet(given(case=found.ok().as_strategy())(check))()
    assert len(checked) >= 10
    assert server.client.post("/v1/rank", json=good["rank"]).status_code == 200
