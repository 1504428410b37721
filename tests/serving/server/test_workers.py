"""Several processes that answer as one server: starts, deaths, versions, metrics, an orderly end."""

import asyncio
import contextlib
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

import httpx
import numpy as np
import pytest
import tritonclient.grpc as by_grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from serving_clients import Running, expected, in_background, rows
from short_lives import dies
from test_repository import ask, replace, small_run

from mldcn.errors import UserError
from mldcn.serving.engine import Engine
from mldcn.serving.refused import Reason, Refused
from mldcn.serving.server import supervisor as leading
from mldcn.serving.server.aging import Aging
from mldcn.serving.server.channel import Channel, ChannelClosed
from mldcn.serving.server.options import Options
from mldcn.serving.server.repository import share_of
from mldcn.serving.server.supervisor import Supervisor
from mldcn.serving.server.totals import Totals, snapshot


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs of different models, and their engines."""
    folder = tmp_path_factory.mktemp("two")
    paths = [small_run(folder / "a", 2), small_run(folder / "b", 3)]
    return paths, [Engine.load(path, "cpu") for path in paths]


class Fleet(Running):
    """A server of several processes; each request has a connection of its own, so that all processes get some."""

    def ask(self, values, **headers):
        with httpx.Client(base_url=self.http, timeout=20) as client:
            return ask(client, values, **headers)

    def versions(self, values, requests=12):
        """Which versions answer."""
        return {self.ask(values).json()["model_version"] for _ in range(requests)}


@contextlib.contextmanager
def fleet(*models, **options):
    """Serves with two processes until the block ends."""
    server = Supervisor(
        [str(model) for model in models],
        Options(**{"http_port": 0, "grpc_port": 0, "device": "cpu", "processes": 2, "threads": 1, **options}),
    )
    with in_background(server, 90, 60) as at:
        running = Fleet(server, at)
        with running.client:
            yield running


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def running(two, tmp_path_factory):
    live = tmp_path_factory.mktemp("live") / "ads"
    shutil.copytree(two[0][0], live)
    with fleet(live, control="explicit") as found:
        found.live = live
        yield found


def test_all_processes_answer_and_the_metrics_are_all_of_theirs(running, two):
    engine = two[1][0]
    values = rows(engine, 5)
    before = running.metric("mldcn_rows_total", model="ads", version=engine.version)
    for _ in range(24):
        found = running.ask(values).json()["outputs"][0]["data"]
        np.testing.assert_allclose(found, expected(engine, values)[:, 0], atol=1e-6)
    with by_grpc.InferenceServerClient(running.grpc) as client:
        assert client.is_server_ready()
    assert len(set(running.server.processes)) == 2
    labels = {"model": "ads", "version": engine.version}
    assert running.metric("mldcn_rows_total", **labels) == before + 24 * 5
    assert running.metric("mldcn_score_count", task="click", **labels) == before + 24 * 5
    assert running.metric("mldcn_workers") == 2
    # Each of them had some: the kernel spreads new connections.
    counted = [
        sum(
            value
            for family in worker.counts
            for series, labels, value in family[3]
            if series == "mldcn_rows_total"
        )
        for worker in running.server._workers
    ]
    assert min(counted) > 0


def test_a_killed_process_is_replaced_and_loses_only_what_it_was_answering(running, two):
    engine = two[1][0]
    values = rows(engine, 3)
    labels = {"model": "ads", "version": engine.version}
    first = running.server.processes
    before = running.metric("mldcn_rows_total", **labels)
    restarts = running.metric("mldcn_worker_restarts_total")
    end, answered, lost, wrong = threading.Event(), [], [], []

    def load():
        while not end.is_set():
            try:
                response = running.ask(values)
            except httpx.TransportError as error:
                lost.append(error)
                continue
            answered.append(response)
            if not np.allclose(
                response.json()["outputs"][0]["data"], expected(engine, values)[:, 0], atol=1e-6
            ):
                wrong.append(response.text)

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(load)
        time.sleep(0.3)
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: first[0] not in running.server.processes and len(running.server.processes) == 2)
        end.set()
    assert not wrong
    assert len(answered) > 10
    assert len(lost) <= 3  # one a caller
    assert running.metric("mldcn_worker_restarts_total") == restarts + 1
    assert running.metric("mldcn_workers") == 2
    # What the dead process had counted when it was last asked is kept.
    assert running.metric("mldcn_rows_total", **labels) >= before
    assert running.versions(values) == {engine.version}


def test_load_and_unload_reach_all_processes(running, two):
    values = rows(two[1][0], 2)
    with httpx.Client(base_url=running.http, timeout=60) as client:
        assert client.post("/v2/repository/models/ads/unload").status_code == 200
        assert {running.ask(values).status_code for _ in range(10)} == {404}
        assert client.post("/v2/repository/models/ads/unload").status_code == 404
        # A process that starts now leaves the model out as the others do.
        first = running.server.processes
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: first[0] not in running.server.processes and len(running.server.processes) == 2)
        assert {running.ask(values).status_code for _ in range(10)} == {404}
    # The killed process may have been this connection's.
    with httpx.Client(base_url=running.http, timeout=60) as client:
        assert client.post("/v2/repository/models/ads/load").status_code == 200
        assert {running.ask(values).status_code for _ in range(10)} == {200}
        assert client.post("/v2/repository/models/other/load").status_code == 404


def test_a_version_is_everywhere_when_load_returns_and_a_successor_does_not_serve_another(running, two):
    paths, engines = two
    values = rows(engines[0], 2)
    for turn in (1, 0):
        replace(running.live, paths[turn])
        assert running.versions(values) == {engines[1 - turn].version}
        assert httpx.post(running.http + "/v2/repository/models/ads/load", timeout=60).status_code == 200
        assert running.versions(values) == {engines[turn].version}
    # One that starts while the folder holds something newer takes the others along.
    replace(running.live, paths[1])
    first = running.server.processes
    os.kill(first[1], signal.SIGKILL)
    wait_for(lambda: first[1] not in running.server.processes and len(running.server.processes) == 2)
    assert running.versions(values) == {engines[1].version}
    # What cannot be loaded leaves the version before, everywhere.
    shutil.rmtree(running.live / "encoder")
    (running.live / "manifest.json").write_text("{}")
    assert httpx.post(running.http + "/v2/repository/models/ads/load", timeout=60).status_code == 400
    assert running.versions(values) == {engines[1].version}


def test_a_canary_is_the_same_in_all_processes(two):
    paths, engines = two
    values = rows(engines[0], 1)
    with fleet(*(f"ads={path}" for path in paths), canary=0.3) as running:
        for user in map(str, range(12)):
            wanted = engines[1 if share_of("ads", user) < 0.3 else 0].version
            assert {
                running.ask(values, **{"x-routing-key": user}).json()["model_version"] for _ in range(4)
            } == {wanted}


def test_a_model_that_cannot_be_loaded_and_a_taken_port_end_the_server(two, tmp_path):
    with pytest.raises(UserError, match="neither a run's folder nor a bundle"), fleet(tmp_path / "none"):
        pass
    for shared in (False, True):
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(UserError, match=f"127.0.0.1:{port}: cannot listen there"):
                Supervisor(["x"], Options(http_port=port, grpc_port=None)).run()


def test_processes_that_end_at_every_start_are_given_up(two, monkeypatch, caplog):
    monkeypatch.setattr(leading, "_work", dies)
    monkeypatch.setattr(leading, "FIRST_PAUSE", 0.01)
    with pytest.raises(
        UserError, match="ended 5 times in a row soon after its start, the last time by signal"
    ):
        Supervisor([str(two[0][0])], Options(http_port=0, grpc_port=None, processes=2)).run()
    assert "another starts in 0.01 s" in caplog.text
    assert "another starts in 0.08 s" in caplog.text


class Follower:
    """A worker as its leader sees it."""

    def __init__(self, *contents, ready=True):
        self.contents = list(contents)
        self.calls = []
        self.ready_since = 1.0 if ready else None
        self.place = 0
        self.process = self
        self.channel = self
        self.killed = False

    async def call(self, name, **arguments):
        self.calls.append(name)
        if name != "prepare":
            return None
        found = self.contents.pop(0) if len(self.contents) > 1 else self.contents[0]
        if isinstance(found, Exception):
            raise found
        return {"contents": [found], "versions": [["ads", found]]}

    def kill(self):
        self.killed = True


def agree(*workers, served="a"):
    """What a leader of these workers then serves."""

    async def run():
        leader = Supervisor(["x"], Options())
        leader._served = {"contents": [served], "versions": [["ads", served]]}
        try:
            await leader._agree(workers, frozenset())
        finally:
            found = leader._served["contents"][0]
        return found

    return asyncio.run(run())


def test_all_switch_or_none_does():
    both = Follower("b"), Follower("b")
    assert agree(*both) == "b"
    assert [worker.calls for worker in both] == [["prepare", "switch"]] * 2
    same = Follower("a"), Follower("a")
    assert agree(*same) == "a"
    assert [worker.calls for worker in same] == [["prepare"]] * 2
    # One looked at the folder a moment too early.
    early = Follower("a", "b"), Follower("b", "b")
    assert agree(*early) == "b"
    for other in (Follower("a"), Follower(UserError("broken"))):
        apart = Follower("b"), other
        with pytest.raises(UserError, match="do not find the same content|broken"):
            agree(*apart)
        assert all("switch" not in worker.calls for worker in apart)
    # One that dies meanwhile holds up nobody.
    gone = Follower("b"), Follower(ChannelClosed())
    assert agree(*gone) == "b"
    assert gone[0].calls[-1] == "switch"


def test_calls_go_both_ways_and_errors_come_back():
    async def run():
        async def echo(**given):
            return given

        async def mistake():
            raise UserError("mend it")

        async def refuse():
            raise Refused(Reason.NOT_FOUND, "not here")

        async def wait():
            await asyncio.sleep(60)

        one, other = socket.socketpair()
        ours = await Channel.open(one, {"echo": echo})
        theirs = await Channel.open(other, {each.__name__: each for each in (echo, mistake, refuse, wait)})
        assert await ours.call("echo", text="é", many=list(range(100_000))) == {
            "text": "é",
            "many": list(range(100_000)),
        }
        assert await theirs.call("echo", number=1) == {"number": 1}
        with pytest.raises(UserError, match="mend it"):
            await ours.call("mistake")
        with pytest.raises(Refused, match="not here") as caught:
            await ours.call("refuse")
        assert caught.value.reason is Reason.NOT_FOUND
        with pytest.raises(UserError, match="KeyError"):
            await ours.call("unknown")
        waiting = asyncio.create_task(ours.call("wait"))
        await asyncio.sleep(0.01)
        theirs.close()
        with pytest.raises(ChannelClosed):
            await waiting
        with pytest.raises(ChannelClosed):
            await ours.call("echo")

    asyncio.run(run())


def counted(version, count):
    registry = CollectorRegistry()
    Counter("rows", "Rows.", ("model", "version"), registry=registry).labels("ads", version).inc(count)
    Gauge("queue", "Waiting.", registry=registry).set(count)
    seconds = Histogram("seconds", "Seconds.", buckets=(1, 2), registry=registry)
    for _ in range(count):
        seconds.observe(1.5)
    return snapshot(registry)


def test_totals_are_sums_and_do_not_fall_when_a_process_ends():
    totals = Totals()
    text = totals.text([counted("1", 2), counted("1", 3)]).decode()
    assert 'rows_total{model="ads",version="1"} 5.0' in text
    assert 'seconds_bucket{le="1.0"} 0.0' in text
    assert 'seconds_bucket{le="2.0"} 5.0' in text
    assert "seconds_sum 7.5" in text
    assert "queue 5.0" in text
    totals.end(counted("1", 3))
    text = totals.text([counted("1", 2), counted("2", 1)]).decode()
    assert 'rows_total{model="ads",version="1"} 5.0' in text
    assert "seconds_count 6.0" in text
    assert "queue 3.0" in text  # what a dead process had queued waits no more
    totals.forget({("ads", "2")})
    text = totals.text([counted("2", 1)]).decode()
    assert 'version="1"' not in text
    assert "seconds_count 4.0" in text


def test_threads_are_shared():
    cores = len(os.sched_getaffinity(0))
    assert Options().threads_each is None
    assert Options(processes=2).threads_each == max(1, cores // 2)
    assert Options(processes=1000).threads_each == 1
    assert Options(processes=2, threads=3).threads_each == 3


def test_connections_end_after_a_while_with_a_whole_answer():
    now, sent = [0.0], []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body"})

    async def send(message):
        sent.append((b"connection", b"close") in message.get("headers", []))

    async def run():
        aging = Aging(app, lambda: now[0])
        for now[0], caller in ((0, 1), (4, 1), (4, 2), (15.1, 1), (15.2, 2), (15.3, 1), (15.4, 2)):
            await aging({"client": ("127.0.0.1", caller)}, None, send)

    asyncio.run(run())
    closed = sent[::2]
    assert closed[:4] == [False, False, False, True]
    assert closed[5] is False  # a new connection from the same port
    assert not any(sent[1::2])


@contextlib.contextmanager
def command(*arguments):
    code = "from mldcn.cli import main; main()"
    line = [
        sys.executable,
        "-c",
        code,
        "serve",
        *arguments,
        "--processes",
        "2",
        "--port",
        "0",
        "--grpc-port",
        "-1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            found = ""
            while "ready: ads" not in found:
                line = process.stderr.readline()
                assert line, found
                found += line
            yield process, re.search(r"listening at (\S+?),", found)[1]
        finally:
            process.kill()


def test_the_command_reloads_at_sighup_and_ends_at_sigterm(two, tmp_path):
    paths, engines = two
    values = rows(engines[0], 1)
    live = tmp_path / "ads"
    shutil.copytree(paths[0], live)
    with command(str(live)) as (process, url):

        def versions():
            found = set()
            for _ in range(8):
                with httpx.Client(base_url=url, timeout=20) as client:
                    found.add(ask(client, values).json()["model_version"])
            return found

        assert versions() == {engines[0].version}
        replace(live, paths[1])
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: versions() == {engines[1].version})
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/v2")


def test_workers_end_when_their_leader_is_killed(two):
    with command(f"ads={two[0][0]}") as (process, url):
        process.kill()
        process.wait(10)

        def closed():
            try:
                httpx.get(url + "/v2/health/live", timeout=5)
            except httpx.TransportError:
                return True
            return False

        wait_for(closed, 30)
