"""Requests of several callers are scored together: one bounded queue, a batch whenever a worker is free."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

from mldcn.serving.encoding import Rows
from mldcn.serving.engine import Engine, Scores
from mldcn.serving.refused import Reason, Refused
from mldcn.serving.server.metrics import Metrics
from mldcn.serving.server.options import Batching
from mldcn.serving.server.tracing import Trace, current


@dataclass
class _Job:
    """Rows of one request that wait. ``weight`` is their number, at least 1; ``limits`` are its model's."""

    rows: Rows
    future: asyncio.Future[Scores]
    weight: int
    limits: Batching
    trace: Trace | None
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Scores rows in batches. All methods but the scoring itself run in one event loop.

    A batch holds requests of one engine only, so no answer mixes versions. Requests leave the queue in the order
    in which they came (by engine); one whose caller has gone or whose deadline has passed is not scored. Of an
    engine that works in two steps, a worker looks up the rows of its next batch while it computes the one before.

    Args:
        options: sizes and delays.
        pool: where batches are scored, of at least ``options.workers`` threads.
        metrics: told about queue and batches.
    """

    def __init__(self, options: Batching, pool: Executor, metrics: Metrics) -> None:
        self._options = options
        self._pool = pool
        self._look_ups = ThreadPoolExecutor(options.workers, "look-up")
        self._metrics = metrics
        self._queues: dict[Engine, deque[_Job]] = {}
        self._waiting = 0
        self._changed = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._rows_a_second = 0.0

    def start(self) -> None:
        """Begins to work."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._options.workers)]

    async def stop(self) -> None:
        """Ends the workers; what is still queued is refused."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for jobs in self._queues.values():
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(Refused(Reason.NOT_READY, "the server is stopping"))
        self._queues.clear()
        self._set_waiting(0)
        self._look_ups.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return self._waiting

    def admit(self, rows: int, limits: Batching | None = None) -> None:
        """Refuses a request for which there is no room.

        Called before the work of reading a request is done, and again when it is queued.

        Args:
            rows: of the request.
            limits: of its model, where they are other than the server's.

        Raises:
            Refused: the queue is full, or a request has waited in it for too long.
        """
        most = limits or self._options
        if self._waiting and (self._waiting + rows > most.queue_rows or self._oldest() > most.queue_seconds):
            seconds = self._waiting / self._rows_a_second if self._rows_a_second else 1.0
            raise Refused(
                Reason.BUSY, "too many requests wait already; try again later", max(1, math.ceil(seconds))
            )

    def _oldest(self) -> float:
        """Seconds that the first request of the queue has waited."""
        return time.monotonic() - min(jobs[0].arrived for jobs in self._queues.values() if jobs)

    async def score(self, engine: Engine, rows: Rows, limits: Batching | None = None) -> Scores:
        """Scores a request's rows, together with others'.

        Args:
            engine: of the request's version.
            rows: of the request.
            limits: of the engine's batches, where they are other than the server's.

        Raises:
            Refused: as by :meth:`admit`, or the server stops.
        """
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        job = _Job(rows, future, max(1, len(rows)), limits or self._options, current.get())
        self.admit(job.weight, limits)
        self._queues.setdefault(engine, deque()).append(job)
        self._set_waiting(self._waiting + job.weight)
        self._changed.set()
        return await job.future

    async def _work(self) -> None:
        """One batch is scored while the tables' rows of the next are looked up."""
        scoring: asyncio.Task[None] | None = None
        batch: list[_Job] = []
        try:
            while True:
                engine, batch = await self._take()
                if not batch:
                    continue
                begun = time.monotonic()
                for job in batch:
                    self._metrics.stages["queue"].observe(begun - job.arrived)
                    if job.trace is not None:
                        job.trace.stage("queue", job.arrived, begun)
                work: Callable[[], list[Scores]] | None
                if engine.two_steps:
                    work = await self._looked_up(engine, batch)
                else:
                    work = functools.partial(engine.score_rows, [job.rows for job in batch])
                if work is None:
                    continue
                if scoring is not None:
                    await scoring
                scoring = asyncio.create_task(self._score(batch, work, time.monotonic() - begun))
                batch = []
                if not engine.two_steps:
                    # The next batch is better cut when this one is done: more may wait by then.
                    await scoring
        except asyncio.CancelledError:
            for job in batch:
                job.future.cancel()
            if scoring is not None:
                scoring.cancel()
                await asyncio.gather(scoring, return_exceptions=True)
            raise

    async def _looked_up(self, engine: Engine, batch: list[_Job]) -> Callable[[], list[Scores]] | None:
        """The second step of a batch; None where the first one failed."""
        begun = time.monotonic()
        rows = [job.rows for job in batch]
        try:
            work = await asyncio.get_running_loop().run_in_executor(self._look_ups, engine.look_up, rows)
        except Exception as error:
            _fail(batch, error)
            return None
        took = time.monotonic() - begun
        self._metrics.stages["look_up"].observe(took)
        for job in batch:
            if job.trace is not None:
                job.trace.stage("look_up", begun, begun + took)
        return work

    async def _score(self, batch: list[_Job], work: Callable[[], list[Scores]], prepared: float) -> None:
        begun = time.monotonic()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except asyncio.CancelledError:
            for job in batch:
                job.future.cancel()
            raise
        except Exception as error:
            _fail(batch, error)
            return
        took = time.monotonic() - begun
        self._metrics.stages["score"].observe(took)
        self._metrics.batch_requests.observe(len(batch))
        self._metrics.batch_rows.observe(sum(len(job.rows) for job in batch))
        for job in batch:
            if job.trace is not None:
                job.trace.stage("score", begun, begun + took, batch_requests=len(batch))
        # The longer of two steps that overlap says how many rows a second get through.
        speed = sum(job.weight for job in batch) / max(took, prepared, 1e-6)
        self._rows_a_second = 0.9 * (self._rows_a_second or speed) + 0.1 * speed
        for job, scores in zip(batch, answers, strict=True):
            if not job.future.done():
                job.future.set_result(scores)

    async def _take(self) -> tuple[Engine, list[_Job]]:
        """The next batch: it is due when it is full or its oldest request has waited long enough."""
        while True:
            for jobs in self._queues.values():
                while jobs and jobs[0].future.done():
                    self._drop(jobs)
            for engine in [engine for engine, jobs in self._queues.items() if not jobs]:
                del self._queues[engine]
            self._changed.clear()
            if not self._queues:
                await self._changed.wait()
                continue
            engine, jobs = min(self._queues.items(), key=lambda queue: queue[1][0].arrived)
            rest = jobs[0].arrived + jobs[0].limits.delay - time.monotonic()
            if rest <= 0 or self._full(jobs):
                return engine, self._cut(jobs)
            try:
                async with asyncio.timeout(rest):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _full(self, jobs: deque[_Job]) -> bool:
        rows = 0
        for job in jobs:
            rows += job.weight
            if rows >= job.limits.rows:
                return True
        return False

    def _cut(self, jobs: deque[_Job]) -> list[_Job]:
        batch: list[_Job] = []
        rows = 0
        while jobs and (not batch or rows + jobs[0].weight <= jobs[0].limits.rows):
            job = self._drop(jobs)
            if not job.future.done():
                batch.append(job)
                rows += job.weight
        return batch

    def _drop(self, jobs: deque[_Job]) -> _Job:
        job = jobs.popleft()
        self._set_waiting(self._waiting - job.weight)
        return job

    def _set_waiting(self, rows: int) -> None:
        self._waiting = rows
        self._metrics.queue_rows.set(rows)


def _fail(batch: list[_Job], error: Exception) -> None:
    for job in batch:
        if not job.future.done():
            job.future.set_exception(error)
