"""One of the processes that answer for a server of several; the supervising process tells it what to do."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Collection, Sequence
from typing import Any

import torch

from mldcn.errors import UserError
from mldcn.serving.refused import Reason, Refused
from mldcn.serving.server.calls import write_logs
from mldcn.serving.server.channel import Channel, ChannelClosed
from mldcn.serving.server.options import Options
from mldcn.serving.server.repository import Prepared, parse_path
from mldcn.serving.server.server import Server
from mldcn.serving.server.totals import Family, snapshot


def work(end: socket.socket, models: Sequence[str], options: Options, listener: socket.socket) -> None:
    """The life of a worker process.

    Args:
        end: of a connection with the supervising process.
        models: as the command line names them.
        options: of the server, with its ports.
        listener: bound to the HTTP port.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the supervisor acts on them
        signal.signal(number, signal.SIG_IGN)
    write_logs(requests=options.access_log)
    if options.threads_each is not None:
        torch.set_num_threads(options.threads_each)
    asyncio.run(_Worker(models, options, listener).run(end))


class _Worker:
    """A server that opens its ports, loads and switches when it is told to; the fleet as its service sees it."""

    def __init__(self, models: Sequence[str], options: Options, listener: socket.socket) -> None:
        paths = [parse_path(model) for model in models]
        self._server = Server(paths, options, fleet=self, listener=listener)
        self._channel: Channel | None = None
        self._prepared: Prepared | None = None
        self._open = False

    async def run(self, end: socket.socket) -> None:
        """Answers until SIGTERM, or until the supervising process is gone."""
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        handlers = {each.__name__: each for each in (self.open, self.prepare, self.switch, self.counts)}
        self._channel = await Channel.open(end, handlers)
        waiting = [asyncio.create_task(event.wait()) for event in (stop, self._channel.closed)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await self._server.drain()
        self._channel.close()

    async def open(self) -> None:
        """Begins to listen."""
        if not self._open:
            self._open = True
            await self._server.open()

    async def prepare(self, hidden: Collection[str], strict: bool, again: bool) -> dict[str, Any]:
        """Loads what is in the folders now and says what that is."""
        self._prepared = await self._server.repository.prepare(hidden, strict=strict, again=again)
        versions = [
            (version.model, version.label)
            for versions in self._prepared.models.values()
            for version in versions
        ]
        return {"contents": self._prepared.contents, "versions": versions}

    async def switch(self) -> None:
        """Serves what was prepared last."""
        assert self._prepared is not None
        self._server.repository.switch(self._prepared)
        self._server.repository.ready = True
        await self.open()

    async def counts(self) -> list[Family]:
        """What was counted up to now."""
        return snapshot(self._server.metrics.registry)

    async def show(self, model: str) -> None:
        """Asks for a model in all processes."""
        await self._ask("show", model=model)
        self._server.repository.check_shown(model)

    async def hide(self, model: str) -> None:
        """Asks that no process serves a model."""
        self._server.repository.pick(model)
        await self._ask("hide", model=model)

    async def metrics_text(self) -> bytes:
        """The metrics of all processes."""
        text: str = await self._ask("metrics")
        return text.encode()

    async def _ask(self, name: str, **arguments: Any) -> Any:
        assert self._channel is not None
        try:
            return await self._channel.call(name, **arguments)
        except ChannelClosed:
            raise Refused(Reason.NOT_READY, "the server is stopping") from None
        except UserError as error:
            raise Refused(Reason.NOT_READY, str(error), retry_after=1) from None
