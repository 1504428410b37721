"""``Server``: sockets, models and signals of ``mldcn serve``, from the first listening to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from mldcn.errors import UserError
from mldcn.serving import grpc_server, http
from mldcn.serving.metrics import Metrics
from mldcn.serving.options import Options
from mldcn.serving.repository import Repository
from mldcn.serving.service import Service

log = logging.getLogger("mldcn.serving")


@dataclass(frozen=True)
class Addresses:
    """Where a server listens: a URL, and ``host:port`` for gRPC."""

    http: str
    grpc: str | None


class Server:
    """Serves models until it is told to stop.

    Args:
        roots: names (None: the folder's) and folders of models.
        options: how.
    """

    def __init__(self, roots: Sequence[tuple[str | None, Path]], options: Options) -> None:
        check_options(options)
        self.options = options
        self.metrics = Metrics()
        self.repository = Repository(roots, options.device, options.canary, self._changed)
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

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

    async def _serve(
        self, listening: Callable[[Addresses], None], ready: Callable[[Addresses], None]
    ) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        service = Service(self.repository, self.options, self.metrics)
        with self._listener() as listener:
            web = _Web(self._web_config(service))
            rpc, rpc_address = self._rpc(service)
            service.start()
            if rpc is not None:
                await rpc.start()
            serving = asyncio.create_task(web.serve([listener]))
            scheme = "https" if self.options.certificate else "http"
            addresses = Addresses(f"{scheme}://{_joined(*listener.getsockname()[:2])}", rpc_address)
            self._take_signals(self._stop)
            background: set[asyncio.Task[None]] = set()
            try:
                while not web.started and not serving.done():
                    await asyncio.sleep(0.005)
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
                await self._drain(service, web, serving, rpc)

    async def _drain(self, service: Service, web: _Web, serving: asyncio.Task[None], rpc: Any) -> None:
        """Not ready at once, no new connections a little later, and an answer to everything that is under way."""
        service.stopping = True
        await asyncio.sleep(self.options.shutdown_delay)
        web.should_exit = True
        closing = [serving] if rpc is None else [serving, rpc.stop(self.options.drain_seconds)]
        await asyncio.gather(*closing)
        await service.stop()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.options.poll_seconds)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            await self.repository.refresh()
        except Exception:
            log.exception("the models' folders cannot be looked at")

    def _take_signals(self, stop: asyncio.Event) -> None:
        assert self._loop is not None
        loop = self._loop
        pending: set[asyncio.Task[None]] = set()

        def refresh() -> None:
            task = loop.create_task(self._refresh())
            pending.add(task)
            task.add_done_callback(pending.discard)

        with contextlib.suppress(RuntimeError, ValueError):  # only the main thread takes signals
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
            loop.add_signal_handler(signal.SIGHUP, refresh)

    @contextlib.contextmanager
    def _listener(self) -> Iterator[socket.socket]:
        host, port = self.options.host, self.options.http_port
        try:
            listener = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
            )
        except OSError as error:
            raise UserError(
                f"{_joined(host, port)}: cannot listen there ({error.strerror or error}); name another --port"
            ) from None
        with listener:
            yield listener

    def _web_config(self, service: Service) -> uvicorn.Config:
        tls: dict[str, Any] = {}
        if self.options.certificate and self.options.private_key:
            tls = {
                "ssl_certfile": str(self.options.certificate),
                "ssl_keyfile": str(self.options.private_key),
            }
        return uvicorn.Config(
            http.build(service),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            # uvicorn's 5 s close connections just as callers with pools use them again.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(self.options.drain_seconds),
            **tls,
        )

    def _rpc(self, service: Service) -> tuple[Any, str | None]:
        port = self.options.grpc_port
        if port is None:
            return None, None
        address = _joined(self.options.host, port)
        server = grpc_server.build(service)
        tls = None
        if self.options.certificate and self.options.private_key:
            tls = self.options.certificate.read_bytes(), self.options.private_key.read_bytes()
        try:
            taken = grpc_server.listen(server, address, tls)
        except RuntimeError:
            raise UserError(f"{address}: cannot listen there; name another --grpc-port") from None
        return server, _joined(self.options.host, taken)

    def _changed(self, model: str, version: str | None, result: str) -> None:
        if result == "dropped" and version is not None:
            self.metrics.forget(model, version)
            return
        if version is not None:
            self.metrics.serve(model, version)
        self.metrics.loads.labels(model, result).inc()


class _Web(uvicorn.Server):
    """uvicorn, which leaves the signals to :class:`Server`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes none."""
        yield


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_options(options: Options) -> None:
    """Refuses options that do not go together.

    Raises:
        UserError: names the option and the remedy.
    """
    if (options.certificate is None) != (options.private_key is None):
        raise UserError("--certificate and --private-key go together; give both")
    for file in (options.certificate, options.private_key):
        if file is not None and not file.is_file():
            raise UserError(f"{file}: is no file")
    if options.certificate is not None and options.private_key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.certificate, options.private_key)
        except (ssl.SSLError, OSError):
            raise UserError(
                f"{options.certificate}: is no PEM certificate chain that goes with {options.private_key}"
            ) from None
    if options.canary is not None and not 0 <= options.canary <= 1:
        raise UserError("--canary: a share of the users, from 0 to 1")
    if options.token is None and not is_loopback(options.host):
        log.warning("%s can be reached from other machines, and no --token-file keeps them out", options.host)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
