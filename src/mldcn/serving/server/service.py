"""What the server does for a request, whichever transport it came by."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from mldcn import __version__
from mldcn.errors import UserError
from mldcn.serving.encoding import Rows
from mldcn.serving.engine import Scores
from mldcn.serving.refused import Reason, Refused, invalid
from mldcn.serving.server import effects, ranking, wire
from mldcn.serving.server.batching import Batcher
from mldcn.serving.server.metrics import Metrics
from mldcn.serving.server.options import Options
from mldcn.serving.server.repository import Repository, Version
from mldcn.serving.server.request_log import Asked, RequestLog
from mldcn.serving.server.tracing import Trace, Tracing, current

log = logging.getLogger("mldcn.serving")

NAME = "mldcn"
EXTENSIONS = ("binary_tensor_data", "model_repository")
SMALL_ROWS = 64  # encoded in the event loop: to hand them to a thread costs more


class Fleet(Protocol):
    """What concerns all processes of a server."""

    async def show(self, model: str) -> None:
        """Looks at a model's folder again; all processes answer by what is there when this returns."""

    async def hide(self, model: str) -> None:
        """Serves a model no more."""

    async def metrics_text(self) -> bytes:
        """The metrics of all."""


class Alone:
    """A server of one process.

    Args:
        repository: its models.
        metrics: its counters.
    """

    def __init__(self, repository: Repository, metrics: Metrics) -> None:
        self.show = repository.show
        self.hide = repository.hide
        self._metrics = metrics

    async def metrics_text(self) -> bytes:
        """The metrics."""
        return self._metrics.text()


class Service:
    """The server but for its sockets.

    Args:
        repository: the models.
        options: of the server.
        metrics: told about everything.
        fleet: the processes that answer beside this one; None: there is no other.
    """

    def __init__(
        self, repository: Repository, options: Options, metrics: Metrics, fleet: Fleet | None = None
    ) -> None:
        self.repository = repository
        self.options = options
        self.metrics = metrics
        self.fleet = fleet or Alone(repository, metrics)
        # Encoding has threads of its own, so that a batch never waits for the reading of a later one.
        self._encoders = ThreadPoolExecutor(options.batching.workers, "encode")
        self._scorers = ThreadPoolExecutor(options.batching.workers, "score")
        self._batcher = Batcher(options.batching, self._scorers, metrics)
        self._tracing = Tracing.from_environment() if options.traces else None
        self._request_log = None
        if options.request_log is not None:
            name = f"{socket.gethostname()}-{os.getpid()}"
            self._request_log = RequestLog(options.request_log, self._count_logged, name)
        self._round: float | None = None
        self.stopping = False

    def start(self) -> None:
        """Begins to score."""
        self._batcher.start()

    async def stop(self) -> None:
        """Ends; what is not scored yet is refused."""
        await self._batcher.stop()
        for pool in (self._encoders, self._scorers):
            pool.shutdown(wait=False, cancel_futures=True)
        for last in (self._tracing, self._request_log):
            if last is not None:
                await asyncio.to_thread(last.close)

    @property
    def version(self) -> str:
        """The server's."""
        return __version__

    @property
    def ready(self) -> bool:
        """Whether requests are wanted."""
        return self.repository.ready and not self.stopping

    def check_ready(self) -> None:
        """Refuses a request before the models are loaded. Those that come while the server drains are answered."""
        if not self.repository.ready:
            raise Refused(Reason.NOT_READY, "the models are being loaded", retry_after=1)

    def is_ready(self, model: str, label: str) -> bool:
        """Whether a version answers."""
        try:
            self.repository.pick(model, label)
        except Refused:
            return False
        return self.ready

    def admit(self) -> None:
        """Refuses a request at once when too many wait, before its body is read into values.

        Those that wait to be read are in no queue of ours: they came together, in one round of the event loop, and
        the last of them would wait until all others are read. The time since the round's first one tells.
        """
        self.check_ready()
        now = time.monotonic()
        if self._round is None:
            self._round = now
            asyncio.get_running_loop().call_soon(self._end_round)
        elif now - self._round > min(self._lags(), default=self.options.batching.lag):
            raise Refused(Reason.BUSY, "too many requests wait already; try again later", 1)
        self._batcher.admit(1)

    def _end_round(self) -> None:
        self._round = None

    def _lags(self) -> Iterator[float]:
        for versions in self.repository.models.values():
            for version in versions:
                yield (version.batching or self.options.batching).lag

    def trace(self, headers: Mapping[str, str]) -> Trace | None:
        """Begins the span of the request that this task answers, where spans are made."""
        if self._tracing is None:
            return None
        trace = self._tracing.begin(headers)
        current.set(trace)
        return trace

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time of a stage."""
        begun = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.metrics.stages[name].observe(ended - begun)
            trace = current.get()
            if trace is not None:
                trace.stage(name, begun, ended)

    async def infer(self, request: wire.InferRequest, request_id: str) -> tuple[Version, Scores]:
        """Scores the rows of a protocol's request.

        Args:
            request: the request.
            request_id: the transport's; the request's own goes before it.

        Raises:
            Refused: it is not answered.
        """
        version = self.repository.pick(request.model, request.version, request.routing_key)
        wire.output_names(version.engine, request.outputs)
        rows = max((tensor.shape[0] for tensor in request.tensors), default=0)

        columns: dict[str, Sequence[Any]] = {}

        def encode() -> Rows:
            columns.update(wire.columns_of(request.tensors, version.engine, self.options.limits))
            return version.engine.encode(columns)

        scores = await self._score(version, encode, rows, request.timeout)
        self._log(request.id or request_id, version, Asked(columns), scores)
        return version, scores

    async def rank(
        self, request: ranking.RankHead, candidates: Mapping[str, Sequence[Any]], request_id: str
    ) -> tuple[Version, ranking.Ranked]:
        """Ranks the candidates of a request.

        Args:
            request: the request but for its candidates.
            candidates: their values by column.
            request_id: the transport's; the request's own goes before it.

        Raises:
            Refused: it is not answered.
        """
        rows = ranking.check(request, candidates, self.options.limits)
        version = self.repository.pick(request.model, request.version, request.routing_key)
        constant = ranking.constant_of(request)
        tasks = version.engine.tasks
        if not rows:
            return version, ranking.ranked(request, tasks, Scores(np.zeros((0, len(tasks)), np.float32)))
        timeout = None if request.timeout_ms is None else request.timeout_ms / 1000

        def encode() -> Rows:
            return version.engine.encode_rank(constant, candidates)

        scores = await self._score(version, encode, rows, timeout)
        self._log(request.id or request_id, version, Asked(candidates, constant), scores)
        return version, ranking.ranked(request, tasks, scores)

    async def effects(
        self, request: effects.EffectsRequest, candidates: Mapping[str, Sequence[Any]]
    ) -> tuple[Version, effects.Effects]:
        """Ranks the candidates of a request, and finds what moved their scores.

        Raises:
            Refused: it is not answered.
        """
        version = self.repository.pick(request.model, request.version, request.routing_key)
        groups = effects.groups_of(version.engine, request.by)
        rows, columns = effects.rows_of(request, candidates, groups, self.options.limits)
        tasks = version.engine.tasks

        def encode() -> Rows:
            return version.engine.encode(columns)

        timeout = None if request.timeout_ms is None else request.timeout_ms / 1000
        # Rows with values left out are no traffic: they would be seen as drift.
        scores = await self._score(version, encode, rows * (1 + len(groups)), timeout, counted=False)
        return version, effects.effects_of(request, tasks, groups, scores, rows)

    def index(self) -> list[dict[str, str]]:
        """The versions that are served."""
        return [
            {"name": version.model, "version": version.label, "state": "READY", "reason": ""}
            for versions in self.repository.models.values()
            for version in versions
        ]

    async def load(self, model: str) -> None:
        """Looks at a model's folder again, where callers may ask for it.

        Raises:
            Refused: they may not, or it cannot be loaded.
        """
        self._check_control()
        await self.fleet.show(model)

    async def unload(self, model: str) -> None:
        """Serves a model no more, where callers may ask for it.

        Raises:
            Refused: they may not, or there is no such model.
        """
        self._check_control()
        await self.fleet.hide(model)

    def _log(self, request_id: str, version: Version, asked: Asked, scores: Scores) -> None:
        if self._request_log is not None and self._request_log.wants(request_id):
            self._request_log.take(request_id, version, asked, scores)

    def _count_logged(self, result: str, requests: int) -> None:
        self.metrics.logged.labels(result).inc(requests)

    def _check_control(self) -> None:
        if self.options.control != "explicit":
            raise Refused(Reason.FORBIDDEN, "callers may not load models; the server was not started for it")

    async def _score(
        self,
        version: Version,
        encode: Callable[[], Rows],
        rows: int,
        timeout: float | None,
        *,
        counted: bool = True,
    ) -> Scores:
        longest = self.options.limits.seconds
        try:
            async with asyncio.timeout(longest if timeout is None else min(timeout, longest)):
                with self.stage("encode"):
                    encoded = await self._encoded(encode, rows)
                scores = await self._batcher.score(version.engine, encoded, version.batching)
        except TimeoutError:
            raise Refused(Reason.LATE, "the deadline has passed") from None
        if not np.isfinite(scores.probabilities).all():
            log.error("model %s, version %s: a score is no number", version.model, version.label)
            raise Refused(Reason.INTERNAL, "a score is no number")
        if counted:
            self.metrics.scored(version.model, version.label, version.engine.tasks, scores)
        return scores

    async def _encoded(self, encode: Callable[[], Rows], rows: int) -> Rows:
        try:
            if rows <= SMALL_ROWS:
                return encode()
            return await asyncio.get_running_loop().run_in_executor(self._encoders, encode)
        except UserError as error:
            raise invalid(str(error)) from None
