"""How a server is set up."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mldcn.errors import UserError

if TYPE_CHECKING:  # it needs PyTorch
    from mldcn.serving.remote import TableServer

log = logging.getLogger("mldcn.serving")

Control = Literal["none", "poll", "explicit"]


@dataclass(frozen=True)
class Limits:
    """What one request may be.

    Attributes:
        body_bytes: the longest body, also after it was unpacked.
        rows: the most rows or candidates.
        text_bytes: the longest text of one value (a list written as one text is one value).
        seconds: the longest time that a request may take; a request's own deadline can only be sooner.
        requests: the most requests that are answered at the same time, by transport.
    """

    body_bytes: int = 16 << 20
    rows: int = 10_000
    text_bytes: int = 1 << 16
    seconds: float = 10.0
    requests: int = 1024


@dataclass(frozen=True)
class Batching:
    """How requests are scored together.

    Attributes:
        rows: a batch takes no further request when it has so many rows.
        delay: seconds that a request waits for others while there is room in its batch.
        queue_rows: a request that would make more rows wait than this is refused at once.
        queue_seconds: while a request has waited for longer, further ones are refused at once.
        workers: batches that are scored at the same time.
        lag: seconds of reading other requests that came together with one, past which it is refused unread.
    """

    rows: int = 512
    delay: float = 0.001
    queue_rows: int = 8192
    queue_seconds: float = 0.5
    workers: int = 1
    lag: float = 0.5


@dataclass(frozen=True)
class Budget:
    """The longest that a share of the requests may take: ``percentile`` from 0 to 100, in ``seconds``."""

    percentile: float
    seconds: float

    def __str__(self) -> str:
        return f"p{self.percentile:g}={1000 * self.seconds:g}"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``p99=10``: 99 % of the requests within 10 ms.

        Raises:
            UserError: it is not of this form.
        """
        found = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)=(\d+(?:\.\d+)?)", text)
        if found is None or not float(found[1]) or not float(found[2]):
            raise UserError(f"--latency-ms {text!r}: write the percentile and milliseconds as in p99=10")
        return cls(float(found[1]), float(found[2]) / 1000)


@dataclass(frozen=True)
class RequestLogging:
    """Which requests are logged for later training, and how.

    Attributes:
        folder: for the files, in a folder by model.
        rate: share of the requests.
        part_rows: a file is written when it has so many rows,
        part_seconds: or its first row is so old.
        waiting_requests: the most requests that wait to be written; more are dropped,
        waiting_rows: and so are those that would make more rows wait.
    """

    folder: Path
    rate: float = 0.01
    part_rows: int = 100_000
    part_seconds: float = 300.0
    waiting_requests: int = 1024
    waiting_rows: int = 65_536


@dataclass(frozen=True)
class Options:
    """Everything that ``mldcn serve`` is told.

    Attributes:
        host: the address to listen on; nothing but this machine reaches the default.
        http_port: 0 takes a free one.
        grpc_port: 0 takes a free one; None serves no gRPC.
        device: where models compute.
        limits: what one request may be.
        batching: how requests are scored together.
        latency: that each model's batches are cut for, by what it takes at warm-up; None leaves them as
            ``batching`` says.
        control: when models' folders are looked at again: never (but for SIGHUP), every ``poll_seconds``, or when
            the protocol's repository calls ask for it.
        poll_seconds: between two looks.
        canary: share of the users whom the newest version answers while there is one before it; None: all.
        token: what callers must send as ``Authorization: Bearer``.
        certificate: PEM file of the server's certificate chain, for TLS.
        private_key: PEM file of its key.
        shutdown_delay: seconds between not being ready any more and the last connection taken in.
        drain_seconds: the longest wait for requests under way when the server stops.
        processes: that answer; each has its own queue and its own threads.
        threads: of a batch's computation; None is PyTorch's choice, or with several processes the cores' even
            share.
        access_log: whether each request has its line in the log.
        request_log: which requests are logged for later training; None logs none.
        tables: the server that holds the bundles' tables; None reads those of their folders.
        traces: whether spans of requests are sent as OpenTelemetry's environment variables say.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)
    latency: Budget | None = None
    control: Control = "none"
    poll_seconds: float = 5.0
    canary: float | None = None
    token: str | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    shutdown_delay: float = 0.0
    drain_seconds: float = 30.0
    tables: TableServer | None = None
    processes: int = 1
    threads: int | None = None
    access_log: bool = True
    request_log: RequestLogging | None = None
    traces: bool = False

    @property
    def threads_each(self) -> int | None:
        """The threads of one process; None leaves them to PyTorch."""
        if self.threads is not None or self.processes == 1:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // self.processes)


def read_token(file: Path) -> str:
    """The token in a file.

    Raises:
        UserError: there is none.
    """
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{file}: cannot be read; write the token into it") from None
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise UserError(f"{file}: a token has 16 or more plain characters; 'openssl rand -hex 32' makes one")
    return token


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
    if options.request_log is not None and not 0 <= options.request_log.rate <= 1:
        raise UserError("--log-rate: a share of the requests, from 0 to 1")
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
