"""Batch limits that keep a latency budget, from what a model's requests take at warm-up.

A request that comes while a batch is scored waits for it, and is then scored in the next one, as the queue has
room for one batch and no more: with ``S(b)`` for a batch of ``b`` rows and ``R(b)`` for reading and answering a
request of so many, and two others read before it, it has its answer after ``3 R(b) + 2 S(b)``. An engine that
looks up one batch while it computes another holds one batch more. The largest ``b`` that fits is taken, since
larger batches cost less a row.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mldcn.errors import UserError
from mldcn.serving.encoding import Rows
from mldcn.serving.engine import Engine, Scores
from mldcn.serving.server import ranking
from mldcn.serving.server.options import Batching, Budget

log = logging.getLogger("mldcn.serving")

READ_BEFORE = 2  # requests whose reading fits the budget beside a request's own; others are refused unread
SIZES = tuple(2**i for i in range(13))
_SECONDS_EACH = 0.7  # of measuring a size,
_FEWEST = 20  # but never fewer calls
_FIRST = 3  # calls of a size are slower: memory is found for it


@dataclass(frozen=True)
class Taken:
    """Seconds, at the budget's percentile, of reading and answering a request, and of scoring its rows."""

    reading: float
    scoring: float


def tuned(name: str, engine: Engine, batching: Batching, budget: Budget) -> Batching:
    """The limits that keep the budget, measured; says what they are.

    Args:
        name: the model's, for the log.
        engine: loaded and warm.
        batching: as the server was told; ``rows`` and ``queue_rows`` are replaced, ``delay`` may become shorter.
        budget: of a request that is not larger than a batch.

    Raises:
        UserError: a batch of one row takes longer.
    """
    picked, expected = pick(
        budget,
        batching,
        lambda rows: measure(engine, rows, budget.percentile, batching.workers, beside=lambda: _busy(engine)),
        held=3 if engine.two_steps else 2,
    )
    log.info(
        "model %s: for %s batches take up to %d rows and wait %.3g ms for company; %.3g ms expected",
        name,
        budget,
        picked.rows,
        1000 * picked.delay,
        1000 * expected,
    )
    return picked


def pick(
    budget: Budget, batching: Batching, taken: Callable[[int], Taken], held: int = 2
) -> tuple[Batching, float]:
    """The largest batches that keep a budget, and the latency expected with them.

    Args:
        budget: of a request.
        batching: as the server was told.
        taken: what a number of rows takes; is asked for more and more until it is too much.
        held: batches between a request's coming and its answer.

    Raises:
        UserError: one row takes too long.
    """
    found: tuple[Batching, float] | None = None
    sizes = [*SIZES]
    while sizes:
        rows = sizes.pop(0)
        took = taken(rows)
        # Others may be read before it.
        expected = (1 + READ_BEFORE) * took.reading + held * took.scoring
        if expected > budget.seconds:
            if found is None:
                raise UserError(
                    f"--latency-ms {budget}: cannot be kept: at this percentile a request of one row takes "
                    f"{1000 * took.reading:.3g} ms to read and answer and {1000 * took.scoring:.3g} ms to score, "
                    f"and may wait for {READ_BEFORE} others to be read and {held - 1} to be scored before it; "
                    f"allow {1000 * expected:.3g} ms, export a faster program or serve fewer processes"
                )
            # Between the last that fits and the first that does not there is one more to try.
            sizes = [3 * rows // 4] if rows in SIZES and rows > 2 else []
            continue
        # While a batch is scored the next one waits anyway; the delay only matters to a worker that is idle.
        delay = min(batching.delay, budget.seconds - took.reading - took.scoring)
        # It may come in the middle of others' reading, and then again be behind some.
        lag = (budget.seconds - took.reading - held * took.scoring) / 2
        limits = replace(batching, rows=rows, delay=delay, queue_rows=rows * batching.workers, lag=lag)
        found = limits, expected
    assert found is not None
    return found


def measure(
    engine: Engine,
    rows: int,
    percentile: float,
    workers: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    beside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Taken:
    """What a request of some rows takes, alone in its batch.

    Args:
        engine: loaded.
        rows: of the request.
        percentile: from 0 to 100.
        workers: batches that are scored at the same time.
        clock: seconds.
        beside: what goes on while batches are scored.
    """
    body = _body(engine, rows)
    calls = max(_FEWEST, round(200 / (100 - percentile)))
    reading = _timed(lambda: _read(engine, body), calls, clock)
    encoded = _strangers(engine, rows)

    def score(_worker: int) -> list[float]:
        for _ in range(_FIRST):
            engine.score_rows([encoded])
        return _timed(lambda: engine.score_rows([encoded]), calls, clock)

    with beside(), ThreadPoolExecutor(workers) as pool:
        scoring = [seconds for found in pool.map(score, range(workers)) for seconds in found]

    def at(seconds: list[float]) -> float:
        return float(np.percentile(seconds, percentile, method="higher"))

    return Taken(at(reading), at(scoring))


def _timed(work: Callable[[], object], calls: int, clock: Callable[[], float]) -> list[float]:
    found: list[float] = []
    begun = clock()
    while len(found) < _FEWEST or (len(found) < calls and clock() - begun < _SECONDS_EACH):
        start = clock()
        work()
        found.append(clock() - start)
    return found


def _strangers(engine: Engine, rows: int) -> Rows:
    """Rows of as many requests: what candidates of one request share is computed once, and so is cheaper."""
    sample = engine.sample()
    constant = {name: [value] * rows for name, value in sample["constant"].items()}
    return engine.encode(constant | _repeated(sample["candidates"], rows))


def _repeated(candidates: Mapping[str, list[Any]], rows: int) -> dict[str, list[Any]]:
    return {name: (values * (rows // len(values) + 1))[:rows] for name, values in candidates.items()}


def _body(engine: Engine, rows: int) -> bytes:
    sample = ranking.sample_of(engine)
    candidates = _repeated(sample["candidates"], rows)
    return json.dumps(sample | {"candidates": candidates, "probabilities": True}).encode()


def _read(engine: Engine, body: bytes) -> Rows:
    """All that is done for a request but for its scoring."""
    head, candidates = ranking.parse_json(body)
    encoded = engine.encode_rank(ranking.constant_of(head), candidates)
    scores = Scores(np.zeros((len(encoded), len(engine.tasks)), np.float32))
    found = ranking.ranked(head, engine.tasks, scores)
    ranking.to_json(head, "model", "version", engine.tasks, found)
    return encoded


@contextmanager
def _busy(engine: Engine) -> Iterator[None]:
    """While the server scores, it reads other requests; so does this."""
    body = _body(engine, 1)
    end = threading.Event()

    def read() -> None:
        while not end.is_set():
            _read(engine, body)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
