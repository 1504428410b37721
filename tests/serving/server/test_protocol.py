"""The Open Inference Protocol, asked by the real client of both transports."""

import json
import re

import numpy as np
import pytest
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http
from serving_clients import expected, rows
from tritonclient.utils import InferenceServerException

TRANSPORTS = ["http-json", "http-binary", "grpc"]


@pytest.fixture(params=TRANSPORTS)
def client(request, server):
    """(the client's module, a client, whether tensors go as raw bytes)."""
    if request.param == "grpc":
        with by_grpc.InferenceServerClient(server.grpc) as made:
            yield by_grpc, made, None
    else:
        with by_http.InferenceServerClient(server.host) as made:
            yield by_http, made, request.param == "http-binary"


def texts(values) -> np.ndarray:
    """A column as texts: the empty one is a missing value, lists are cut at the delimiter."""

    def text(value):
        if value is None:
            return ""
        return "|".join(map(str, value)) if isinstance(value, list) else str(value)

    return np.array([text(value) for value in values], dtype=object)


def tensors(client, values):
    """Columns as the client's tensors: numbers as FP64 with NaN for missing, all else as text."""
    module, _, binary = client
    made = []
    for name, column in values.items():
        if name in ("age", "price", "distance", "time"):
            array = np.array([np.nan if value is None else value for value in column], np.float64)
        else:
            array = texts(column)
        tensor = module.InferInput(name, list(array.shape), "FP64" if array.dtype == np.float64 else "BYTES")
        if binary is None:
            tensor.set_data_from_numpy(array)
        else:
            tensor.set_data_from_numpy(array, binary_data=binary)
        made.append(tensor)
    return made


@pytest.mark.parametrize("count", [1, 7, 300])
def test_scores_equal_the_engines(client, engine, count):
    values = rows(engine, count)
    result = client[1].infer("ads", tensors(client, values), request_id="mine")
    wanted = expected(engine, values)
    for place, task in enumerate(engine.tasks):
        np.testing.assert_allclose(result.as_numpy(f"p_{task}"), wanted[:, place], atol=1e-6)
    response = result.get_response()
    response = (
        response if isinstance(response, dict) else {"id": response.id, "model_name": response.model_name}
    )
    assert response["id"] == "mine"
    assert response["model_name"] == "ads"


def test_only_the_outputs_asked_for_are_given(client, engine):
    module, made, binary = client
    asked = [module.InferRequestedOutput("p_save", **({} if binary is None else {"binary_data": binary}))]
    values = rows(engine, 3)
    result = made.infer("ads", tensors(client, values), outputs=asked, model_version=engine.version)
    np.testing.assert_allclose(result.as_numpy("p_save"), expected(engine, values)[:, 1], atol=1e-6)
    assert result.as_numpy("p_click") is None


def test_no_rows_give_no_scores(client, engine):
    # The client cannot send empty tensors of text but as JSON or gRPC.
    values = {name: [] for name in rows(engine, 1)}
    result = client[1].infer("ads", tensors(client, values))
    assert result.as_numpy("p_click").shape == (0,)


def test_health_and_metadata(client, engine):
    _, made, _ = client
    assert made.is_server_live()
    assert made.is_server_ready()
    assert made.is_model_ready("ads")
    assert made.is_model_ready("ads", engine.version)
    assert not made.is_model_ready("other")
    facts = made.get_server_metadata()
    model = made.get_model_metadata("ads")
    if not isinstance(facts, dict):
        from google.protobuf.json_format import MessageToDict

        facts, model = MessageToDict(facts), MessageToDict(model)
    assert facts["name"] == "mldcn"
    assert "binary_tensor_data" in facts["extensions"]
    assert model["versions"] == [engine.version]
    assert [t["name"] for t in model["inputs"]] == [each.name for each in engine.inputs]
    assert [t["name"] for t in model["outputs"]] == ["p_click", "p_save"]
    assert {t["name"]: t["datatype"] for t in model["inputs"]}["price"] == "FP64"


def test_ids_may_be_whole_numbers_and_lists_two_dimensional(client, engine):
    module, made, binary = client
    values = rows(engine, 2)
    values |= {"hashed": [2**53 + 1, 7], "picture": [[1.0, 2.0, 3.0, 4.0], [0.5, 0.0, 0.0, 1.0]]}
    wanted = expected(engine, values)
    others = {name: column for name, column in values.items() if name not in ("hashed", "picture")}
    sent = tensors(client, others)
    for name, array, kind in (
        ("hashed", np.array([[2**53 + 1], [7]]), "INT64"),
        ("picture", np.array(values["picture"]), "FP64"),
    ):
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array, **({} if binary is None else {"binary_data": binary}))
        sent.append(tensor)
    np.testing.assert_allclose(made.infer("ads", sent).as_numpy("p_click"), wanted[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("item"), "'item' is lacking"),
        (lambda v: v.update(nonsense=["1", "2"]), "no feature reads 'nonsense'"),
        (lambda v: v.update(item=["i1"]), "has 1 values"),
        (lambda v: v.update(hour=["5", "noon"]), "row 2, column 'hour'.*noon"),
    ],
)
def test_a_wrong_value_is_named(client, engine, change, message):
    values = rows(engine, 2)
    change(values)
    with pytest.raises(InferenceServerException, match=message) as caught:
        client[1].infer("ads", tensors(client, values))
    assert "400" in caught.value.status() or "INVALID_ARGUMENT" in caught.value.status()


def test_unknown_models_versions_and_outputs_are_refused(client, engine):
    module, made, _ = client
    sent = tensors(client, rows(engine, 1))
    with pytest.raises(InferenceServerException, match="no model 'asd'; did you mean 'ads'"):
        made.infer("asd", sent)
    with pytest.raises(InferenceServerException, match="no version '9'"):
        made.infer("ads", sent, model_version="9")
    with pytest.raises(InferenceServerException, match="output 'p_like': the model has only p_click, p_save"):
        made.infer("ads", sent, outputs=[module.InferRequestedOutput("p_like")])


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_packed_bodies_are_unpacked(server, engine, packing):
    values = rows(engine, 20)
    with by_http.InferenceServerClient(server.host) as made:
        result = made.infer(
            "ads", tensors((by_http, made, True), values), request_compression_algorithm=packing
        )
    np.testing.assert_allclose(result.as_numpy("p_click"), expected(engine, values)[:, 0], atol=1e-6)


def test_typed_contents_of_grpc(server, engine):
    """Clients other than Triton's send values in typed fields, not as raw bytes."""
    import grpc

    from mldcn.serving.server.grpc_messages import MESSAGES, SERVICE

    values = rows(engine, 2)
    request = MESSAGES["ModelInferRequest"](model_name="ads", id="7")
    for name, column in values.items():
        tensor = request.inputs.add(name=name, shape=[2])
        if name in ("age", "price", "distance", "time"):
            tensor.datatype = "FP64"
            tensor.contents.fp64_contents.extend(float("nan") if v is None else v for v in column)
        else:
            tensor.datatype = "BYTES"
            tensor.contents.bytes_contents.extend(text.encode() for text in texts(column))
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        reply = call(request, timeout=20)
        assert reply.id == "7"
        scores = np.frombuffer(reply.raw_output_contents[0], "<f4")
        np.testing.assert_allclose(scores, expected(engine, values)[:, 0], atol=1e-6)
        request.inputs[0].contents.bytes_contents.pop()
        with pytest.raises(grpc.RpcError, match="1 values in bytes_contents are not 2"):
            call(request, timeout=20)


def test_nulls_in_json_are_missing_values(server, engine):
    values = rows(engine, 3)
    values["item"] = [None, "i1", None]
    inputs = [
        {"name": name, "shape": [3], "datatype": "BYTES", "data": texts(column).tolist()}
        for name, column in values.items()
    ]
    for each in inputs:
        if each["name"] == "item":
            each["data"] = values["item"]
    found = server.client.post("/v2/models/ads/infer", content=json.dumps({"inputs": inputs})).json()
    np.testing.assert_allclose(found["outputs"][0]["data"], expected(engine, values)[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"", {}, "no JSON"),
        (b"[1, 2]", {}, "body: "),
        (b"[" * 100_000, {}, "no JSON: recursion limit"),
        (b'{"inputs": [{"name": "item"}]}', {}, "inputs.0.shape: Field required"),
        (
            b'{"inputs": [{"name": "item", "shape": [1], "datatype": "TEXT", "data": ["a"]}]}',
            {},
            "datatype 'TEXT'",
        ),
        (b'{"inputs": [{"name": "item", "shape": [-1], "datatype": "BYTES", "data": ["a"]}]}', {}, "shape"),
        (
            b'{"inputs": [{"name": "item", "shape": [2], "datatype": "BYTES", "data": ["a"]}]}',
            {},
            "1 values are not of shape",
        ),
        (
            b'{"inputs": [{"name": "a", "shape": [1], "datatype": "INT8", "data": ["a"]}]}',
            {},
            "datatype INT8",
        ),
        (b'{"inputs": []} tail', {"Inference-Header-Content-Length": "14"}, "5 bytes lie behind"),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "99"}, "length of the body's JSON"),
        (
            b'{"inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "parameters"'
            b': {"binary_data_size": 4}}]}'
            b"\xff\xff\xff\x7f",
            {"Inference-Header-Content-Length": "101"},
            "not 1 texts",
        ),
        (b"text", {"Content-Encoding": "gzip"}, "no gzip"),
    ],
)
def test_what_is_no_request_is_refused(server, body, headers, message):
    response = server.client.post("/v2/models/ads/infer", content=body, headers=headers)
    assert response.status_code == 400
    assert re.search(message, response.json()["error"])
