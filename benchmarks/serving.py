"""Requests a second at one p99: ``mldcn serve`` against the same ONNX file behind LitServe, and plain FastAPI.

All servers run on this machine, each asked in its turn while the others are stopped (SIGSTOP); the load comes from
this machine too. A turn finds the highest rate of Poisson arrivals at which 99 % of the answers come within
``--p99-ms`` of the time at which their requests should have left, by a few probes of some seconds each; rounds
alternate. FastAPI computes the run's model with PyTorch.
Bodies are the same: raw values of one user and some 100 candidates from the log. Every server computes with
``--threads`` threads, in one process and in two; each library's better side counts.

Usage: python benchmarks/serving.py --json docs/results/serving.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from turns import HERE, Result, machine, report, shown, spread

from mldcn.config import Config, parse
from mldcn.datasets.pinads import PinadsConfig, pinads_config, write_log
from mldcn.loadtest.clients import RankClient, Target
from mldcn.loadtest.draws import Candidates, arrivals
from mldcn.loadtest.loops import Recorder, Step, closed_loop, open_loop
from mldcn.loadtest.traffic import Traffic, read_log
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.serving.export import export_run
from mldcn.workflow import train

BODIES = 300
LIBRARIES = ("mldcn", "torch", "onnxruntime", "litserve", "fastapi", "uvicorn")


def made(folder: Path, rows: int) -> tuple[Path, Path]:
    """A run of a medium ML-DCN on a synthetic ads log, and its ONNX bundle."""
    log = folder / "log"
    write_log(log, rows, PinadsConfig(seed=0))
    raw = pinads_config(log)
    raw["model"] = {
        "embedding": {"dim": 16},
        "interaction": {"name": "mldcn", "num_layers": 3, "rank": 128},
        "deep": {"hidden": [256, 128]},
    }
    raw["training"] = {"batch_size": 1024, "epochs": 1, "checkpoint_minutes": 1e6}
    train(parse(Config, raw, "benchmark"), RunFolder(folder / "run"))
    export_run(Predictor.load(folder / "run", "cpu"), "onnx", folder / "bundle")
    return folder / "run", folder / "bundle"


class Server:
    """A server in processes of its own, stopped but for its turns.

    Args:
        name: what results call it.
        command: starts it, ``{port}`` in it.
        threads: its libraries may use.
        log: where its output goes.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        self.name = name
        self.log = log
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [each.format(port=self.port) for each in command],
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
            )

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: int) -> None:
        """Sends a signal to all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Ends it."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self.signal(number)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)

    def check(self) -> None:
        """Ends the benchmark when the server has ended."""
        if self._process.poll() is not None:
            sys.exit(f"{self.name} ended; the end of {self.log}:\n{self.log.read_text()[-3000:]}")


def servers(run: Path, bundle: Path, options: argparse.Namespace, folder: Path) -> list[Server]:
    """All sides."""
    threads = ["--threads", str(options.threads)]
    mldcn = [str(Path(sys.executable).with_name("mldcn")), "serve", str(bundle), "--no-access-log"]
    mldcn += ["--port", "{port}", "--grpc-port", "-1", *threads]
    litserve = [sys.executable, str(HERE / "litserve_side.py"), str(bundle), "{port}", *threads]
    fastapi = [sys.executable, str(HERE / "fastapi_side.py"), str(run), "{port}", *threads]
    commands = {
        "mldcn": mldcn,
        "mldcn, 2 processes": [*mldcn, "--processes", "2"],
        "litserve, batches": [*litserve, "--batch", "8"],
        "litserve, 2 workers": [*litserve, "--workers", "2"],
        "fastapi": fastapi,
        "fastapi, 2 workers": [*fastapi, "--workers", "2"],
    }
    return [
        Server(name, command, options.threads, folder / f"{i}.log")
        for i, (name, command) in enumerate(commands.items())
    ]


async def awaited(server: Server, send: Callable[[int], Awaitable[str | None]]) -> None:
    """Waits until it answers."""
    deadline = time.monotonic() + 120
    while await send(0) is not None:
        server.check()
        if time.monotonic() > deadline:
            sys.exit(f"{server.name} does not answer; see {server.log}")
        await asyncio.sleep(0.3)


async def turn(server: Server, bodies: list[bytes], options: argparse.Namespace, seed: int) -> Result:
    """The highest rate within the limit."""
    client = RankClient(Target(server.url, None, None, 10.0), "bundle", arrow=False)

    async def send(number: int) -> str | None:
        return await client.send(bodies[number % len(bodies)])

    server.signal(signal.SIGCONT)
    try:
        await awaited(server, send)
        first = await closed_loop(send, 4, 1.0, Recorder())
        # Steps of equal ratio between a seventh of what four callers in turn got, and a little more than that.
        low, high, best = first.throughput / 7, 1.15 * first.throughput, None
        rng = np.random.default_rng(seed)
        for _ in range(options.probes if seed else 1):  # the first round only warms up
            rate = (low * high) ** 0.5
            times = arrivals("poisson", rate, options.seconds, rng).tolist()
            step = await open_loop(send, times, rate, options.seconds, Recorder())
            if good(step, options.p99_ms / 1000):
                low, best = rate, step
            else:
                high = rate
            await asyncio.sleep(0.3)
        server.check()
        return {
            "requests_per_second": low,
            "p99_ms": None if best is None else 1000 * late(best),
            "p50_ms": None if best is None else 1000 * (best.latencies[50.0] or 0.0),
            "closed_loop": first.throughput,
            "met": best is not None,
        }
    finally:
        await client.close()
        server.signal(signal.SIGSTOP)


def good(step: Step, limit: float) -> bool:
    """Whether nearly all answers came in time."""
    return step.kept_up and late(step) <= limit


def late(step: Step) -> float:
    """The 99th percentile, or the longest where answers are too few to tell it."""
    p99 = step.latencies[99.0]
    return p99 if p99 is not None else step.longest or float("inf")


async def bodies_of(server: Server, log: Path, options: argparse.Namespace) -> list[bytes]:
    """Requests as every server gets them, of the log's users and candidates."""
    target = Target(server.url, None, None, 10.0)
    client = RankClient(target, "bundle", arrow=False)
    try:
        await awaited(server, lambda _: _ready(target))
        sample, _ = await target.facts()
        traffic = Traffic(sample, Candidates.parse(options.candidates), 10_000, 1.1, 0, read_log(log, sample))
        return [client.body(ask) for ask in traffic.draw(BODIES)]
    finally:
        await client.close()


async def _ready(target: Target) -> str | None:
    from mldcn.errors import UserError

    try:
        await target.facts()
    except UserError as error:
        return str(error)
    return None


async def measure(all_sides: list[Server], log: Path, options: argparse.Namespace) -> dict[str, list[Result]]:
    """Rounds of turns; the first is left out."""
    bodies = await bodies_of(all_sides[0], log, options)
    for server in all_sides:
        client = RankClient(Target(server.url, None, None, 10.0), "bundle", arrow=False)
        await awaited(server, lambda _, client=client: client.send(bodies[0]))  # type: ignore[misc]
        await client.close()
    for server in all_sides:
        server.signal(signal.SIGSTOP)
    results: dict[str, list[Result]] = {server.name: [] for server in all_sides}
    for i in range(options.rounds + 1):
        at = i % len(all_sides)
        for server in (*all_sides[at:], *all_sides[:at]):
            found = await turn(server, bodies, options, i)
            if i:
                results[server.name].append(found)
            words = "no limit" if not found["met"] else f"p99 {found['p99_ms']:.1f} ms"
            print(
                f"round {i}, {server.name}: {found['requests_per_second']:.0f} a second, {words}", flush=True
            )
    return results


def summary(results: dict[str, list[Result]]) -> Result:
    """Rates by side, and our better side over the better one of each peer, round by round."""
    rates = {name: [each["requests_per_second"] for each in found] for name, found in results.items()}

    def better(library: str) -> str:
        kinds = [name for name in rates if name.startswith(library)]
        return max(kinds, key=lambda name: float(spread(rates[name])["median"]))

    found: Result = {"requests_per_second": {name: spread(values) for name, values in rates.items()}}
    for peer in ("litserve", "fastapi"):
        ours, theirs = better("mldcn"), better(peer)
        pairs = zip(rates[ours], rates[theirs], strict=True)
        found[f"mldcn over {peer}"] = {"sides": [ours, theirs], **spread([a / b for a, b in pairs])}
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--candidates", default="lognormal:100")
    parser.add_argument("--p99-ms", type=float, default=100.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="of an earlier run of this benchmark, to be used again")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        there = (folder / "bundle").is_dir()
        run, bundle = (folder / "run", folder / "bundle") if there else made(folder, options.rows)
        log = next((folder / "log").glob("*.parquet"))
        sides = servers(run, bundle, options, folder)
        try:
            results = asyncio.run(measure(sides, log, options))
        finally:
            for side in sides:
                side.close()
    found = summary(results)
    libraries = {name: version(name) for name in LIBRARIES}
    setting: dict[str, Any] = {
        "candidates": options.candidates,
        "p99_limit_ms": options.p99_ms,
        "probes": options.probes,
        "seconds_a_probe": options.seconds,
    }
    for name, values in found["requests_per_second"].items():
        print(f"{name}: {shown(values)} requests a second at p99 of {options.p99_ms:g} ms")
    for peer in ("litserve", "fastapi"):
        print(f"mldcn over {peer}: {shown(found[f'mldcn over {peer}'], 2)}")
    report(
        {**found, **setting, "turns": results, "libraries": libraries, **machine(options.threads)},
        options.json,
    )


if __name__ == "__main__":
    main()
