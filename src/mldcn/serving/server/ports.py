"""Where a server listens: its HTTP and gRPC ports, opened, answered at and closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from mldcn.errors import UserError
from mldcn.serving.server import grpc_server, http
from mldcn.serving.server.aging import Aging
from mldcn.serving.server.options import Options
from mldcn.serving.server.reserved import Addresses, addresses, bound, joined
from mldcn.serving.server.service import Service


class Ports:
    """The two transports of a service.

    Args:
        service: what answers.
        options: of the server.
        listener: bound to the HTTP port, where other processes of the same server listen at the same ports.
    """

    def __init__(self, service: Service, options: Options, listener: socket.socket | None = None) -> None:
        self._options = options
        self._listener = listener
        self._web = _Web(self._web_config(service))
        self._rpc = (
            None
            if options.grpc_port is None
            else grpc_server.build(service, shared_port=listener is not None)
        )
        self._serving: asyncio.Task[None] | None = None

    async def open(self) -> Addresses:
        """Begins to answer.

        Raises:
            UserError: a port is taken.
        """
        listener = self._listener or bound(self._options.host, self._options.http_port, "--port")
        try:
            rpc_port = await self._open_rpc()
        except BaseException:
            listener.close()
            raise
        found = addresses(self._options, listener.getsockname()[1], rpc_port)
        self._serving = asyncio.create_task(self._web.serve([listener]))
        while not self._web.started and not self._serving.done():
            await asyncio.sleep(0.005)
        return found

    async def close(self) -> None:
        """Takes no more connections, and returns when what is under way is answered or took too long."""
        closing: list[Any] = []
        if self._serving is not None:
            self._web.should_exit = True
            closing.append(self._serving)
            if self._rpc is not None:
                closing.append(self._rpc.stop(self._options.drain_seconds))
        await asyncio.gather(*closing)

    async def _open_rpc(self) -> int | None:
        port = self._options.grpc_port
        if port is None or self._rpc is None:
            return None
        address = joined(self._options.host, port)
        tls = None
        if self._options.certificate and self._options.private_key:
            tls = self._options.certificate.read_bytes(), self._options.private_key.read_bytes()
        try:
            taken = grpc_server.listen(self._rpc, address, tls)
        except RuntimeError:
            raise UserError(f"{address}: cannot listen there; name another --grpc-port") from None
        await self._rpc.start()
        return taken

    def _web_config(self, service: Service) -> uvicorn.Config:
        tls: dict[str, Any] = {}
        if self._options.certificate and self._options.private_key:
            tls = {
                "ssl_certfile": str(self._options.certificate),
                "ssl_keyfile": str(self._options.private_key),
            }
        app = http.build(service)
        return uvicorn.Config(
            Aging(app) if self._listener else app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=2048,
            # uvicorn's 5 s close connections just as callers with pools use them again.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(self._options.drain_seconds),
            **tls,
        )


class _Web(uvicorn.Server):
    """uvicorn, which leaves the signals to the server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes none."""
        yield
