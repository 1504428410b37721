"""The two ways to put load on a server, on the event loop's clock.

**Open loop**: requests leave at times that were drawn beforehand, whatever the server does, and a latency counts
from the time at which its request *should* have left. A server that stalls for a second so shows a second's worth
of late answers, as its users would see them; callers that wait for their answers before they ask again would show
one (coordinated omission).

**Closed loop**: so many callers, each asks as soon as it is answered. It finds out what a server can do; its
latencies are those of callers as patient.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

# Sends request number i; gives None, or the kind of the error.
Send = Callable[[int], Awaitable[str | None]]
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_UNDER_WAY = 20_000  # with more the generator would measure itself


@dataclass
class Recorder:
    """What came back, and when. Latencies are kept one by one, so that percentiles are exact."""

    latencies: array[float] = field(default_factory=lambda: array("d"))
    lags: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)
    under_way: int = 0
    sent: int = 0

    async def send(self, send: Send, number: int, intended: float) -> None:
        """Sends a request and notes its answer."""
        clock = asyncio.get_running_loop().time
        self.lags.append(clock() - intended)
        self.sent += 1
        self.under_way += 1
        try:
            error = await send(number)
        finally:
            self.under_way -= 1
        if error is None:
            self.latencies.append(clock() - intended)
        else:
            self.errors[error] += 1


@dataclass(frozen=True)
class Step:
    """One level of load.

    Attributes:
        kind: of loop.
        load: callers, or requests a second that were meant to leave.
        asked_seconds: in which requests were to leave.
        seconds: from the first request to the last answer, but at least the time that was asked for.
        sent: requests.
        answered: those answered rightly.
        errors: the others by kind.
        latencies: seconds by percentile; those that so few answers cannot tell are None.
        longest: of the latencies, in seconds; None without answers.
        lag: 99th percentile of how late the generator itself sent requests, in seconds.
    """

    kind: str
    load: float
    asked_seconds: float
    seconds: float
    sent: int
    answered: int
    errors: dict[str, int]
    latencies: dict[float, float | None]
    longest: float | None
    lag: float

    @property
    def throughput(self) -> float:
        """Right answers a second."""
        return self.answered / self.seconds

    @property
    def kept_up(self) -> bool:
        """Whether 99 % were answered, and soon after the last had left: no queue had grown."""
        return self.answered >= 0.99 * self.sent and self.seconds <= 1.1 * self.asked_seconds


def percentiles(latencies: Sequence[float]) -> dict[float, float | None]:
    """The least latency that so many per cent do not pass; None with fewer than 1 / (1 - p) answers."""
    ordered = np.sort(np.asarray(latencies, np.float64))
    found: dict[float, float | None] = {}
    for each in PERCENTILES:
        enough = ordered.size * (100.0 - each) >= 100.0 - 1e-9
        place = int(np.ceil(ordered.size * each / 100.0 - 1e-9)) - 1
        found[each] = float(ordered[place]) if enough else None
    return found


def step_of(kind: str, load: float, asked_seconds: float, took: float, recorder: Recorder) -> Step:
    """Sums up."""
    lags = np.asarray(recorder.lags)
    return Step(
        kind,
        load,
        asked_seconds,
        max(asked_seconds, took),
        recorder.sent,
        len(recorder.latencies),
        dict(recorder.errors.most_common()),
        percentiles(recorder.latencies),
        max(recorder.latencies, default=None),
        float(np.percentile(lags, 99)) if lags.size else 0.0,
    )


async def open_loop(
    send: Send, times: Sequence[float], rate: float, seconds: float, recorder: Recorder
) -> Step:
    """Sends a request at each of ``times``; ends with the last answer.

    A request for which too many others are still under way is not sent, and counts as an error.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    tasks: set[asyncio.Task[None]] = set()
    for number, offset in enumerate(times):
        rest = begun + offset - loop.time()
        # Where it is late too, others get their turn: answers must be seen when they come.
        await asyncio.sleep(max(rest, 0.0))
        if recorder.under_way >= _UNDER_WAY:
            recorder.errors["not sent, too many under way"] += 1
            recorder.sent += 1
            continue
        task = loop.create_task(recorder.send(send, number, begun + offset))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return step_of("open", rate, seconds, loop.time() - begun, recorder)


async def closed_loop(send: Send, callers: int, seconds: float, recorder: Recorder) -> Step:
    """Has callers ask again and again; ends with their last answers."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    numbers = count()

    async def call() -> None:
        while loop.time() < begun + seconds:
            await recorder.send(send, next(numbers), loop.time())

    await asyncio.gather(*(call() for _ in range(callers)))
    return step_of("closed", callers, seconds, loop.time() - begun, recorder)
