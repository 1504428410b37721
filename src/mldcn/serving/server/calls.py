"""What both transports do around a call: its id, who may make it, its line in the log, its counts."""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

from mldcn.serving.refused import Reason, Refused
from mldcn.serving.server.metrics import Metrics
from mldcn.serving.server.tracing import Trace

access = logging.getLogger("mldcn.access")

REQUEST_ID = "x-request-id"
ROUTING_KEY = "x-routing-key"
_FAILED = ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def request_id(given: str | None) -> str:
    """The caller's id of a request, where it is short and plain; a new one otherwise."""
    return given if given is not None and _ID.fullmatch(given) else secrets.token_hex(8)


def check_token(token: str | None, given: str | None) -> None:
    """Refuses a caller who does not know the server's token.

    Args:
        token: the server's; None lets everybody in.
        given: the ``Authorization`` that was sent.
    """
    if token is None:
        return
    kind, _, sent = (given or "").partition(" ")
    right = hmac.compare_digest(sent.strip().encode("utf-8", "replace"), token.encode())
    if kind.lower() != "bearer" or not right:
        raise Refused(Reason.UNAUTHENTICATED, "send the server's token as 'Authorization: Bearer TOKEN'")


class Call:
    """One request, from its first byte to its answer.

    Args:
        metrics: told about it.
        transport: ``http`` or ``grpc``.
        given_id: the caller's id of it.
        client: the caller's address.
        trace: its span, where spans are made.
    """

    def __init__(
        self, metrics: Metrics, transport: str, given_id: str | None, client: str, trace: Trace | None = None
    ) -> None:
        self.id = request_id(given_id)
        self.name = "other"
        self.facts: dict[str, Any] = {}
        self._metrics = metrics
        self._transport = transport
        self._client = client
        self._trace = trace
        self._begun = time.monotonic()
        metrics.under_way.inc()

    def refused(self, refusal: Refused) -> None:
        """Notes why it was refused."""
        self.facts["refused"] = refusal.reason.name.lower()
        self._metrics.refused.labels(self.facts["refused"]).inc()

    def done(self, status: str | int, *, logged: bool = True) -> None:
        """Counts it and writes its line."""
        seconds = time.monotonic() - self._begun
        self._metrics.under_way.dec()
        self._metrics.requests.labels(self._transport, self.name, str(status)).inc()
        self._metrics.seconds.labels(self._transport, self.name).observe(seconds)
        if self._trace is not None:
            facts = {"request_id": self.id, "transport": self._transport, "status": status, **self.facts}
            failed = str(status).startswith("5") or status in _FAILED
            self._trace.end(self.name, facts, failed=failed)
        if logged and access.isEnabledFor(logging.INFO):
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": self.id,
                "transport": self._transport,
                "call": self.name,
                "status": status,
                "seconds": round(seconds, 6),
                "client": self._client,
                **self.facts,
            }
            access.info(json.dumps(line))


def write_logs(*, requests: bool) -> None:
    """Sends the server's log, and a line for each request if wanted, to standard error."""
    for name, form, wanted in (
        ("mldcn.serving", "%(asctime)s %(levelname)s %(message)s", True),
        ("mldcn.access", "%(message)s", requests),
    ):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = False
        logger.setLevel(logging.INFO if wanted else logging.CRITICAL)
        if wanted:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter(form))
            logger.addHandler(handler)
