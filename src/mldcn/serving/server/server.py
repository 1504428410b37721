"""``Server``: one process of ``mldcn serve``, from the first listening to the last answer."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mldcn.serving.server.latency import tuned
from mldcn.serving.server.metrics import Metrics, RemoteRows
from mldcn.serving.server.options import Options, check_options
from mldcn.serving.server.ports import Ports
from mldcn.serving.server.repository import Repository, Tune
from mldcn.serving.server.reserved import Addresses
from mldcn.serving.server.service import Fleet, Service
from mldcn.serving.server.signals import take_signals

log = logging.getLogger("mldcn.serving")


def _tune(options: Options) -> Tune | None:
    budget = options.latency
    if budget is None:
        return None
    return lambda name, engine: tuned(name, engine, options.batching, budget)


class Server:
    """Serves models until it is told to stop.

    Args:
        roots: names (None: the folder's) and folders of models.
        options: how.
        fleet: the processes that share its ports; None: there is no other.
        listener: bound to the HTTP port that they share.
    """

    def __init__(
        self,
        roots: Sequence[tuple[str | None, Path]],
        options: Options,
        fleet: Fleet | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        check_options(options)
        self.options = options
        self.metrics = Metrics()
        self.repository = Repository(
            roots, options.device, options.canary, _tune(options), self._changed, options.tables
        )
        if options.tables is not None:
            self.metrics.registry.register(RemoteRows(self._table_rows))
        self._fleet = fleet
        self._listener = listener
        self._service: Service | None = None
        self._ports: Ports | None = None
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def models(self) -> list[str]:
        """Names of the models that are served."""
        return list(self.repository.models)

    def run(
        self,
        listening: Callable[[Addresses], None] = lambda _: None,
        ready: Callable[[Addresses], None] = lambda _: None,
    ) -> None:
        """Serves until SIGTERM, SIGINT or :meth:`stop`; then answers what is under way.

        Args:
            listening: called when the ports are open; probes are answered then.
            ready: called when the models are loaded and warmed up.

        Raises:
            UserError: a port is taken, or a model cannot be loaded.
        """
        asyncio.run(self._serve(listening, ready))

    def stop(self) -> None:
        """Begins to drain; may be called by another thread."""
        if self._stop is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)

    async def open(self) -> Addresses:
        """Begins to listen, in the running event loop.

        Raises:
            UserError: a port is taken.
        """
        self._service = Service(self.repository, self.options, self.metrics, self._fleet)
        self._ports = Ports(self._service, self.options, self._listener)
        self._service.start()
        return await self._ports.open()

    async def drain(self) -> None:
        """Not ready at once, no new connections a little later, and an answer to everything that is under way."""
        if self._service is None or self._ports is None:
            return
        self._service.stopping = True
        await asyncio.sleep(self.options.shutdown_delay)
        await self._ports.close()
        await self._service.stop()

    async def _serve(
        self, listening: Callable[[Addresses], None], ready: Callable[[Addresses], None]
    ) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        take_signals(self._stop, self._refresh)
        background: set[asyncio.Task[None]] = set()
        try:
            addresses = await self.open()
            listening(addresses)
            loading = asyncio.create_task(self.repository.load())
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                ready(addresses)
                if self.options.control == "poll":
                    background.add(asyncio.create_task(self._poll()))
            await stopping
        finally:
            for task in background:
                task.cancel()
            await self.drain()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.options.poll_seconds)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            await self.repository.refresh()
        except Exception:
            log.exception("the models' folders cannot be looked at")

    def _table_rows(self) -> Iterator[tuple[str, str, dict[str, int]]]:
        for model, versions in self.repository.models.items():
            for each in versions:
                if each.engine.remote is not None:
                    yield model, each.label, each.engine.remote.asked()

    def _changed(self, model: str, version: str | None, result: str) -> None:
        if result == "dropped" and version is not None:
            self.metrics.forget(model, version)
            return
        if version is not None:
            self.metrics.serve(model, version)
        self.metrics.loads.labels(model, result).inc()
