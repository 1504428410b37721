"""``Supervisor``: several processes that answer at the same ports, and one that starts, guards and leads them.

The leading process computes nothing and holds no model. It decides when a version is served: first all processes
load it, then all are told to switch. It does without PyTorch; the others are forked from a process that has
imported it, and share its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from typing import Any

from mldcn.errors import UserError
from mldcn.serving.server.channel import Channel, ChannelClosed, Handler
from mldcn.serving.server.options import Options, check_options
from mldcn.serving.server.reserved import Addresses, addresses, reserved
from mldcn.serving.server.signals import take_signals
from mldcn.serving.server.totals import Family, Totals

log = logging.getLogger("mldcn.serving")

WATCH_SECONDS = 5.0  # between two looks at the workers
COUNTS_SECONDS = 2.0  # the longest wait for a worker's counts
SILENT_SECONDS = 60.0  # a worker that does not answer for so long is replaced
STEADY_SECONDS = 10.0  # a worker that has answered for so long did not fail at its start
ATTEMPTS = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


@dataclass(eq=False)
class _Worker:
    """A process. ``ready_since`` is None until it answers requests; ``heard`` is when it last answered us."""

    place: int
    process: ForkServerProcess
    channel: Channel
    ready_since: float | None = None
    heard: float = field(default_factory=time.monotonic)
    counts: list[Family] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Serves models with several processes until it is told to stop.

    Args:
        models: as the command line names them.
        options: how.
    """

    def __init__(self, models: Sequence[str], options: Options) -> None:
        check_options(options)
        self._names = list(models)
        self._options = options
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mldcn.serving.server.worker"])
        self._workers: list[_Worker] = []
        self._prepared: dict[_Worker, dict[str, Any]] = {}
        self._served: dict[str, Any] | None = None  # what all processes serve; None before the first switch
        self._hidden: frozenset[str] = frozenset()
        self._totals = Totals()
        self._restarts = 0
        self._stopping = False
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def models(self) -> list[str]:
        """Names of the models that are served."""
        return list(dict.fromkeys(model for model, _ in (self._served or {"versions": []})["versions"]))

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that answer."""
        return [each.process.pid for each in self._ready() if each.process.pid is not None]

    def run(
        self,
        listening: Callable[[Addresses], None] = lambda _: None,
        ready: Callable[[Addresses], None] = lambda _: None,
    ) -> None:
        """Serves until SIGTERM, SIGINT or :meth:`stop`; then all processes answer what is under way.

        Args:
            listening: called when a process listens; probes are answered then.
            ready: called when all processes answer.

        Raises:
            UserError: a port is taken, a model cannot be loaded, or processes end again and again at their start.
        """
        asyncio.run(self._supervise(listening, ready))

    def stop(self) -> None:
        """Begins to drain; may be called by another thread."""
        if self._stop is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _supervise(
        self, listening: Callable[[Addresses], None], ready: Callable[[Addresses], None]
    ) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._lock = asyncio.Lock()
        self._starting = asyncio.Lock()
        self._listening, self._all_ready = asyncio.Event(), asyncio.Event()
        take_signals(self._stop, self._refresh)
        with reserved(self._options) as self._shared:
            taken = self._shared.options
            at = addresses(taken, taken.http_port, taken.grpc_port)
            keeping = [asyncio.create_task(self._keep(place)) for place in range(self._options.processes)]
            beside = [
                asyncio.create_task(each)
                for each in (
                    self._announce(self._listening, lambda: listening(at)),
                    self._announce(self._all_ready, lambda: ready(at)),
                    self._watch(),
                    self._poll(),
                )
            ]
            stopping: asyncio.Task[Any] = asyncio.create_task(self._stop.wait())
            try:
                done, _ = await asyncio.wait({stopping, *keeping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in beside:
                    task.cancel()
                await self._end(keeping)
            for task in done:
                task.result()

    async def _announce(self, event: asyncio.Event, tell: Callable[[], None]) -> None:
        await event.wait()
        tell()

    async def _end(self, keeping: Sequence[asyncio.Task[None]]) -> None:
        """Lets every process drain; ends those that take too long."""
        assert self._stop is not None
        self._stopping = True
        self._stop.set()
        for worker in self._workers:
            worker.process.terminate()
        async with self._starting:
            self._shared.listener.close()  # connections are refused once no process listens any more
        longest = self._options.shutdown_delay + self._options.drain_seconds + 5
        _, late = await asyncio.wait(keeping, timeout=longest)
        if late:
            for worker in self._workers:
                log.error("worker %d took longer than %g s to stop", worker.place, longest)
                worker.process.kill()
        await asyncio.gather(*keeping, return_exceptions=True)

    # One worker's life

    async def _keep(self, place: int) -> None:
        """Keeps a worker in a place: another whenever one ends."""
        assert self._stop is not None
        failures = 0
        while True:
            worker = await self._start(place)
            joining = asyncio.create_task(self._join(worker))
            await asyncio.gather(joining, return_exceptions=True)
            error = joining.exception()
            if error is not None and not isinstance(error, ChannelClosed):
                worker.process.kill()
                if not isinstance(error, UserError):
                    log.error("worker %d cannot be started", place, exc_info=error)
            await worker.gone.wait()
            self._forget(worker)
            if self._stopping:
                return
            if isinstance(error, UserError):
                if self._served is None:
                    raise error
                log.error("worker %d cannot serve as the others do: %s", place, error)
            steady = worker.ready_since is not None and time.monotonic() - worker.ready_since > STEADY_SECONDS
            failures = 0 if steady else failures + 1
            how = _how(worker.process.exitcode)
            if failures >= ATTEMPTS and not self._ready():
                raise UserError(
                    f"worker {place} ended {failures} times in a row soon after its start, the last time {how}; "
                    "see the log, or serve with --processes 1"
                )
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) if failures else 0.0
            log.error(
                "worker %d (process %s) ended, %s; another starts in %g s",
                place,
                worker.process.pid,
                how,
                pause,
            )
            self._restarts += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()
            if self._stopping:
                return

    async def _start(self, place: int) -> _Worker:
        async with self._starting:
            if self._stopping:
                raise ChannelClosed
            ours, theirs = socket.socketpair()
            process = self._context.Process(
                target=_work,
                args=(theirs, self._names, self._shared.options, self._shared.listener),
                name=f"mldcn-serve-{place}",
                daemon=True,
            )
            await asyncio.to_thread(process.start)
        theirs.close()
        handlers: dict[str, Handler] = {"show": self._show, "hide": self._hide, "metrics": self._metrics}
        worker = _Worker(place, process, await Channel.open(ours, handlers))
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(process.sentinel)
            worker.gone.set()

        loop.add_reader(process.sentinel, ended)
        self._workers.append(worker)
        if self._stopping:
            process.terminate()
        return worker

    async def _join(self, worker: _Worker) -> None:
        """Brings a worker to where it answers as all others do.

        At the first start it listens at once, so that probes are answered, and all begin to answer together.
        Later the others answer, and it listens when it is warm.
        """
        if self._served is None:
            await worker.channel.call("open")
            self._listening.set()
        found = await worker.channel.call("prepare", hidden=sorted(self._hidden), strict=True, again=False)
        async with self._lock:
            if self._served is None:
                self._prepared[worker] = found
                if len(self._prepared) == self._options.processes:
                    await self._agree(list(self._prepared), self._hidden)  # loads nothing twice
            elif found == self._served:
                await self._switch([worker], found, self._hidden)
            else:
                log.info(
                    "the models' folders have changed; all workers load what worker %d found", worker.place
                )
                await self._agree([*self._ready(), worker], self._hidden)
            if len(self._ready()) == self._options.processes:
                self._all_ready.set()

    def _forget(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._prepared.pop(worker, None)
        worker.channel.close()
        worker.process.join()
        self._totals.end(worker.counts)

    def _ready(self) -> list[_Worker]:
        return [each for each in self._workers if each.ready_since is not None and not each.gone.is_set()]

    # What all workers serve

    async def _agree(
        self, workers: Sequence[_Worker], hidden: Collection[str], *, again: bool = False
    ) -> None:
        """All load what the folders hold, then all switch to it. Called under the lock.

        Raises:
            UserError: they found different contents, or one failed; nothing has changed then.
        """
        found: dict[_Worker, dict[str, Any]] = {}
        for _ in range(2):  # a folder may have been replaced between one's look and another's
            found = await _answers(workers, "prepare", hidden=sorted(hidden), strict=False, again=again)
            if all(each == next(iter(found.values())) for each in found.values()):
                break
        else:
            raise UserError("the server's processes do not find the same content; the versions before stay")
        if not found:
            return
        content = next(iter(found.values()))
        late = [worker for worker in found if worker.ready_since is None or content != self._served]
        if late or hidden != self._hidden:
            await self._switch(list(found), content, hidden)

    async def _switch(
        self, workers: Sequence[_Worker], content: dict[str, Any], hidden: Collection[str]
    ) -> None:
        self._served, self._hidden = content, frozenset(hidden)
        self._totals.forget({(model, version) for model, version in content["versions"]})

        async def one(worker: _Worker) -> None:
            try:
                await worker.channel.call("switch")
                worker.ready_since = worker.ready_since or time.monotonic()
            except ChannelClosed:
                pass  # its successor starts with this content
            except UserError as error:
                log.error("worker %d cannot switch and is replaced: %s", worker.place, error)
                worker.process.kill()

        await asyncio.gather(*(one(worker) for worker in workers))

    async def _refresh(self) -> None:
        if self._served is None:
            return
        try:
            async with self._lock:
                await self._agree(self._ready(), self._hidden)
        except UserError as error:
            log.error("%s", error)

    async def _poll(self) -> None:
        while self._options.control == "poll":
            await asyncio.sleep(self._options.poll_seconds)
            await self._refresh()

    async def _show(self, model: str) -> None:
        async with self._lock:
            await self._agree(self._ready(), self._hidden - {model}, again=True)

    async def _hide(self, model: str) -> None:
        async with self._lock:
            await self._agree(self._ready(), self._hidden | {model})

    # What is known of all workers

    async def _watch(self) -> None:
        """Takes each worker's counts now and then, lest they end with it; replaces a worker that hangs."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self._count()
            for worker in self._ready():
                if time.monotonic() - worker.heard > SILENT_SECONDS:
                    log.error("worker %d does not answer and is replaced", worker.place)
                    worker.process.kill()

    async def _count(self) -> None:
        async def one(worker: _Worker) -> None:
            with contextlib.suppress(ChannelClosed, UserError, TimeoutError):
                async with asyncio.timeout(COUNTS_SECONDS):
                    worker.counts = await worker.channel.call("counts")
                worker.heard = time.monotonic()

        await asyncio.gather(*(one(worker) for worker in self._workers))

    async def _metrics(self) -> str:
        await self._count()
        own: list[Family] = [
            (
                "mldcn_workers",
                "Processes that answer.",
                "gauge",
                [("mldcn_workers", {}, float(len(self._ready())))],
            ),
            (
                "mldcn_worker_restarts",
                "Processes that ended unbidden and were started again.",
                "counter",
                [("mldcn_worker_restarts_total", {}, float(self._restarts))],
            ),
        ]
        return self._totals.text([each.counts for each in self._workers], own).decode()


def _work(*arguments: Any) -> None:
    # In the worker's process: what it imports the supervisor does without.
    from mldcn.serving.server.worker import work

    work(*arguments)


async def _answers(workers: Sequence[_Worker], name: str, **arguments: Any) -> dict[_Worker, Any]:
    """The answers of those who live.

    Raises:
        UserError: one failed.
    """
    found = await asyncio.gather(
        *(worker.channel.call(name, **arguments) for worker in workers), return_exceptions=True
    )
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, ChannelClosed):
            raise each
    return {
        worker: each
        for worker, each in zip(workers, found, strict=True)
        if not isinstance(each, BaseException)
    }


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"with exit code {exit_code}"
    try:
        return f"by signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"by signal {-exit_code}"
