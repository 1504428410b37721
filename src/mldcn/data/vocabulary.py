"""Vocabularies: which ids have a row of their own, looked up by 64-bit keys.

A vocabulary on disk is one file, read by memory map: opening it costs nothing, and a look-up touches a few of
its pages. Two ids whose keys agree would share a row: among 50 million ids, that happens at all with
probability 7e-5.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn.data.batch import MISSING, OUT_OF_VOCABULARY, RESERVED_ROWS
from mldcn.data.hashing import NO_KEY, Keys, hash_texts, splitmix64
from mldcn.errors import UserError
from mldcn.files import atomic

FORMAT = 2
Rows = NDArray[np.int32]

_MAGIC = b"mldcn ids"
# What the file holds, each part aligned: the ids' texts end to end, where each ends, how often it was seen (all
# in the order of rows), the sorted keys, their rows, and where the keys of each first bits begin.
_PARTS: dict[str, np.dtype[Any]] = {
    "texts": np.dtype("u1"),
    "ends": np.dtype("<i8"),
    "counts": np.dtype("<i8"),
    "keys": np.dtype("<u8"),
    "rows": np.dtype("<i4"),
    "starts": np.dtype("<i4"),
}
_ALIGNMENT = 64
_CHUNK = 1 << 18
# A column of a file to be written is kept in memory up to this size.
_HELD_BYTES = 1 << 20
# What sorting an id by its key takes.
_SORT_BYTES = 48
_LAST_KEY = np.uint64(2**64 - 1)


class KeyIndex:
    """Finds keys among ``n`` known ones with a few memory reads each.

    Keys are uniform 64-bit hashes, so their first bits say nearly where each lies among the sorted ones; a
    search walks on from there, all queries at once.

    Args:
        keys: distinct keys, sorted, ``(n,)``.
        starts: where the keys of each first bits begin, if that is known; the keys then end with a last one of
            all ones, ``(n + 1,)``, that ends every walk.
    """

    def __init__(self, keys: Keys, starts: Rows | None = None) -> None:
        if starts is None:
            bits = _bits(len(keys))
            counts = np.bincount((keys >> np.uint64(64 - bits)).view(np.int64), minlength=1 << bits)
            starts = np.zeros(1 << bits, np.int32)
            np.cumsum(counts[:-1], out=starts[1:])
            keys = np.append(keys, _LAST_KEY)
        self._starts = starts
        self._keys = keys
        self._shift = np.uint64(65 - len(starts).bit_length())

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The places of the given keys, -1 where unknown; ``(m,)``."""
        places = self._starts.take((keys >> self._shift).view(np.int64)).astype(np.int64)
        here = self._keys.take(places)
        behind = np.flatnonzero(here < keys)
        while len(behind):
            after = places[behind] + 1
            places[behind] = after
            found = self._keys[after]
            here[behind] = found
            behind = behind[found < keys[behind]]
        places[(here != keys) | (places == len(self._keys) - 1)] = -1
        return places


def _bits(count: int) -> int:
    return max(1, count.bit_length())


class Vocabulary:
    """Rows of a table: 0 missing, 1 out of vocabulary, then one row an id, the most frequent first.

    One that grew from a base has the base's ids in their old rows, and new ones behind.

    Args:
        values: the ids, ``(n,)`` strings.
        counts: how often each was seen in the training rows.
    """

    def __init__(self, values: pa.Array, counts: NDArray[np.int64]) -> None:
        self.values = values.cast(pa.large_string())
        self.counts = counts
        keys = hash_texts(values)
        order = np.argsort(keys)
        self._keys = np.append(keys[order], _LAST_KEY)
        # One more row at the end: place -1, an unknown key, reads it.
        self._rows = np.append(order + RESERVED_ROWS, OUT_OF_VOCABULARY).astype(np.int32)
        self._index = KeyIndex(keys[order])
        self._path: Path | None = None

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return RESERVED_ROWS + len(self.counts)

    def lookup(self, keys: Keys) -> Rows:
        """The rows of keys, ``(m,)`` int32."""
        rows: Rows = self._rows[self._index.find(keys)]
        rows[keys == NO_KEY] = MISSING
        return rows

    def checksum(self) -> str:
        """A digest of the ids and their rows."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self._rows), _CHUNK):
            digest.update(self._keys[start : start + _CHUNK].tobytes())
            digest.update(self._rows[start : start + _CHUNK].tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the vocabulary's file; the file of one that was read is copied."""
        if self._path is not None:
            if self._path != path:
                with atomic(path) as temporary:
                    shutil.copyfile(self._path, temporary)
            return
        writer = VocabularyWriter(path)
        with writer:
            for start in range(0, len(self.counts), _CHUNK):
                part = self.values.slice(start, _CHUNK)
                writer.add(part, hash_texts(part), self.counts[start : start + _CHUNK])

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Opens what :meth:`save` or a :class:`VocabularyWriter` wrote.

        Raises:
            UserError: the file is missing, damaged, or of another version.
        """
        try:
            parts = _read_parts(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no readable vocabulary ({error}); prepare the data again") from None
        vocabulary = cls.__new__(cls)
        ends, count = parts["ends"], len(parts["counts"])
        vocabulary.values = pa.LargeStringArray.from_buffers(
            count, pa.py_buffer(ends), pa.py_buffer(parts["texts"])
        )
        vocabulary.counts = parts["counts"]
        vocabulary._keys, vocabulary._rows = parts["keys"], parts["rows"]
        vocabulary._index = KeyIndex(parts["keys"], parts["starts"])
        vocabulary._path = path
        return vocabulary


class VocabularyWriter:
    """Writes a vocabulary's file from its ids in the order of their rows, in bounded memory.

    Use it as a context manager; when the block ends with an error, nothing is left behind.

    Args:
        path: the file to write.
        memory: bytes that sorting the keys may take.
        base: its ids come first, in their rows.
        flushed: false where the caller flushes the file to the disk later.
    """

    def __init__(
        self, path: Path, memory: int = 1 << 30, base: Vocabulary | None = None, *, flushed: bool = True
    ) -> None:
        self._path = path
        self._memory = memory
        self._places: dict[str, list[int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._atomic = atomic(path, flushed=flushed)
        self._file = self._atomic.__enter__().open("wb")
        self._columns = {name: _Column(path, name, _PARTS[name]) for name in ("ends", "counts", "keys")}
        self._columns["ends"].add(np.zeros(1, np.int64))
        self._text_bytes = 0
        self.count = 0
        if base is not None:
            for start in range(0, len(base.counts), _CHUNK):
                part = base.values.slice(start, _CHUNK)
                self.add(part, hash_texts(part), np.zeros(len(part), np.int64))

    def __enter__(self) -> VocabularyWriter:
        return self

    def add(self, values: pa.Array, keys: Keys, counts: NDArray[np.int64]) -> None:
        """Appends ids."""
        values = values.cast(pa.large_string())
        _, ends, texts = values.buffers()
        if len(values):
            offsets = np.frombuffer(ends, np.int64)[values.offset : values.offset + len(values) + 1]
            self._file.write(memoryview(texts or b"")[offsets[0] : offsets[-1]])
            self._columns["ends"].add(offsets[1:] - offsets[0] + self._text_bytes)
            self._text_bytes += int(offsets[-1] - offsets[0])
        self._columns["keys"].add(keys)
        self._columns["counts"].add(counts)
        self.count += len(values)

    def count_base(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Says how often ids of the base were seen, by row number."""
        self._columns["counts"].set(rows - RESERVED_ROWS, counts)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as problem:
            kind, error = type(problem), problem
            raise
        finally:
            try:
                self._file.close()
            except OSError as problem:
                kind, error = type(problem), problem
            for column in self._columns.values():
                column.close()
            self._atomic.__exit__(kind, error, trace)

    def _finish(self) -> None:
        self._places["texts"] = [0, self._text_bytes]
        self._write("ends", self._columns["ends"].chunks())
        self._write("counts", self._columns["counts"].chunks())
        rows = _Column(self._path, "rows", _PARTS["rows"])
        self._columns["rows"] = rows
        keys = _Column(self._path, "sorted", _PARTS["keys"])
        self._columns["sorted"] = keys
        for some_keys, some_rows in self._sorted():
            keys.add(some_keys)
            rows.add(some_rows)
        keys.add(np.array([_LAST_KEY]))
        rows.add(np.array([OUT_OF_VOCABULARY], np.int32))
        self._write("keys", keys.chunks())
        self._write("rows", rows.chunks())
        self._write("starts", _starts(keys.mapped()[:-1]))
        footer = json.dumps({"format": FORMAT, "rows": self.count, "parts": self._places}).encode()
        self._file.write(footer + len(footer).to_bytes(8, "little") + _MAGIC)

    def _write(self, name: str, chunks: Iterator[NDArray[Any]]) -> None:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        start = self._file.tell()
        for chunk in chunks:
            self._file.write(np.ascontiguousarray(chunk).data)
        self._places[name] = [start, self._file.tell() - start]

    def _sorted(self) -> Iterator[tuple[Keys, Rows]]:
        """Sorted keys and their rows, a range of keys at a time; a range is a part of all as keys are uniform."""
        ranges = max(1, -(-self.count * _SORT_BYTES // self._memory))
        cuts = [2**64 * number // ranges for number in range(ranges + 1)]
        for first, end in pairwise(cuts):
            keys, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
            row = RESERVED_ROWS
            for chunk in self._columns["keys"].chunks():
                inside = np.arange(len(chunk))
                if ranges > 1:
                    inside = np.flatnonzero((chunk >= np.uint64(first)) & (chunk <= np.uint64(end - 1)))
                keys.append(chunk[inside])
                rows.append((inside + row).astype(np.int32))
                row += len(chunk)
            joined = np.concatenate(keys)
            order = np.argsort(joined)
            yield joined[order], np.concatenate(rows)[order]


class _Column:
    """Numbers; many are in a temporary file beside another file, without a name of its own."""

    def __init__(self, path: Path, name: str, dtype: np.dtype[Any]) -> None:
        self._path = path.with_name(f".{path.name}.{name}.{os.getpid()}")
        self._dtype = dtype
        self._file: IO[bytes] | None = None
        self._held: list[NDArray[Any]] = []

    def add(self, numbers: NDArray[Any]) -> None:
        """Appends."""
        self._held.append(np.ascontiguousarray(numbers, self._dtype))
        if self._file is None and sum(held.nbytes for held in self._held) > _HELD_BYTES:
            self._file = self._path.open("w+b")
            self._path.unlink()
        if self._file is not None:
            for held in self._held:
                self._file.write(held.data)
            self._held = []

    def set(self, places: NDArray[np.int64], numbers: NDArray[Any]) -> None:
        """Overwrites."""
        if self._file is None:
            self._held = [self.mapped()]
            self._held[0][places] = numbers
        elif len(places):
            self._file.flush()
            np.memmap(self._file, self._dtype, "r+")[places] = numbers

    def chunks(self) -> Iterator[NDArray[Any]]:
        """All numbers, some at a time."""
        numbers = self.mapped()
        for start in range(0, len(numbers), _CHUNK):
            yield numbers[start : start + _CHUNK]

    def mapped(self) -> NDArray[Any]:
        """All numbers, as they lie in the file."""
        if self._file is None:
            return np.concatenate([np.zeros(0, self._dtype), *self._held])
        self._file.flush()
        return np.asarray(np.memmap(self._file, self._dtype, "r"))

    def close(self) -> None:
        """Gives the file back."""
        with contextlib.suppress(OSError):  # what a full disk has no room for is not needed any more
            if self._file is not None:
                self._file.close()


def _starts(keys: Keys) -> Iterator[Rows]:
    """Where the keys of each first bits begin."""
    bits = _bits(len(keys))
    for start in range(0, 1 << bits, _CHUNK):
        stop = min(start + _CHUNK, 1 << bits)
        first, last = np.searchsorted(keys, np.array([start, stop - 1], np.uint64) << np.uint64(64 - bits))
        heads = (keys[first:last] >> np.uint64(64 - bits)).astype(np.int64)
        yield (
            first + np.cumsum(np.bincount(heads - start + 1, minlength=stop - start)[: stop - start])
        ).astype(np.int32)


def _read_parts(path: Path) -> dict[str, NDArray[Any]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - len(_MAGIC) - 8))
        end = file.read()
        length = int.from_bytes(end[:8], "little")
        if end[8:] != _MAGIC or length > size:
            raise ValueError("it has no footer")
        file.seek(size - len(end) - length)
        footer = json.loads(file.read(length))
    if footer["format"] != FORMAT:
        raise UserError(
            f"{path}: a vocabulary of format {footer['format']}; this version of mldcn reads format {FORMAT}. "
            "Prepare the data again"
        )
    mapped = np.asarray(np.memmap(path, np.uint8, "r"))
    parts = {}
    for name, dtype in _PARTS.items():
        start, length = footer["parts"][name]
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"its {name} lie outside of it")
        parts[name] = mapped[start : start + length].view(dtype)
    count = footer["rows"]
    bits = _bits(count)
    expected = {"ends": count + 1, "counts": count, "keys": count + 1, "rows": count + 1, "starts": 1 << bits}
    for name, number in expected.items():
        if len(parts[name]) != number:
            raise ValueError(f"{len(parts[name])} {name}, expected {number}")
    return parts


class HashedRows:
    """A fixed number of rows shared by hash: 0 missing, 1 unused, then ``rows`` rows."""

    def __init__(self, rows: int, hashes: int) -> None:
        self.hashes = hashes
        self.modulus = rows
        self.rows = RESERVED_ROWS + rows

    def lookup(self, keys: Keys, which: int = 0) -> Rows:
        """The rows of keys by the first or the second hash, ``(m,)`` int32."""
        mixed = splitmix64(keys ^ np.uint64(which + 1))
        rows = (mixed % np.uint64(self.modulus)).astype(np.int32) + np.int32(RESERVED_ROWS)
        rows[keys == NO_KEY] = MISSING
        return rows
