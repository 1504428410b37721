"""Tables on another machine: a server of keys and values holds a bundle's rows, for all hosts that serve it.

The server is Redis or one that speaks its protocol and runs its scripts (Valkey). A table lies there as texts of
bytes, ``CHUNK_ROWS`` rows each, so that a row costs no key of its own:

    mldcn:<version>:<file>:<chunk>   rows chunk * CHUNK_ROWS and on, as they lie in the file
    mldcn:<version>                  by file: how many chunks were written; ``complete`` when all are there

``version`` is the bundle's, a hash of the checksums of all its files: rows of another export are never taken for
its own. A row that is not there (a server that evicts keys) and a server that does not answer refuse the request;
an answer never rests on a row that is made up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mldcn.errors import UserError
from mldcn.serving.program import LookUp
from mldcn.serving.refused import Reason, Refused
from mldcn.serving.store import gathered, row_bytes

log = logging.getLogger("mldcn.serving")

CHUNK_ROWS = 4096
SECONDS = 0.5  # for an answer or a connection, where the URL says nothing else
_COMPLETE = "complete"
_BATCH_BYTES = 4 << 20  # written at a time

# One call and one answer for all rows; each is the number of its chunk and its first byte there. A chunk that is
# not there gives nothing, and the answer is too short.
_SCRIPT = """
local found, at, width = {}, 1, tonumber(ARGV[2])
for i = 1, #ARGV[1] / 8 do
  local chunk, start
  chunk, start, at = struct.unpack('<I4I4', ARGV[1], at)
  found[i] = redis.call('GETRANGE', KEYS[1] .. chunk, start, start + width - 1)
end
return table.concat(found)
"""


@dataclass(frozen=True)
class TableServer:
    """Where bundles' tables lie that are not on this machine.

    Attributes:
        url: as ``redis://host:6379/0``.
        cache_bytes: memory for rows that were asked for last, of each bundle.
    """

    url: str
    cache_bytes: int = 256 << 20


class RowStore(Protocol):
    """Rows of tables by their numbers."""

    def fetch(self, file: str, rows: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """Rows as they lie in the bundle's file.

        Args:
            file: the file's name.
            rows: ``(n,)``.
            size: bytes of a row.

        Returns:
            ``(n, size)``.

        Raises:
            Refused: they cannot be had now.
        """
        ...


class RedisRows:
    """The rows of one version of a bundle in a Redis server.

    Args:
        client: of redis-py.
        version: the bundle's.
        where: the server, for messages; without credentials.
    """

    def __init__(self, client: Any, version: str, where: str) -> None:
        self._client = client
        self._script = client.register_script(_SCRIPT)
        self._version = version
        self._where = where

    def fetch(self, file: str, rows: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """See :class:`RowStore`."""
        places = np.stack([rows // CHUNK_ROWS, rows % CHUNK_ROWS * size], axis=1).astype("<u4")
        try:
            found = self._script(keys=[_chunk_key(self._version, file, "")], args=[places.tobytes(), size])
        except _redis().RedisError as error:
            log.error("the tables' server at %s: %s", self._where, error)
            raise Refused(
                Reason.NOT_READY, "the tables' server does not answer; try again later", retry_after=1
            ) from None
        if len(found) != len(rows) * size:
            log.error(
                "the tables' server at %s lacks rows of %s, version %s; it must not evict keys; upload again",
                self._where,
                file,
                self._version,
            )
            raise Refused(Reason.NOT_READY, "the tables' server lacks rows of this model", retry_after=60)
        return np.frombuffer(found, np.uint8).reshape(len(rows), size)


class RemoteTable:
    """One table, looked up in a :class:`RowStore` and in a cache of the rows that were asked for last.

    Args:
        store: where the rows are.
        plan: what the table is.
        cache_bytes: memory for the cache.
    """

    def __init__(self, store: RowStore, plan: LookUp, cache_bytes: int) -> None:
        self._store = store
        self._plan = plan
        self._size = row_bytes(plan.kind, plan.width)
        self.cache = RowCache(cache_bytes, self._size)

    def look_up(self, rows: Tensor) -> Tensor:
        """Rows ``(B, n)`` as ``(B, n, e)`` float32.

        Raises:
            Refused: they cannot be had now.
        """
        if not rows.numel():
            return torch.zeros((*rows.shape, self._plan.width))
        found, places = self._found(rows.reshape(-1))
        return gathered(found, places, self._plan.kind, self._plan.width).view(*rows.shape, self._plan.width)

    def packed(self, rows: Tensor) -> Tensor:
        """Rows ``(n,)`` as they lie in the file, ``(n, row_bytes)``.

        Raises:
            Refused: they cannot be had now.
        """
        found, places = self._found(rows)
        return found.index_select(0, places)

    def _found(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Each row that is asked for once, and where it stands there."""
        wanted, places = np.unique(rows.numpy(), return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self._plan.rows:
            raise IndexError(f"{self._plan.file}: has {self._plan.rows} rows, asked for {wanted[[0, -1]]}")
        hit, found = self.cache.take(wanted)
        if not hit.all():
            lacking = wanted[~hit]
            fetched = self._store.fetch(self._plan.file, lacking, self._size)
            self.cache.put(lacking, fetched)
            found[~hit] = fetched
        return torch.from_numpy(found), torch.from_numpy(places.reshape(-1))


class RowCache:
    """Rows that were asked for last, in bounded memory; several threads may use it.

    A row may lie in the ``WAYS`` places of one set, where a new one takes the place of that which was asked for
    the longest time ago: all steps are operations on arrays.

    Args:
        size: bytes that it may take.
        row: bytes of a row.
    """

    WAYS = 8
    NOTES = 16  # bytes beside each row

    def __init__(self, size: int, row: int) -> None:
        self._sets = size // (self.WAYS * (row + self.NOTES))
        self._rows = np.full((self._sets, self.WAYS), -1, np.int64)
        self._used = np.zeros((self._sets, self.WAYS), np.int64)
        self._data = np.empty((self._sets, self.WAYS, row), np.uint8)
        self._now = 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def take(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
        """Which of some different rows are there, ``(n,)``, and their bytes; anything where they are not."""
        if not self._sets:
            self.misses += len(rows)
            return np.zeros(len(rows), bool), np.empty((len(rows), self._data.shape[2]), np.uint8)
        sets = self._set(rows)
        with self._lock:
            found = self._rows[sets] == rows[:, None]
            hit, way = found.any(axis=1), found.argmax(axis=1)
            data = self._data[sets, way]
            self._now += 1
            self._used[sets[hit], way[hit]] = self._now
            hits = int(hit.sum())
            self.hits += hits
            self.misses += len(rows) - hits
        return hit, data

    def put(self, rows: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Keeps some different rows."""
        if not self._sets:
            return
        sets = self._set(rows)
        order = np.argsort(sets, kind="stable")
        # Of the new rows of one set the first takes the oldest place, the next the next one.
        begins = np.flatnonzero(np.diff(sets[order], prepend=-1))
        turn = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
        order, turn = order[turn < self.WAYS], turn[turn < self.WAYS]
        with self._lock:
            chosen = sets[order]
            way = np.argsort(self._used[chosen], axis=1, kind="stable")[np.arange(len(order)), turn]
            self._now += 1
            self._rows[chosen, way] = rows[order]
            self._data[chosen, way] = data[order]
            self._used[chosen, way] = self._now

    def _set(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return ((mixed >> np.uint64(32)) % np.uint64(self._sets)).astype(np.int64)


class RemoteTables:
    """The tables of a bundle that was uploaded, each with its share of the cache.

    Args:
        server: where they lie.
        version: the bundle's.
        plan: its look-ups.

    Raises:
        UserError: the server cannot be reached, or does not hold all of them.
    """

    def __init__(self, server: TableServer, version: str, plan: Sequence[LookUp]) -> None:
        store = remote_rows(server.url, version, plan)
        # All rows of a table would take so much; a little more, as not all sets fill alike.
        whole = {
            each.file: 1.25 * each.rows * (row_bytes(each.kind, each.width) + RowCache.NOTES) for each in plan
        }
        share = min(1.0, server.cache_bytes / max(sum(whole.values()), 1))
        self._opened = {each.file: RemoteTable(store, each, int(share * whole[each.file])) for each in plan}

    def __call__(self, plan: LookUp) -> RemoteTable:
        """The table of a look-up."""
        return self._opened[plan.file]

    def asked(self) -> dict[str, int]:
        """How many rows batches have asked for: those in the ``cache``, and those of the ``server``."""
        caches = [each.cache for each in self._opened.values()]
        return {"cache": sum(each.hits for each in caches), "server": sum(each.misses for each in caches)}


def remote_rows(url: str, version: str, plan: Sequence[LookUp]) -> RedisRows:
    """The rows of a bundle that was uploaded.

    Raises:
        UserError: the server cannot be reached, or does not hold all of them.
    """
    client, where = _client(url)
    try:
        head = client.hgetall(_head_key(version))
    except _redis().RedisError as error:
        raise UserError(f"--tables {where}: the server does not answer ({error})") from None
    if _COMPLETE.encode() not in head or any(each.file.encode() not in head for each in plan):
        raise UserError(
            f"--tables {where}: the server does not hold the tables of this bundle (version {version}); "
            f"run 'mldcn upload' first"
        )
    return RedisRows(client, version, where)


def upload_tables(
    folder: Path, version: str, plan: Sequence[LookUp], url: str, progress: Callable[[int, int], None]
) -> int:
    """Writes a bundle's tables to a server; goes on where an earlier call was cut off.

    Args:
        folder: where the files lie.
        version: the bundle's.
        plan: its look-ups.
        url: of the server.
        progress: told of the bytes that are there, and of all.

    Returns:
        Bytes that were written now.

    Raises:
        UserError: the server cannot be reached, or has no room.
    """
    client, where = _client(url)
    head = _head_key(version)
    total = sum(each.rows * row_bytes(each.kind, each.width) for each in plan)
    there = written = 0
    try:
        if client.hget(head, _COMPLETE):
            return 0
        for each in plan:
            chunk_bytes = CHUNK_ROWS * row_bytes(each.kind, each.width)
            chunks, step = -(-each.rows // CHUNK_ROWS), max(1, _BATCH_BYTES // chunk_bytes)
            done = int(client.hget(head, each.file) or 0)
            client.hsetnx(head, each.file, 0)
            there += done * chunk_bytes
            with (folder / each.file).open("rb") as file:
                file.seek(done * chunk_bytes)
                for first in range(done, chunks, step):
                    last = min(first + step, chunks)
                    # All of it or nothing: what is counted as done is there.
                    with client.pipeline(transaction=True) as batch:
                        for chunk in range(first, last):
                            data = file.read(chunk_bytes)
                            batch.set(_chunk_key(version, each.file, chunk), data)
                            there, written = there + len(data), written + len(data)
                        batch.hset(head, each.file, last)
                        batch.execute()
                    progress(there, total)
        lacking = _lacking(client, version, plan)
        if lacking:
            client.delete(head)
            raise UserError(
                f"{where}: {lacking} parts of the tables are gone again; give the server more memory, and a "
                "maxmemory-policy of noeviction"
            )
        client.hset(head, _COMPLETE, 1)
    except _redis().RedisError as error:
        raise UserError(f"{where}: cannot be written to ({error}); run the command again to go on") from None
    return written


def remove_tables(version: str, plan: Sequence[LookUp], url: str) -> None:
    """Removes what :func:`upload_tables` wrote, all or in part.

    Raises:
        UserError: the server cannot be reached.
    """
    client, where = _client(url)
    try:
        client.delete(_head_key(version))  # first: what is half there is not served
        for each in plan:
            keys = [_chunk_key(version, each.file, chunk) for chunk in range(-(-each.rows // CHUNK_ROWS))]
            for start in range(0, len(keys), 1000):
                client.unlink(*keys[start : start + 1000])
    except _redis().RedisError as error:
        raise UserError(f"{where}: the server does not answer ({error})") from None


def _lacking(client: Any, version: str, plan: Sequence[LookUp]) -> int:
    """How many chunks have not their size."""
    lacking = 0
    for each in plan:
        sizes = [
            min(CHUNK_ROWS, each.rows - start) * row_bytes(each.kind, each.width)
            for start in range(0, each.rows, CHUNK_ROWS)
        ]
        for start in range(0, len(sizes), 1000):
            batch = client.pipeline(transaction=False)
            expected = sizes[start : start + 1000]
            for chunk in range(start, start + len(expected)):
                batch.strlen(_chunk_key(version, each.file, chunk))
            lacking += sum(a != b for a, b in zip(batch.execute(), expected, strict=True))
    return lacking


def _head_key(version: str) -> str:
    return f"mldcn:{version}"


def _chunk_key(version: str, file: str, chunk: int | str) -> str:
    return f"mldcn:{version}:{file}:{chunk}"


def _client(url: str) -> tuple[Any, str]:
    """A client, and what to call the server in messages."""
    redis = _redis()
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        parts = urlsplit(url)
        where = f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
        client = redis.Redis.from_url(
            url,
            socket_timeout=SECONDS,
            socket_connect_timeout=SECONDS,
            # At once and once only: a connection that was closed meanwhile.
            retry=Retry(NoBackoff(), 1),
        )
    except (ValueError, TypeError):
        raise UserError("--tables: a URL as redis://host:6379/0, rediss:// for TLS") from None
    return client, where


def _redis() -> Any:
    try:
        import redis
    except ImportError:
        raise UserError("tables on a Redis server need its client; pip install 'mldcn[remote]'") from None
    return redis
