"""A server's life: ready when warm, full queues, deadlines, limits, tokens, logs, counts, an orderly end."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http
from serving_clients import expected, rows, serving
from test_repository import ask, texts
from tritonclient.utils import InferenceServerException

from mldcn.errors import UserError
from mldcn.serving.server import repository
from mldcn.serving.server.options import Batching, Limits, Options, is_loopback, read_token
from mldcn.serving.server.reserved import bound
from mldcn.serving.server.server import Server


class Held:
    """Holds up the scoring of a running server's model."""

    def __init__(self, running):
        self.gate, self.entered = threading.Event(), threading.Event()
        engine = running.server.repository.models["ads"][0].engine
        score = engine.score_rows

        def slow(calls):
            self.entered.set()
            assert self.gate.wait(20)
            return score(calls)

        engine.score_rows = slow


def grpc_tensors(values):
    made = []
    for name, column in texts(values).items():
        made.append(by_grpc.InferInput(name, [len(column)], "BYTES"))
        made[-1].set_data_from_numpy(np.array(column, object))
    return made


def listless(values):
    """Lists as the texts that CSV would hold."""
    return {
        name: ["|".join(map(str, v)) if isinstance(v, list) else v for v in column]
        for name, column in values.items()
    }


@pytest.fixture
def values(engine):
    return listless(rows(engine, 2))


def test_nothing_is_ready_before_the_models_are_warm(served_run, values, monkeypatch):
    gate = threading.Event()
    load = repository._load
    monkeypatch.setattr(repository, "_load", lambda *args: (gate.wait(20), load(*args))[1])
    found = []
    listening = threading.Event()
    server = Server([(None, served_run)], Options(http_port=0, grpc_port=0, device="cpu"))
    thread = threading.Thread(
        target=server.run, args=[lambda at: (found.append(at), listening.set())], daemon=True
    )
    thread.start()
    assert listening.wait(20)
    with httpx.Client(base_url=found[0].http, timeout=20) as client:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 503
        early = ask(client, values)
        assert (early.status_code, early.headers["retry-after"]) == (503, "1")
        assert client.get("/v2/models/ads/ready").status_code == 503
        gate.set()
        deadline = time.monotonic() + 20
        while client.get("/v2/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert ask(client, values).status_code == 200
    server.stop()
    thread.join(20)
    assert not thread.is_alive()


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    with pytest.raises(UserError, match="neither a run's folder nor a bundle"), serving(tmp_path / "none"):
        pass


def test_a_full_queue_refuses_at_once_in_both_transports(served_run, engine, values):
    with serving(served_run, batching=Batching(rows=1, delay=0.0, queue_rows=2)) as running:
        held = Held(running)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, running.client, values)
            assert held.entered.wait(10)
            second = pool.submit(ask, running.client, values)
            await_metric(running, "mldcn_queue_rows", 2)
            begun = time.monotonic()
            refused = ask(running.client, values)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            with by_grpc.InferenceServerClient(running.grpc) as client:
                with pytest.raises(InferenceServerException, match="too many requests wait") as caught:
                    client.infer("ads", grpc_tensors(values))
                assert "RESOURCE_EXHAUSTED" in caught.value.status()
            assert time.monotonic() - begun < 5
            held.gate.set()
            for done in (first, second):
                assert done.result().status_code == 200
        assert running.metric("mldcn_refused_total", reason="busy") == 2


def test_requests_that_come_together_are_refused_when_reading_the_others_takes_too_long(
    served_run, engine, values
):
    with serving(served_run, batching=Batching(lag=0.1)) as running:
        engine = running.server.repository.models["ads"][0].engine
        encode = engine.encode
        first, all_sent = threading.Event(), threading.Event()

        def slow(columns):
            if not first.is_set():
                first.set()
                assert all_sent.wait(20)  # holds up the event loop, so that the others come together
            time.sleep(0.06)
            return encode(columns)

        engine.encode = slow
        host, port = running.host.split(":")
        inputs = [
            {"name": name, "shape": [2], "datatype": "BYTES", "data": column}
            for name, column in texts(values).items()
        ]
        body = json.dumps({"inputs": inputs}).encode()
        head = f"POST /v2/models/ads/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        callers = [socket.create_connection((host, int(port)), timeout=20) for _ in range(12)]
        time.sleep(0.2)  # all are accepted
        callers[0].sendall(head.encode() + body)
        assert first.wait(20)
        for caller in callers[1:]:
            caller.sendall(head.encode() + body)
        all_sent.set()
        statuses = [caller.recv(1 << 16).split()[1] for caller in callers]
        for caller in callers:
            caller.close()
        assert set(statuses) == {b"200", b"503"}
        assert 2 <= statuses.count(b"200") <= 6
        assert ask(running.client, values).status_code == 200


def await_metric(running, line, value):
    deadline = time.monotonic() + 20
    while running.metric(line) != value:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_deadlines_are_honoured_in_both_transports(served_run, engine, values):
    with serving(served_run, batching=Batching(delay=0.0)) as running, ThreadPoolExecutor(1) as pool:
        held = Held(running)
        first = pool.submit(ask, running.client, values)
        assert held.entered.wait(10)
        inputs = [
            {"name": name, "shape": [2], "datatype": "BYTES", "data": column}
            for name, column in texts(values).items()
        ]
        late = running.client.post(
            "/v2/models/ads/infer", json={"inputs": inputs, "parameters": {"timeout": 50_000}}
        )
        assert late.status_code == 504
        constant = {name: values[name][0] for name in engine.constant}
        body = {
            "user": constant,
            "candidates": {name: column for name, column in values.items() if name not in constant},
            "timeout_ms": 50,
        }
        assert running.client.post("/v1/rank", json=body).status_code == 504
        with by_grpc.InferenceServerClient(running.grpc) as client:
            with pytest.raises(InferenceServerException, match="deadline has passed"):
                client.infer("ads", grpc_tensors(values), timeout=50_000)
            with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
                client.infer("ads", grpc_tensors(values), client_timeout=0.1)
        # The first, and the one that asks: gRPC's client gives up a little before the server hears of it.
        await_metric(running, "mldcn_requests_under_way", 2)
        held.gate.set()
        assert first.result().status_code == 200
        assert ask(running.client, values).status_code == 200
        # Those whose callers gave up were never scored.
        await_metric(running, "mldcn_queue_rows", 0)
        assert running.metric("mldcn_batch_requests_sum") == 2


def test_what_is_under_way_is_answered_before_the_end(served_run, engine, values):
    wanted = expected(engine, values)[:, 0]
    with serving(served_run, shutdown_delay=0.5) as running:
        held = Held(running)
        with ThreadPoolExecutor(2) as pool:
            by_web = pool.submit(ask, running.client, values)
            with by_grpc.InferenceServerClient(running.grpc) as client:
                by_rpc = pool.submit(client.infer, "ads", grpc_tensors(values))
                assert held.entered.wait(10)
                running.server.stop()
                with httpx.Client(base_url=running.http) as probe:
                    deadline = time.monotonic() + 5
                    while probe.get("/v2/health/ready").status_code != 503:
                        assert time.monotonic() < deadline
                    assert probe.get("/v2/health/live").status_code == 200
                time.sleep(0.7)
                held.gate.set()
                found = by_web.result().json()["outputs"][0]["data"]
                np.testing.assert_allclose(found, wanted, atol=1e-6)
                np.testing.assert_allclose(by_rpc.result().as_numpy("p_click"), wanted, atol=1e-6)
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.http)


@pytest.fixture(scope="module")
def guarded(served_run):
    """A server with a token and small limits."""
    limits = Limits(body_bytes=20_000, rows=10, text_bytes=100)
    with serving(served_run, token="0123456789abcdef", limits=limits) as running:
        yield running


KEY = {"Authorization": "Bearer 0123456789abcdef"}


def test_only_who_knows_the_token_is_answered(guarded, values):
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic 0123456789abcdef"}):
        for path in ("/v2/models/ads", "/metrics", "/openapi.json", "/v1/sample", "/none"):
            response = guarded.client.get(path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
    assert guarded.client.get("/v2/health/ready").status_code == 200
    assert ask(guarded.client, values, **KEY).status_code == 200
    with by_grpc.InferenceServerClient(guarded.grpc) as client:
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="send the server's token"):
            client.infer("ads", grpc_tensors(values))
        headers = {"authorization": KEY["Authorization"]}
        assert client.infer("ads", grpc_tensors(values), headers=headers).as_numpy("p_click").shape == (2,)


def test_what_is_too_large_is_refused(guarded, engine, values):
    many = {name: column * 6 for name, column in values.items()}
    response = ask(guarded.client, many, **KEY)
    assert response.status_code == 413
    assert "12 rows are more than 10" in response.json()["error"]
    constant = {name: values[name][0] for name in engine.constant}
    candidates = {name: column for name, column in many.items() if name not in constant}
    body = {"user": constant, "candidates": candidates}
    assert guarded.client.post("/v1/rank", json=body, headers=KEY).status_code == 413
    long = {**values, "item": ["x" * 101, "y"]}
    assert "101 characters" in ask(guarded.client, long, **KEY).json()["error"]
    url = "/v2/models/ads/infer"
    assert guarded.client.post(url, content=b"x" * 20_001, headers=KEY).status_code == 413
    chunks = (b"x" * 1000 for _ in range(30))
    assert guarded.client.post(url, content=chunks, headers=KEY).status_code == 413
    import gzip

    bomb = gzip.compress(b"[" * 10_000_000)
    assert len(bomb) < 20_000
    packed = {**KEY, "Content-Encoding": "gzip"}
    assert guarded.client.post(url, content=bomb, headers=packed).status_code == 413
    with by_grpc.InferenceServerClient(guarded.grpc) as client:
        headers = {"authorization": KEY["Authorization"]}
        with pytest.raises(InferenceServerException, match="12 rows are more than 10"):
            client.infer("ads", grpc_tensors(many), headers=headers)
        huge = {**values, "item": ["x" * 30_000, "y"]}
        with pytest.raises(InferenceServerException, match="larger than max"):
            client.infer("ads", grpc_tensors(huge), headers=headers)


def test_pages_of_other_sites_may_not_ask(guarded, values):
    assert ask(guarded.client, values, **KEY, Origin="https://evil.example").status_code == 403
    assert ask(guarded.client, values, **KEY, Origin=guarded.http).status_code == 200


def test_no_answer_tells_of_the_servers_inside(served_run, values, caplog):
    with serving(served_run) as running:
        engine = running.server.repository.models["ads"][0].engine

        def broken(calls):
            raise RuntimeError(f"secret of {served_run}")

        engine.score_rows = broken
        response = ask(running.client, values, **{"x-request-id": "mine-1"})
        assert response.status_code == 500
        assert response.json() == {"error": "internal error; the server's log tells more of request mine-1"}
        with by_grpc.InferenceServerClient(running.grpc) as client:
            with pytest.raises(InferenceServerException) as caught:
                client.infer("ads", grpc_tensors(values))
            assert re.search(
                r"internal error; the server's log tells more of request \w+$", str(caught.value)
            )
        assert "secret" in caplog.text
        found = running.client.get("/v2/none")
        assert (found.status_code, found.json()) == (404, {"error": "Not Found"})


def test_request_ids_come_back_and_wild_ones_are_replaced(server):
    for given, kept in (("abc.1", True), ("a b", False), ("x" * 65, False)):
        found = server.client.get("/v2", headers={"x-request-id": given}).headers["x-request-id"]
        assert (found == given) == kept
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", found)


def test_random_bytes_break_nothing(served_run, values):
    rng = np.random.default_rng(0)
    good = json.dumps(
        {
            "inputs": [
                {"name": name, "shape": [2], "datatype": "BYTES", "data": column}
                for name, column in texts(values).items()
            ]
        }
    ).encode()
    with serving(served_run) as running:
        for i in range(80):
            body = bytearray(good if i % 2 else rng.bytes(200))
            for place in rng.integers(0, len(body), 4):
                body[place] = rng.integers(0, 256)
            for path in ("/v2/models/ads/infer", "/v1/rank"):
                status = running.client.post(path, content=bytes(body)).status_code
                assert status in (200, 400, 404, 413)
        for address in (running.host, running.grpc):
            host, port = address.split(":")
            for _ in range(20):
                with socket.create_connection((host, int(port)), timeout=5) as raw:
                    raw.sendall(rng.bytes(500))
        with grpc.insecure_channel(running.grpc) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for _ in range(50):
                with pytest.raises(grpc.RpcError):
                    call(rng.bytes(100), timeout=5)
        assert ask(running.client, values).status_code == 200
        assert 'status="500"' not in running.client.get("/metrics").text


def test_counts_show_traffic_drift_and_skew(served_run, engine):
    values = listless(rows(engine, 40))
    scores = engine.score(values)
    with serving(served_run) as running:
        for _ in range(3):
            assert ask(running.client, values).status_code == 200
        labels = {"model": "ads", "version": engine.version}
        assert running.metric("mldcn_rows_total", **labels) == 120
        for name, found in (("unseen_ids", scores.unseen), ("missing_values", scores.missing)):
            assert sum(found.values()) > 0
            for feature, count in found.items():
                assert running.metric(f"mldcn_{name}_total", feature=feature, **labels) == 3 * count
        for place, task in enumerate(engine.tasks):
            given = scores.probabilities[:, place]
            for edge in ("0.1", "0.5", "1.0"):
                counted = running.metric("mldcn_score_bucket", le=edge, task=task, **labels)
                assert counted == 3 * (given <= np.float32(edge)).sum()
            assert running.metric("mldcn_score_count", task=task, **labels) == 120
        assert running.metric("mldcn_requests_total", call="infer", status="200", transport="http") == 3
        for stage in ("decode", "encode", "queue", "score", "answer"):
            assert running.metric("mldcn_stage_seconds_count", stage=stage) == 3
        assert running.metric("mldcn_queue_rows") == 0
        assert running.metric("mldcn_requests_under_way") == 1  # the one that asks


def test_every_request_has_its_line_in_the_log(served_run, engine, values, caplog):
    caplog.set_level("INFO", "mldcn.access")
    with serving(served_run) as running:
        ask(running.client, values, **{"x-request-id": "web-1"})
        ask(running.client, values, model="other")
        running.client.get("/v2/health/live")
        with by_grpc.InferenceServerClient(running.grpc) as client:
            client.infer("ads", grpc_tensors(values), headers={"x-request-id": "rpc-1"})
    lines = [json.loads(r.message) for r in caplog.records if r.name == "mldcn.access"]
    first, second, third = lines
    assert (first["request_id"], first["status"], first["call"]) == ("web-1", 200, "infer")
    assert (first["model"], first["version"], first["rows"]) == ("ads", engine.version, 2)
    assert first["seconds"] > 0
    assert (second["status"], second["refused"]) == (404, "not_found")
    assert (third["request_id"], third["transport"], third["status"]) == ("rpc-1", "grpc", "OK")


def test_concurrent_callers_of_both_transports_get_their_own_answers(served_run, engine):
    batching = Batching(rows=64, delay=0.005, workers=2)
    with serving(served_run, batching=batching) as running:

        def by_web(seed):
            values = listless(rows(engine, 1 + seed % 5, seed))
            found = ask(running.client, values).json()["outputs"][0]["data"]
            np.testing.assert_allclose(found, expected(engine, values)[:, 0], atol=1e-6)

        def by_rpc(seed):
            values = listless(rows(engine, 1 + seed % 5, seed))
            result = client.infer("ads", grpc_tensors(values))
            np.testing.assert_allclose(result.as_numpy("p_save"), expected(engine, values)[:, 1], atol=1e-6)

        with by_grpc.InferenceServerClient(running.grpc) as client, ThreadPoolExecutor(12) as pool:
            done = [pool.submit((by_web, by_rpc)[seed % 2], seed) for seed in range(40)]
            for each in done:
                each.result()
        assert running.metric("mldcn_batch_requests_sum") == 40
        assert running.metric("mldcn_batch_requests_count") < 40


def test_answers_are_not_kept_back_until_the_caller_acknowledges_their_heads():
    with bound("127.0.0.1", 0, "--port") as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as served:
            assert served.proto == socket.IPPROTO_TCP  # asyncio asks for it
            assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_servers_process_hides_what_stays_from_the_collector(served_run, monkeypatch):
    frozen = []
    monkeypatch.setattr(repository.gc, "freeze", lambda: frozen.append(True))
    with serving(served_run):  # in a thread of this program
        assert not frozen
    made = Server([(None, served_run)], Options(http_port=0, grpc_port=None, device="cpu"))
    asyncio.run(made.repository.load())
    assert frozen


def test_a_taken_port_is_named(served_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: cannot listen there"):
            Server([(None, served_run)], Options(http_port=port, grpc_port=None)).run()
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: cannot listen there; name another --grpc"):
            Server([(None, served_run)], Options(http_port=0, grpc_port=port)).run()


def test_options_that_do_not_go_together_are_refused(served_run, tmp_path, caplog):
    with pytest.raises(UserError, match="go together"):
        Server([(None, served_run)], Options(certificate=tmp_path / "c.pem"))
    with pytest.raises(UserError, match="is no file"):
        Server([(None, served_run)], Options(certificate=tmp_path / "c", private_key=tmp_path / "k"))
    for name in ("c", "k"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(UserError, match="is no PEM certificate chain that goes with"):
        Server([(None, served_run)], Options(certificate=tmp_path / "c", private_key=tmp_path / "k"))
    with pytest.raises(UserError, match="a share of the users"):
        Server([(None, served_run)], Options(canary=2.0))
    Server([(None, served_run)], Options(host="0.0.0.0"))
    assert "can be reached from other machines" in caplog.text
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1", "x.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(UserError, match="16 or more"):
        read_token(tmp_path / "short")
    with pytest.raises(UserError, match="cannot be read"):
        read_token(tmp_path / "none")
    (tmp_path / "good").write_text("0123456789abcdef\n")
    assert read_token(tmp_path / "good") == "0123456789abcdef"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls_in_both_transports(served_run, values, tmp_path):
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {key} -out {chain}".split(),
        check=True,
        capture_output=True,
    )
    with serving(served_run, certificate=chain, private_key=key) as running:
        assert running.http.startswith("https://")
        import ssl

        trusted = ssl.create_default_context(cafile=str(chain))
        with httpx.Client(base_url=running.http, verify=trusted) as client:
            assert ask(client, values).status_code == 200
        with by_grpc.InferenceServerClient(running.grpc, ssl=True, root_certificates=str(chain)) as client:
            assert client.infer("ads", grpc_tensors(values)).as_numpy("p_click").shape == (2,)
        with pytest.raises(httpx.HTTPError):
            httpx.get(running.http.replace("https", "http"))


def test_the_command_serves_until_sigterm(served_run, engine, values):
    code = "from mldcn.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(served_run), "--port", "0", "--grpc-port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            at = re.search(r"listening at (\S+), gRPC at (\S+)", process.stderr.readline())
            line = ""
            while "ready: ads" not in line:
                line = process.stderr.readline()
                assert line, "ended early"
            with httpx.Client(base_url=at[1]) as client:
                found = ask(client, values)
            np.testing.assert_allclose(
                found.json()["outputs"][0]["data"], expected(engine, values)[:, 0], atol=1e-6
            )
            assert json.loads(process.stderr.readline())["call"] == "infer"
            with by_http.InferenceServerClient(at[1].removeprefix("http://")) as client:
                assert client.is_server_ready()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
