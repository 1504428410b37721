"""Addresses, and ports that several processes share: the kernel gives each new connection to one of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mldcn.errors import UserError
from mldcn.serving.options import Options


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
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
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


@contextmanager
def reserved(options: Options) -> Iterator[Options]:
    """The options with ports that processes may share, kept for them until the block ends.

    Raises:
        UserError: a port is taken, by another server of several processes too.
    """
    wanted = [(options.http_port, "--port")]
    if options.grpc_port is not None:
        wanted.append((options.grpc_port, "--grpc-port"))
    kept: list[socket.socket] = []
    try:
        for port, option in wanted:
            if port:
                # One that others may share could be had although another server listens there; this one not.
                bound(options.host, port, option).close()
            kept.append(bound(options.host, port, option, shared=True))
        ports = [each.getsockname()[1] for each in kept]
        yield replace(options, http_port=ports[0], grpc_port=None if options.grpc_port is None else ports[1])
    finally:
        for each in kept:
            each.close()
