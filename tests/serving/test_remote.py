"""Tables on another machine: the rows of the file or a refusal, never anything else.

The group ``redis`` starts the server of Debian's package ``redis-server``; without it these tests are skipped.
"""

import contextlib
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
import torch
from in_threads import in_threads
from serving_clients import serving
from typer.testing import CliRunner

from every_feature import columns, log
from mldcn.cli import app
from mldcn.errors import UserError
from mldcn.serving.engine import Engine
from mldcn.serving.program import LookUp
from mldcn.serving.refused import Reason, Refused
from mldcn.serving.remote import (
    CHUNK_ROWS,
    RemoteTable,
    RowCache,
    TableServer,
    remote_rows,
    remove_tables,
    upload_tables,
)
from mldcn.serving.store import KINDS, TableFile, row_bytes, write_table

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None,
    reason="NO redis-server: the remote tier is NOT TESTED here; apt-get install redis-server",
)
ROWS = 3 * CHUNK_ROWS - 100


def plan_of(kind, file="table-000.bin", rows=ROWS, width=7):
    return LookUp("table", file, kind, rows, width, [0], [0], [], [], {})


class Counted:
    """The interface in memory, which counts what it is asked."""

    def __init__(self, path):
        self.content = path.read_bytes()
        self.asked = []

    def fetch(self, file, rows, size):
        self.asked.append(rows.tolist())
        assert len(set(rows.tolist())) == len(rows)
        parts = [self.content[row * size : (row + 1) * size] for row in rows.tolist()]
        return np.frombuffer(b"".join(parts), np.uint8).reshape(len(rows), size)


@pytest.fixture
def table(tmp_path):
    def make(kind):
        torch.manual_seed(0)
        write_table(torch.randn(ROWS, 7), tmp_path / "table-000.bin", kind)
        return TableFile(tmp_path / "table-000.bin", kind, ROWS, 7)

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [0, 2_000, 1 << 20])
def test_look_ups_are_those_of_the_file_whatever_the_caches_size(tmp_path, table, kind, cache):
    here = table(kind)
    store = Counted(tmp_path / "table-000.bin")
    there = RemoteTable(store, plan_of(kind), cache)
    rng = np.random.default_rng(1)
    for turn in range(20):
        # Popular rows again and again, and every few turns many others, which push them out.
        rows = torch.from_numpy(np.minimum(rng.zipf(1.2, (1 + 40 * (turn % 3), 4)), ROWS) - 1)
        assert torch.equal(there.look_up(rows), here.look_up(rows))
        assert torch.equal(there.packed(rows.flatten()), here.packed(rows.flatten()))
    assert there.look_up(torch.zeros(0, 4, dtype=torch.long)).shape == (0, 4, 7)
    asked = sum(map(len, store.asked))
    assert asked == there.cache.misses
    if cache == 1 << 20:
        assert asked == len({row for rows in store.asked for row in rows})  # nothing twice
        assert there.cache.hits > asked
    with pytest.raises(IndexError, match="has 12188 rows, asked for"):
        there.look_up(torch.tensor([[ROWS]]))


def test_a_cache_keeps_what_was_asked_for_last_and_its_size():
    cache = RowCache(RowCache.WAYS * (8 + RowCache.NOTES), 8)  # one set
    data = np.arange(80, dtype=np.uint8).reshape(10, 8)
    rows = np.arange(10, dtype=np.int64)
    cache.put(rows[:8], data[:8])
    assert cache.take(rows[:4])[0].all()
    cache.put(rows[8:], data[8:])
    hit, found = cache.take(rows)
    assert hit[:4].all()
    assert hit[8:].all()
    assert hit.sum() == 8
    assert (found[hit] == data[hit]).all()
    cache.put(np.arange(100, 150), np.full((50, 8), 7, np.uint8))
    hit, _ = cache.take(np.arange(200))
    assert hit.sum() == 8
    assert hit[100:150].sum() == 8


def test_threads_share_a_cache(tmp_path, table):
    here = table("int8")
    there = RemoteTable(Counted(tmp_path / "table-000.bin"), plan_of("int8"), 3_000)
    wrong = []

    def ask(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            rows = torch.from_numpy(rng.integers(0, 300, (20, 3)))
            if not torch.equal(there.look_up(rows), here.look_up(rows)):
                wrong.append(seed)

    in_threads(ask)
    assert not wrong


@contextlib.contextmanager
def redis_server(folder, *options):
    """A server of its own at a free port, which is stopped afterwards; gives its URL and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


def quiet(done, total):
    assert 0 <= done <= total


@needs_redis
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_redis_are_those_of_the_file(tmp_path, table, redis_url, kind):
    here, plan = table(kind), [plan_of(kind)]
    with pytest.raises(UserError, match="does not hold the tables of this bundle .version v-.*mldcn upload"):
        remote_rows(redis_url, f"v-{kind}", plan)
    size = (tmp_path / "table-000.bin").stat().st_size
    assert upload_tables(tmp_path, f"v-{kind}", plan, redis_url, quiet) == size
    assert upload_tables(tmp_path, f"v-{kind}", plan, redis_url, quiet) == 0
    there = RemoteTable(remote_rows(redis_url, f"v-{kind}", plan), plan[0], 0)
    rows = torch.randint(0, ROWS, (500, 4))
    rows[0] = torch.tensor([0, CHUNK_ROWS - 1, CHUNK_ROWS, ROWS - 1])
    assert torch.equal(there.look_up(rows), here.look_up(rows))
    remove_tables(f"v-{kind}", plan, redis_url)
    with pytest.raises(UserError, match="does not hold"):
        remote_rows(redis_url, f"v-{kind}", plan)
    import redis

    assert not redis.Redis.from_url(redis_url).keys(f"mldcn:v-{kind}*")


@needs_redis
def test_an_upload_that_was_cut_off_goes_on(tmp_path, table, redis_url, monkeypatch):
    here, plan = table("int4"), [plan_of("int4")]
    monkeypatch.setattr("mldcn.serving.remote._BATCH_BYTES", 1)  # a chunk at a time

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload_tables(tmp_path, "cut", plan, redis_url, stop)
    with pytest.raises(UserError, match="does not hold"):
        remote_rows(redis_url, "cut", plan)
    told = []
    written = upload_tables(tmp_path, "cut", plan, redis_url, lambda done, total: told.append((done, total)))
    size = row_bytes("int4", 7)
    assert written == (ROWS - CHUNK_ROWS) * size
    assert told[-1] == (ROWS * size, ROWS * size)
    there = RemoteTable(remote_rows(redis_url, "cut", plan), plan[0], 0)
    rows = torch.randint(0, ROWS, (300, 2))
    assert torch.equal(there.look_up(rows), here.look_up(rows))


@needs_redis
def test_rows_that_a_server_has_dropped_are_refused(tmp_path, table, redis_url):
    import redis

    table("int8")
    plan = [plan_of("int8")]
    upload_tables(tmp_path, "dropped", plan, redis_url, quiet)
    there = RemoteTable(remote_rows(redis_url, "dropped", plan), plan[0], 0)
    redis.Redis.from_url(redis_url).delete("mldcn:dropped:table-000.bin:1")
    there.look_up(torch.tensor([[0, ROWS - 1]]))
    with pytest.raises(Refused, match="lacks rows of this model") as caught:
        there.look_up(torch.tensor([[0, CHUNK_ROWS + 5]]))
    assert caught.value.reason == Reason.NOT_READY


@needs_redis
def test_a_server_without_room_or_reach_is_said(tmp_path, table):
    table("fp32")
    plan = [plan_of("fp32")]
    with redis_server(tmp_path, "--maxmemory", "1mb") as (url, process):
        # Which the server itself takes.
        with pytest.raises(UserError, match=r"cannot be written to .*maxmemory.*run the command again"):
            upload_tables(tmp_path, "v", plan, url, quiet)
        process.kill()
        process.wait()
        for call in (
            lambda: upload_tables(tmp_path, "v", plan, url, quiet),
            lambda: remote_rows(url, "v", plan),
            lambda: remove_tables("v", plan, url),
        ):
            with pytest.raises(UserError, match=r"127.0.0.1:\d+/0.*(does not answer|cannot be written)"):
                call()
    secret = url.replace("//", "//user:secret@")
    with pytest.raises(UserError) as caught:
        remote_rows(secret, "v", plan)
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="--tables: a URL as redis://"):
        remote_rows("http://somewhere", "v", plan)


@needs_redis
def test_a_server_that_hangs_or_goes_away_refuses_in_time(tmp_path, table):
    import signal

    table("int8")
    plan = [plan_of("int8")]
    with redis_server(tmp_path) as (url, process):
        upload_tables(tmp_path, "v", plan, url, quiet)
        there = RemoteTable(remote_rows(url, "v", plan), plan[0], 1 << 20)
        rows = torch.arange(100)[:, None]
        expected = there.look_up(rows)
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(Refused, match="does not answer; try again later"):
            there.look_up(rows + 200)
        assert time.monotonic() - begun < 5
        assert torch.equal(there.look_up(rows), expected)  # what is here is answered
        process.send_signal(signal.SIGCONT)
        assert there.look_up(rows + 200).shape == expected.shape
        process.kill()
        process.wait()
        with pytest.raises(Refused) as caught:
            there.look_up(rows + 400)
        assert (caught.value.reason, caught.value.retry_after) == (Reason.NOT_READY, 1)


@pytest.fixture
def tableless(small_bundle, tmp_path, redis_url):
    """A bundle without its tables' files, which were uploaded."""
    path = shutil.copytree(small_bundle, tmp_path / "tableless")
    done = CliRunner().invoke(app, ["upload", str(path), "--to", redis_url])
    assert done.exit_code == 0, done.output
    assert "are all there" in done.output
    shutil.rmtree(path / "tables")
    return path


@needs_redis
@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_a_bundle_answers_the_same_with_its_tables_elsewhere(small_bundle, tableless, redis_url, cache):
    here = Engine.load(small_bundle, "cpu")
    there = Engine.load(tableless, "cpu", TableServer(redis_url, cache))
    assert there.two_steps
    rows = columns(log(300, seed=3, unseen=True), [each.name for each in here.inputs])
    assert np.array_equal(there.score(rows).probabilities, here.score(rows).probabilities)
    with pytest.raises(UserError, match="tables/table-000.bin: missing"):
        Engine.load(tableless, "cpu")


@needs_redis
def test_metrics_tell_rows_from_the_cache_from_those_of_the_server(tableless, redis_url):
    with serving(tableless, tables=TableServer(redis_url)) as running:
        request = running.client.get("/v1/sample").json()
        answer = running.client.post("/v1/rank", json=request).json()
        labels = {"model": tableless.name, "version": answer["version"]}

        def asked(source):
            return running.metric("mldcn_table_rows_total", **labels, source=source)

        before = asked("cache"), asked("server")
        assert before[1] > 0
        running.client.post("/v1/rank", json=request)
        assert asked("cache") > before[0]
        assert asked("server") == before[1]


@needs_redis
def test_what_has_no_tables_to_replace_is_said(small_run, tableless, redis_url):
    with pytest.raises(UserError, match="a run has its tables in its model; --tables needs a bundle"):
        Engine.load(small_run.path, "cpu", TableServer(redis_url))
    done = CliRunner().invoke(app, ["upload", str(tableless), "--to", redis_url])
    assert "tables/table-000.bin: missing" in str(done.exception)
    done = CliRunner().invoke(app, ["upload", str(tableless), "--to", redis_url, "--remove"])
    assert done.exit_code == 0, done.output
    with pytest.raises(UserError, match="does not hold the tables of this bundle"):
        Engine.load(tableless, "cpu", TableServer(redis_url))


@needs_redis
def test_a_server_refuses_while_its_tables_cannot_be_had(small_bundle, tmp_path):
    import signal

    with redis_server(tmp_path) as (url, process):
        CliRunner().invoke(app, ["upload", str(small_bundle), "--to", url], catch_exceptions=False)
        # Without a cache every request needs the tables.
        with serving(small_bundle, tables=TableServer(url, 0)) as running:
            request = running.client.get("/v1/sample").json()
            expected = running.client.post("/v1/rank", json=request)
            assert expected.status_code == 200
            process.send_signal(signal.SIGSTOP)
            refused = running.client.post("/v1/rank", json=request)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "the tables' server does not answer" in refused.json()["error"]
            assert "127.0.0.1" not in refused.text
            process.send_signal(signal.SIGCONT)
            again = running.client.post("/v1/rank", json=request)
            assert again.json()["scores"] == expected.json()["scores"]
            process.kill()
            process.wait()
            assert running.client.post("/v1/rank", json=request).status_code == 503
            assert running.client.get("/v2/health/live").status_code == 200
