"""Calls between two processes over a socket: JSON, each behind its length; either side may call the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mldcn.errors import UserError
from mldcn.serving.refused import Reason, Refused

log = logging.getLogger("mldcn.serving")

Handler = Callable[..., Awaitable[Any]]


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """One end.

    A handler's UserError and Refused are raised again where the call was made; what else it raises is logged where
    it arose.

    Args:
        reader: of the socket.
        writer: of the socket.
        handlers: what the other side may call, by name.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: Mapping[str, Handler]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._handlers = handlers
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._last = 0
        self._answering: set[asyncio.Task[None]] = set()
        self.closed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, end: socket.socket, handlers: Mapping[str, Handler]) -> Channel:
        """The channel of a connected socket."""
        end.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(reader, writer, handlers)

    async def call(self, name: str, **arguments: Any) -> Any:
        """What the other side's handler returns.

        Raises:
            ChannelClosed: it is gone, or went before it answered.
            UserError: its handler raised it.
            Refused: its handler raised it.
        """
        if self.closed.is_set():
            raise ChannelClosed(name)
        self._last += 1
        number = self._last
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answered
        try:
            self._send({"call": name, "number": number, "arguments": arguments})
            return await answered
        finally:
            del self._waiting[number]

    def close(self) -> None:
        """Ends it."""
        self._reading.cancel()
        self._end()

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self._writer.write(len(data).to_bytes(8, "big") + data)

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                size = int.from_bytes(await self._reader.readexactly(8), "big")
                message = json.loads(await self._reader.readexactly(size))
                if "call" in message:
                    task = asyncio.create_task(self._answer(message))
                    self._answering.add(task)
                    task.add_done_callback(self._answering.discard)
                else:
                    self._take(message)
        self._end()

    def _take(self, message: dict[str, Any]) -> None:
        answered = self._waiting.get(message["number"])
        if answered is None or answered.done():
            return  # nobody waits any more
        if "error" not in message:
            answered.set_result(message["result"])
        elif message["reason"] is None:
            answered.set_exception(UserError(message["error"]))
        else:
            answered.set_exception(Refused(Reason[message["reason"]], message["error"]))

    async def _answer(self, message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"number": message["number"]}
        try:
            answer["result"] = await self._handlers[message["call"]](**message["arguments"])
        except UserError as error:
            answer |= {"error": str(error), "reason": None}
        except Refused as error:
            answer |= {"error": str(error), "reason": error.reason.name}
        except Exception as error:
            log.exception("%s between the server's processes failed", message["call"])
            answer |= {"error": f"{type(error).__name__}; see the log", "reason": None}
        self._send(answer)

    def _end(self) -> None:
        self.closed.set()
        for answered in self._waiting.values():
            if not answered.done():
                answered.set_exception(ChannelClosed())
        self._writer.close()
