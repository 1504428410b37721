"""A load test from its first question to its result."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mldcn import __version__
from mldcn.errors import UserError
from mldcn.loadtest.clients import Client, InferClient, RankClient, Target, Transport
from mldcn.loadtest.draws import Arrivals, Candidates, arrivals
from mldcn.loadtest.loops import PERCENTILES, Recorder, Send, Step, closed_loop, open_loop, percentiles
from mldcn.loadtest.traffic import Traffic, read_log

BODIES = 500  # made beforehand and sent in turn
SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # of what callers in turn got, where no rates are given
_PAUSE = 0.3  # seconds between two steps, for queues to empty

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What ``mldcn loadtest`` is told.

    Attributes:
        url: the server.
        model: the model's name; None for the only one.
        transport: JSON or Arrow to ``/v1/rank``, or the Open Inference Protocol by gRPC.
        grpc: ``host:port``, with that transport; the URL's host and port 8001 by default.
        callers: levels of the closed loop.
        rates: of the open loop, in requests a second; None makes some of what the closed loop got.
        arrivals: of the open loop.
        seconds: of each level.
        warm_up: seconds before the first, whose answers do not count.
        candidates: ``100``, ``20-500`` or ``lognormal:100``.
        users: that ask.
        zipf: exponent of the law by which they do.
        log: a file of real rows to ask about.
        token: that the server wants.
        timeout: seconds after which a caller gives up.
        seed: of all draws.
    """

    url: str
    model: str | None = None
    transport: Transport = "json"
    grpc: str | None = None
    callers: Sequence[int] = (1, 8)
    rates: Sequence[float] | None = None
    arrivals: Arrivals = "poisson"
    seconds: float = 10.0
    warm_up: float = 2.0
    candidates: str = "lognormal:100"
    users: int = 100_000
    zipf: float = 1.1
    log: Path | None = None
    token: str | None = None
    timeout: float = 10.0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        plan: what was asked for.
        url: of the server.
        model: its name.
        versions: those that it served at the start.
        begun: when, as ISO 8601 in UTC.
        rows: mean number of candidates of a request.
        body_bytes: mean length of a request.
        steps: the levels of load, in their order.
    """

    plan: Plan
    url: str
    model: str
    versions: tuple[str, ...]
    begun: str
    rows: float
    body_bytes: float
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the token is left out."""
        plan = {name: value for name, value in asdict(self.plan).items() if name not in ("url", "token")}
        plan["log"] = None if self.plan.log is None else self.plan.log.name
        steps = [
            asdict(step)
            | {"latencies": {f"p{p:g}": step.latencies[p] for p in PERCENTILES}}
            | {"throughput": step.throughput, "kept_up": step.kept_up}
            for step in self.steps
        ]
        about = {
            name: getattr(self, name) for name in ("url", "model", "versions", "begun", "rows", "body_bytes")
        }
        machine = {"system": platform.platform(), "cores": os.cpu_count()}
        return {"mldcn": __version__, **about, "generator": machine, "plan": plan, "steps": steps}


def run(plan: Plan, tell: Tell = lambda _: None) -> Result:
    """Puts a server under load.

    Args:
        plan: how.
        tell: told once a second what is going on.

    Raises:
        UserError: the server cannot be reached, or answers no request rightly.
    """
    return asyncio.run(_run(plan, tell))


async def _run(plan: Plan, tell: Tell) -> Result:
    sizes = Candidates.parse(plan.candidates)
    target = Target(plan.url, plan.model, plan.token, plan.timeout)
    sample, metadata = await target.facts()
    log = None if plan.log is None else read_log(plan.log, sample)
    tell("making requests")
    traffic = Traffic(sample, sizes, plan.users, plan.zipf, plan.seed, log)
    asks = list(traffic.draw(BODIES))
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    client = _client(plan, target, metadata)
    try:
        bodies = [client.body(ask) for ask in asks]
        steps = await _steps(plan, _sender(client, bodies), tell)
    finally:
        await client.close()
    return Result(
        plan,
        target.url,
        metadata["name"],
        tuple(metadata["versions"]),
        begun,
        float(np.mean([ask.rows for ask in asks])),
        float(np.mean([len(body) for body in bodies])),
        tuple(steps),
    )


def _client(plan: Plan, target: Target, metadata: dict[str, Any]) -> Client:
    if plan.transport == "grpc":
        port = urlsplit(f"//{plan.grpc}").netloc if plan.grpc else f"{target.host}:8001"
        return InferClient(target, port, metadata)
    return RankClient(target, metadata["name"], arrow=plan.transport == "arrow")


def _sender(client: Client, bodies: Sequence[Any]) -> Send:
    async def send(number: int) -> str | None:
        return await client.send(bodies[number % len(bodies)])

    return send


async def _steps(plan: Plan, send: Send, tell: Tell) -> list[Step]:
    first = Recorder()
    await _told(tell, "warm-up", first, closed_loop(send, max(plan.callers, default=8), plan.warm_up, first))
    if first.errors and not first.latencies:
        kind, times = first.errors.most_common(1)[0]
        raise UserError(f"{plan.url}: no request was answered rightly; {times} times: {kind}")
    steps = []
    for callers in plan.callers:
        recorder = Recorder()
        work = closed_loop(send, callers, plan.seconds, recorder)
        steps.append(await _told(tell, f"{callers} callers", recorder, work))
    rng = np.random.default_rng(plan.seed)
    best = max((step.throughput for step in steps), default=0.0)
    rates = [share * best for share in SHARES] if plan.rates is None else plan.rates
    for rate in rates:
        if rate <= 0:
            raise UserError("--rate: requests a second, more than 0 (give --callers to have some chosen)")
        await asyncio.sleep(_PAUSE)
        recorder = Recorder()
        times = arrivals(plan.arrivals, rate, plan.seconds, rng).tolist()
        work = open_loop(send, times, rate, plan.seconds, recorder)
        steps.append(await _told(tell, f"{rate:.0f} requests a second", recorder, work))
    return steps


async def _told(tell: Tell, name: str, recorder: Recorder, work: Any) -> Any:
    """Tells once a second how far the work is."""

    async def watch() -> None:
        while True:
            tell(f"{name}: {progress(recorder)}")
            await asyncio.sleep(1.0)

    watching = asyncio.create_task(watch())
    try:
        return await work
    finally:
        watching.cancel()


def progress(recorder: Recorder) -> str:
    """How a step goes, in a line."""
    recent = list(islice(reversed(recorder.latencies), 1000))
    p99 = percentiles(recent)[99.0]
    late = "" if p99 is None else f", p99 of late {1000 * p99:.1f} ms"
    wrong = f", {recorder.errors.total()} errors" if recorder.errors else ""
    return f"{len(recorder.latencies):,} answered, {recorder.under_way} under way{late}{wrong}"
