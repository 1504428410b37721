"""A server of several processes under load, while versions are swapped and workers are killed.

Two bundles of one model, trained from other seeds, are served in turn at one place. A load of 80 % of the capacity
measured first, with swaps, comes in open loop (it does not slow down when the server does), and every answer is
compared with what the version that it names gives for that request. A new version is put in place every 20
seconds; every minute a worker is stopped, its connections are noted, and it is killed with SIGKILL. Lost are
requests without an answer: those that the killed worker had in hand are counted apart from any others, of which
there must be none, and so are those sent on its connections before their callers noticed that they were closed.

    python endurance/soak.py --out docs/results/soak.json     # ten minutes
    python endurance/soak.py --minutes 3 --processes 2
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import command_environment, mldcn_command, write_small_log
from processes import ports_of, pss, state, workers

CANDIDATES = 20
REQUESTS = 64
CONNECTIONS = 128
NEAR = 1e-5
MODEL = {
    "embedding": {"dim": 16},
    "interaction": {"name": "mldcn", "num_layers": 3, "rank": 64},
    "deep": {"hidden": [128]},
}


@dataclass(eq=False)
class Asked:
    """A request on its way, or what became of it."""

    number: int
    intended: float
    port: int = 0
    sent: float = 0.0
    done: float = 0.0
    status: int = 0


@dataclass
class Found:
    """What a soak came to."""

    sent: int = 0
    right: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    mixed: int = 0
    other_status: Counter[int] = field(default_factory=Counter)
    lost_in_hand: int = 0
    lost_at_its_end: int = 0
    lost_otherwise: int = 0
    swaps: int = 0
    kills: int = 0
    seconds: list[float] = field(default_factory=list)
    both_versions: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def violations(self) -> list[str]:
        """What must not be."""
        counts = {
            "wrong answers": self.wrong,
            "answers of mixed versions": self.mixed,
            "lost beyond the killed workers' own": self.lost_otherwise,
            "statuses other than 200 and 503": sum(
                count for status, count in self.other_status.items() if status != 503
            ),
        }
        return [f"{count} {name}" for name, count in counts.items() if count]


class Connection(asyncio.Protocol):
    """One connection by HTTP/1.1 that has one request at a time."""

    def __init__(self) -> None:
        self.open = True
        self.port = 0
        self.begun = time.monotonic()
        self._buffer = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: Any) -> None:
        """It is open."""
        self.transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """The status and body that come back."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        """Some of an answer."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._answer is None:
            return
        head = bytes(self._buffer[:end]).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + 4 + length:
            return
        if b"connection: close" in head:
            self.open = False
            self.transport.close()
        body = bytes(self._buffer[end + 4 : end + 4 + length])
        self._buffer.clear()
        answer, self._answer = self._answer, None
        if not answer.done():  # nobody waits any more
            answer.set_result((int(head.split(b" ", 2)[1]), body))

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed, by whomever."""
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError())


class Load:
    """Sends requests and judges the answers.

    Args:
        port: of the server.
        bodies: the requests.
        expected: the right scores by version and request.
    """

    def __init__(self, port: int, bodies: list[bytes], expected: dict[str, list[np.ndarray]]) -> None:
        self._port = port
        self._requests = [
            b"POST /v1/rank HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
            for body in bodies
        ]
        self._expected = expected
        self._idle: list[Connection] = []
        self._places = asyncio.Semaphore(CONNECTIONS)
        self.found = Found()
        self.under_way: set[Asked] = set()
        self.in_hand: set[int] = set()  # numbers of the requests that a killed worker had
        # A killed worker's callers' ports, when it was killed, and when its sockets were closed.
        self.dying: tuple[set[int], float, float] = (set(), 0.0, 0.0)
        self.first_new = self.last_old = 0.0
        self.newest = ""

    async def one(self, number: int, intended: float) -> None:
        """A request, from its opening to its judgement."""
        self.found.sent += 1
        async with self._places:
            await self._one(Asked(number, intended))

    async def _one(self, asked: Asked) -> None:
        connection: Connection | None = None
        asked.sent = time.monotonic()
        try:
            while self._idle and not self._idle[-1].open:
                self._idle.pop()
            if self._idle:
                connection = self._idle.pop()
            else:
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
            asked.port, asked.sent = connection.port, time.monotonic()
            self.under_way.add(asked)
            async with asyncio.timeout(30):
                asked.status, body = await connection.ask(self._requests[asked.number % REQUESTS])
            asked.done = time.monotonic()
        except (OSError, TimeoutError) as error:
            if connection is not None:
                connection.transport.abort()
            self._lost(asked, connection, error)
            return
        finally:
            self.under_way.discard(asked)
        if connection.open:
            self._idle.append(connection)
        self._judge(asked, body)

    def _lost(self, asked: Asked, connection: Connection | None, error: BaseException) -> None:
        ports, begin, end = self.dying
        # Nobody else answers on a killed worker's connections; until its callers notice, they go on sending.
        its_own = connection is not None and connection.port in ports and connection.begun < begin
        while_it_ended = (connection is None or connection.begun >= begin) and begin <= asked.sent <= end
        if asked.number in self.in_hand:
            self.found.lost_in_hand += 1
        elif its_own or while_it_ended:
            self.found.lost_at_its_end += 1
        else:
            self.found.lost_otherwise += 1
            self.found.examples.append(f"{asked}: {error!r}, {time.monotonic() - end:.3f} s after a kill")

    def _judge(self, asked: Asked, body: bytes) -> None:
        found = self.found
        found.seconds.append(asked.done - asked.intended)
        if asked.status != 200:
            found.other_status[asked.status] += 1
            if asked.status != 503:
                found.examples.append(f"{asked.status}: {body[:200]!r}")
            return
        answer = json.loads(body)
        scores = np.empty(CANDIDATES)
        scores[answer["ranking"]] = answer["scores"]
        near = {
            version: np.abs(scores - right[asked.number % REQUESTS]) < NEAR
            for version, right in self._expected.items()
        }
        version = answer["version"]
        if near.get(version, np.zeros(1, bool)).all():
            found.right[version] += 1
        elif np.logical_or.reduce(list(near.values())).all():
            found.mixed += 1
        else:
            found.wrong += 1
        if version == self.newest:
            self.first_new = self.first_new or asked.done
        else:
            self.last_old = asked.sent

    async def closed_loop(self, callers: int, seconds: float) -> float:
        """Requests a second that so many callers get answered, each one after the other."""
        end = time.monotonic() + seconds
        before = self.found.right.total()

        async def caller(number: int) -> None:
            while time.monotonic() < end:
                await self.one(number, time.monotonic())
                number += callers

        begun = time.monotonic()
        await asyncio.gather(*(caller(number) for number in range(callers)))
        return (self.found.right.total() - before) / (time.monotonic() - begun)

    async def open_loop(self, rate: float, seconds: float, seed: int = 0) -> None:
        """Requests at moments of a Poisson process, whether others are answered or not."""
        rng = np.random.default_rng(seed)
        moment, end = time.monotonic(), time.monotonic() + seconds
        tasks: set[asyncio.Task[None]] = set()
        number = 1_000_000
        while moment < end:
            moment += rng.exponential(1 / rate)
            wait = moment - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            elif number % 20 == 0:
                await asyncio.sleep(0)
            number += 1
            task = asyncio.create_task(self.one(number, moment))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)


class Soak:
    """Disturbs a server under load.

    Args:
        leader: its process' id.
        port: of HTTP.
        live: the link that it serves.
        bundles: what the link may point to, by version.
        load: what asks it.
    """

    def __init__(self, leader: int, port: int, live: Path, bundles: dict[str, Path], load: Load) -> None:
        self._leader = leader
        self._port = port
        self._live = live
        self._bundles = bundles
        self._load = load
        self._rng = np.random.default_rng(1)

    async def swap(self, every: float) -> None:
        """Another version every few seconds."""
        load = self._load
        names = list(self._bundles)
        turn = 0
        while True:
            await asyncio.sleep(every)
            if turn and load.first_new:
                load.found.both_versions.append(max(0.0, load.last_old - load.first_new))
            load.found.swaps += 1
            turn += 1
            load.newest = names[turn % len(names)]
            load.first_new = load.last_old = 0.0
            point(self._live, self._bundles[load.newest])
            os.kill(self._leader, signal.SIGHUP)

    async def kill(self, every: float) -> None:
        """A worker's death every so often."""
        load = self._load
        await asyncio.sleep(every / 2)
        while True:
            there = workers(self._leader)
            victim = int(self._rng.choice(there))
            os.kill(victim, signal.SIGSTOP)
            while state(victim) != "T":
                time.sleep(0.0005)
            ports = ports_of(victim, self._port)
            load.in_hand |= {asked.number for asked in load.under_way if asked.port in ports}
            begun = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            load.dying = ports, begun, float("inf")
            load.found.kills += 1
            while state(victim) not in ("Z", ""):
                await asyncio.sleep(0.0005)
            load.dying = ports, begun, time.monotonic()
            await asyncio.sleep(max(0.0, every - (time.monotonic() - begun)))

    async def watch(self, every: float) -> None:
        """The memory of all processes, each shared page counted once."""
        begun = time.monotonic()
        while True:
            size = await asyncio.to_thread(pss, self._leader)
            self._load.found.memory.append((time.monotonic() - begun, size))
            await asyncio.sleep(every)


def point(live: Path, bundle: Path) -> None:
    """Puts a bundle in place, at once."""
    new = live.with_name("new")
    new.symlink_to(bundle, target_is_directory=True)
    new.replace(live)


def make_bundles(folder: Path) -> tuple[dict[str, Path], list[bytes], dict[str, list[np.ndarray]]]:
    """Two versions of a model, requests, and the right answers of each version."""
    import polars as pl
    import yaml

    from mldcn.config import load_config
    from mldcn.data.prepare import prepare
    from mldcn.predict import Predictor
    from mldcn.run import RunFolder
    from mldcn.serving.engine import Engine
    from mldcn.serving.export import export_run
    from mldcn.training.fit import fit

    engines: dict[str, Engine] = {}
    bundles: dict[str, Path] = {}
    if not (folder / "bundle1").exists():
        path = write_small_log(folder / "log", 6000)
    for seed in (0, 1):
        bundle = folder / f"bundle{seed}"
        if bundle.exists():
            engine = Engine.load(bundle, "cpu")
            engines[engine.version], bundles[engine.version] = engine, bundle
            continue
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        raw["model"], raw["training"]["seed"] = MODEL, seed
        raw["training"]["epochs"] = 1
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        config = load_config(path)
        run = RunFolder.create(folder / f"run{seed}")
        fit(config, run, prepare(config, folder / "log" / "encoded"))
        export_run(Predictor.load(run.path, "cpu"), "torch-export", bundle)
        engine = Engine.load(bundle, "cpu")
        engines[engine.version], bundles[engine.version] = engine, bundle
    first = next(iter(engines.values()))
    log = next(each for each in sorted((folder / "log").iterdir()) if each.suffix == ".parquet")
    table = pl.read_parquet(log).select([each.name for each in first.inputs])
    bodies: list[bytes] = []
    expected: dict[str, list[np.ndarray]] = {version: [] for version in engines}
    for start in range(0, REQUESTS * CANDIDATES, CANDIDATES):
        rows = table[start : start + CANDIDATES].to_dict(as_series=False)
        user = {name: rows.pop(name)[0] for name in first.constant}
        bodies.append(json.dumps({"user": user, "candidates": rows}).encode())
        given = json.loads(bodies[-1])
        for version, engine in engines.items():
            scores = engine.rank(given["user"], given["candidates"]).probabilities[:, 0]
            expected[version].append(scores.astype(np.float64))
    one, other = expected.values()
    assert all(np.abs(a - b).max() > 100 * NEAR for a, b in zip(one, other, strict=True))
    return bundles, bodies, expected


@contextlib.asynccontextmanager
async def served(live: Path, folder: Path, processes: int) -> Any:
    """The server's process and its port."""
    options = ["--processes", str(processes), "--port", "0", "--grpc-port", "-1", "--no-access-log"]
    options += ["--queue-rows", "1024", "--log-requests", str(folder / "logged")]
    with (folder / "server.log").open("w") as errors:
        process = await asyncio.create_subprocess_exec(
            *mldcn_command(), "serve", f"ads={live}", *options, stderr=errors, env=command_environment()
        )
        try:
            while "ready: ads" not in (said := (folder / "server.log").read_text()):
                if process.returncode is not None:
                    raise RuntimeError(said)
                await asyncio.sleep(0.1)
            yield process, int(said.partition("http://127.0.0.1:")[2].split(",")[0])
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def soak(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole check; what it found."""
    bundles, bodies, expected = await asyncio.to_thread(make_bundles, folder)
    live = folder / "ads"
    first = next(iter(bundles))
    point(live, bundles[first])
    async with served(live, folder, arguments.processes) as (process, port):
        load = Load(port, bodies, expected)
        load.newest = first
        disturbing = Soak(process.pid, port, live, bundles, load)
        await load.closed_loop(8, 3.0)  # warm
        # To load a version takes some of the cores' time too: the capacity is what is left.
        disturbances = [asyncio.create_task(disturbing.swap(arguments.swap_seconds))]
        capacity = await load.closed_loop(16, 1.5 * arguments.swap_seconds)
        assert not load.found.violations(), (load.found.violations(), load.found.examples[:5])
        load.found = Found()
        disturbances += [
            asyncio.create_task(each)
            for each in (disturbing.kill(arguments.kill_seconds), disturbing.watch(2.0))
        ]
        rate = arguments.share * capacity
        await load.open_loop(rate, 60 * arguments.minutes)
        for task in disturbances:
            task.cancel()
        for task in await asyncio.gather(*disturbances, return_exceptions=True):
            if isinstance(task, Exception) and not isinstance(task, asyncio.CancelledError):
                raise task
    return summary(load.found, capacity, rate, arguments) | {"server_exit_code": process.returncode}


def summary(found: Found, capacity: float, rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    seconds = 1000 * np.array(found.seconds)
    memory = np.array([size for _, size in found.memory]) / 2**20
    third = max(1, len(memory) // 3)
    counts = ("sent", "right", "wrong", "mixed", "other_status", "swaps", "kills")
    lost = ("lost_in_hand", "lost_at_its_end", "lost_otherwise")
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, the load on the same cores",
        "minutes": arguments.minutes,
        "processes": arguments.processes,
        "candidates": CANDIDATES,
        "capacity_per_second": round(capacity, 1),
        "rate_per_second": round(rate, 1),
        **{name: getattr(found, name) for name in (*counts, *lost)},
        "latency_ms": {f"p{q:g}": round(float(np.percentile(seconds, q)), 2) for q in (50, 90, 99, 99.9)},
        "both_versions_answer_ms": [round(1000 * each, 2) for each in found.both_versions],
        "pss_mb": {
            "first_third": round(float(np.median(memory[:third])), 1),
            "last_third": round(float(np.median(memory[-third:])), 1),
            "highest": round(float(memory.max()), 1),
        },
        "violations": found.violations(),
        "examples": found.examples[:10],
    }


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.8, help="of the measured capacity")
    parser.add_argument("--swap-seconds", type=float, default=20.0)
    parser.add_argument("--kill-seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, help="keeps the bundles for the next time")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(soak(folder, arguments))
        told = (folder / "server.log").read_text()
    print(json.dumps(found, indent=2))
    if found["violations"]:
        print(told)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if found["violations"] or found["server_exit_code"] else 0)


if __name__ == "__main__":
    main()
