"""A server in a thread, and requests for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from every_feature import columns, log
from mldcn.serving.engine import Engine
from mldcn.serving.server.options import Options
from mldcn.serving.server.repository import parse_path
from mldcn.serving.server.server import Addresses, Server
from mldcn.serving.server.supervisor import Supervisor

TEXTS = ["user", "item", "tags"]
NUMBERS = ["age", "price", "distance", "time"]


class Running:
    """A server that answers at ``http`` and ``grpc``."""

    def __init__(self, server: Server, addresses: Addresses) -> None:
        self.server = server
        self.http = addresses.http
        self.host = addresses.http.removeprefix("http://")
        self.grpc = addresses.grpc
        self.client = httpx.Client(base_url=addresses.http, timeout=20)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series of /metrics, 0 where it is not there."""
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if (sample.name, sample.labels) == (name, labels):
                    return sample.value
        return 0.0


@contextlib.contextmanager
def serving(*paths: Path | str, **options) -> Iterator[Running]:
    """Serves folders on free ports until the block ends."""
    options = {"http_port": 0, "grpc_port": 0, "device": "cpu", **options}
    server = Server([parse_path(str(path)) for path in paths], Options(**options))
    with in_background(server, 60, 30) as at:
        running = Running(server, at)
        with running.client:
            yield running


@contextlib.contextmanager
def in_background(server: Server | Supervisor, starting: float, ending: float) -> Iterator[Addresses]:
    """Runs a server in a thread until the block ends; raises what ended it.

    Args:
        server: that is to run.
        starting: seconds that it may take until it is ready.
        ending: seconds that it may take to end.
    """
    found: list[Addresses] = []
    errors: list[BaseException] = []
    ready = threading.Event()

    def run() -> None:
        try:
            server.run(ready=lambda addresses: (found.append(addresses), ready.set()))
        except BaseException as error:
            errors.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert ready.wait(starting)
        if errors:
            raise errors[0]
        yield found[0]
    finally:
        server.stop()
        thread.join(ending)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def rows(engine: Engine, count: int, seed: int = 1) -> dict[str, list]:
    """Rows of the log as columns of raw values, some ids unseen, some values missing."""
    return columns(log(count, seed, unseen=True), [each.name for each in engine.inputs])


def expected(engine: Engine, values: dict[str, list]) -> np.ndarray:
    """The probabilities ``(n, T)`` that every transport must give."""
    return engine.score(values).probabilities
