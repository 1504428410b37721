"""Addresses, and ports that several processes share."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mldcn.errors import UserError
from mldcn.serving.server.options import Options


@dataclass(frozen=True)
class Addresses:
    """Where a server listens: a URL, and ``host:port`` for gRPC."""

    http: str
    grpc: str | None


def joined(host: str, port: int) -> str:
    """``host:port``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bound(host: str, port: int, option: str, *, shared: bool = False) -> socket.socket:
    """A socket that has a port and does not listen yet.

    Args:
        host: the address.
        port: 0 takes a free one.
        option: that names the port.
        shared: whether other sockets of this user may listen there too.

    Raises:
        UserError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once only on connections of a socket that says that it is TCP. Others keep a body back
    # until the caller has acknowledged its head, for which a caller takes up to 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if found.family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(
            f"{joined(host, port)}: cannot listen there ({error.strerror or error}); name another {option}"
        ) from None
    return found


def addresses(options: Options, http_port: int, grpc_port: int | None) -> Addresses:
    """Where a server with these ports listens."""
    scheme = "https" if options.certificate else "http"
    rpc = None if grpc_port is None else joined(options.host, grpc_port)
    return Addresses(f"{scheme}://{joined(options.host, http_port)}", rpc)


@dataclass(frozen=True)
class Reserved:
    """What the processes of a server share.

    Attributes:
        options: the server's, with the ports that were taken.
        listener: bound to the HTTP port. Each process accepts connections from it, so that one which is busy takes
            none, and connections wait for another where one dies.
    """

    options: Options
    listener: socket.socket


@contextmanager
def reserved(options: Options) -> Iterator[Reserved]:
    """Ports for several processes, kept until the block ends.

    gRPC's library opens its port by itself: there each process has a socket of its own.

    Raises:
        UserError: a port is taken, by another server of several processes too.
    """
    with contextlib.ExitStack() as kept:
        listener = kept.enter_context(bound(options.host, options.http_port, "--port"))
        taken = replace(options, http_port=listener.getsockname()[1])
        if options.grpc_port is not None:
            # One that others may share could be had although another server listens there; this one not.
            if options.grpc_port:
                bound(options.host, options.grpc_port, "--grpc-port").close()
            rpc = kept.enter_context(bound(options.host, options.grpc_port, "--grpc-port", shared=True))
            taken = replace(taken, grpc_port=rpc.getsockname()[1])
        yield Reserved(taken, listener)
