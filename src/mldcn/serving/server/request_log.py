"""A log of some requests and what was answered, as Parquet files that training reads.

A row is one candidate: the raw values that were scored, and beside them ``request_id``, ``candidate`` (its place
in the request), ``served_at``, ``served_model``, ``served_version`` and a probability ``p_<task>`` each. Labels
come later, from elsewhere: joined by ``request_id`` and ``candidate`` the files are a log like any other.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mldcn.data import cells
from mldcn.data.parsing import number_columns
from mldcn.data.reading import RawBlock
from mldcn.errors import UserError
from mldcn.predict import PROBABILITY
from mldcn.serving.engine import Engine, Scores
from mldcn.serving.server.options import RequestLogging
from mldcn.serving.server.repository import Version, share_of
from mldcn.serving.values import Columns, Input, text_of

log = logging.getLogger("mldcn.serving")

_SAID_SECONDS = 60.0  # between two lines in the server's log about what goes wrong again and again


@dataclass(frozen=True)
class Asked:
    """The raw values of a request: columns of rows, and values that all rows have in common."""

    columns: Mapping[str, Any]
    constant: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Request:
    id: str
    version: Version
    asked: Asked
    scores: Scores
    served_at: datetime


class RequestLog:
    """Takes requests of the server's threads and writes them by one of its own.

    Nothing waits for it: what finds no room, or cannot be written, is dropped and counted. A file appears whole,
    by a rename, when it has enough rows or its first row is old enough.

    Args:
        options: where to, and how many.
        count: told ``(result, requests)``: ``written``, ``no_room`` or ``failed``.
        name: of the process, and so part of its files' names.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        options: RequestLogging,
        count: Callable[[str, int], None],
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._count = count
        self._name = name
        self._clock = clock
        self._waiting: queue.Queue[_Request | None] = queue.Queue()
        self._waiting_rows = 0
        self._lock = threading.Lock()
        self._parts: dict[Version, list[pa.Table]] = {}
        self._begun: dict[Version, float] = {}
        self._files = 0
        self._said = -_SAID_SECONDS
        try:
            options.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{options.folder}: cannot be made ({error.strerror}); name another --log-requests"
            ) from None
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._thread.start()

    def wants(self, request_id: str) -> bool:
        """Whether a request is among those logged: the same ones in every process, and every time."""
        return share_of("request log", request_id) < self._options.rate

    def take(self, request_id: str, version: Version, asked: Asked, scores: Scores) -> None:
        """Logs a request, if there is room for it. Never waits."""
        with self._lock:
            room = (
                self._waiting.qsize() < self._options.waiting_requests
                and self._waiting_rows + len(scores) <= self._options.waiting_rows
            )
            if room:
                self._waiting_rows += len(scores)
        if not room:
            self._count("no_room", 1)
            return
        self._waiting.put(_Request(request_id, version, asked, scores, datetime.now(UTC)))

    def close(self) -> None:
        """Writes what is there, and ends."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            try:
                request = self._waiting.get(timeout=min(1.0, self._options.part_seconds))
            except queue.Empty:
                request = None
            else:
                if request is None:
                    break
                self._add(request)
            self._write_due()
        for version in list(self._parts):
            self._write(version)

    def _add(self, request: _Request) -> None:
        with self._lock:
            self._waiting_rows -= len(request.scores)
        try:
            table = row_table(request.id, request.version, request.asked, request.scores, request.served_at)
        except Exception:
            # It was scored, so it can be read; whatever is odd about it must not end the thread.
            self._say("request %s cannot be logged", request.id)
            self._count("failed", 1)
            return
        self._parts.setdefault(request.version, []).append(table)
        self._begun.setdefault(request.version, self._clock())

    def _write_due(self) -> None:
        now = self._clock()
        for version, tables in list(self._parts.items()):
            rows = sum(len(table) for table in tables)
            if rows >= self._options.part_rows or now - self._begun[version] >= self._options.part_seconds:
                self._write(version)

    def _write(self, version: Version) -> None:
        tables = self._parts.pop(version)
        del self._begun[version]
        self._files += 1
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        folder = self._options.folder / version.model
        # Readers of a folder pass over names that begin with a dot.
        part = folder / f".{self._name}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.concat_tables(tables, promote_options="default"), part, compression="zstd")
            part.replace(folder / f"{now}-{version.label}-{self._name}-{self._files}.parquet")
        except (OSError, pa.ArrowException):
            self._say("requests cannot be logged to %s; they are dropped", folder)
            self._count("failed", len(tables))
            _remove(part)
            return
        self._count("written", len(tables))

    def _say(self, message: str, *facts: object) -> None:
        if self._clock() - self._said >= _SAID_SECONDS:
            self._said = self._clock()
            log.exception(message, *facts)


def _remove(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError:
        log.exception("%s cannot be removed", part)


def row_table(
    request_id: str, version: Version, asked: Asked, scores: Scores, served_at: datetime
) -> pa.Table:
    """The rows of one request.

    Numbers are doubles, in vectors too; all else is text, or lists of texts, whatever the caller sent: each as the
    text that stands for it alone, so that it means in training what it meant here.
    """
    engine = version.engine
    schema = engine.config.log_schema
    rows = len(scores)
    columns = Columns(schema, engine.config.data.missing)
    raw = columns.joined(asked.constant, asked.columns) if asked.constant else asked.columns
    values = columns.table(raw)
    numbers = number_columns(schema)
    made: dict[str, Any] = {}
    for each in columns.inputs:
        made[each.name] = _column(values, each, number=each.name in numbers)
    for name in set(schema.columns()) - set(made):
        if name in raw:  # what only training reads; some callers know it already
            made[name] = pa.array([None if v is None else str(v) for v in _listed(raw[name])], pa.string())
    if schema.request is not None and schema.request not in made:
        made[schema.request] = pa.array([request_id] * rows, pa.string())
    beside = {
        "request_id": pa.array([request_id] * rows, pa.string()),
        "candidate": pa.array(range(rows), pa.int32()),
        "served_at": pa.array([served_at] * rows, pa.timestamp("us", "UTC")),
        "served_model": pa.array([version.model] * rows, pa.string()),
        "served_version": pa.array([version.label] * rows, pa.string()),
        **_probabilities(engine, scores),
    }
    made |= {name: column for name, column in beside.items() if name not in made}
    return pa.table(made)


def _probabilities(engine: Engine, scores: Scores) -> dict[str, pa.Array]:
    return {
        f"{PROBABILITY}{task}": pa.array(scores.probabilities[:, i]) for i, task in enumerate(engine.tasks)
    }


def _listed(values: Any) -> list[Any]:
    return values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else list(values)


def _column(values: pa.Table, each: Input, *, number: bool) -> pa.Array:
    if number:
        return pa.array(cells.numbers(RawBlock(values, "request", 1), each.name), from_pandas=True)
    found = values.column(each.name).to_pylist()
    if not each.delimiter:
        return pa.array([text_of(each, row, value) for row, value in enumerate(found, 1)], pa.string())
    lists = [_split(each, value) for value in found]
    if each.kind == "embedding":
        return pa.array(
            [None if value is None else [float(element) for element in value] for value in lists],
            pa.list_(pa.float64()),
        )
    texts = [
        None if value is None else [text_of(each, row, element) for element in value]
        for row, value in enumerate(lists, 1)
    ]
    return pa.array(texts, pa.list_(pa.string()))


def _split(each: Input, value: Any) -> list[Any] | None:
    if isinstance(value, str):
        return value.split(each.delimiter) if value else None
    return value if value is None or isinstance(value, list) else [value]
