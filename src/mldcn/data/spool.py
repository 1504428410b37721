"""Parsed blocks between two passes over a log: ids as codes, numbers, labels; no cell's text.

They are kept in memory while they are few, else in a file.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn.data.parsing import Ids, ParsedBlock
from mldcn.data.splits import Parts

# A block: the lengths of its head and its arrays, a checksum of both, the head (what the arrays are), the arrays.
_LENGTHS = 24
_ALIGNMENT = 64
_NO_TEXTS = pa.array([], pa.string())
_CODES = (np.int8, np.int16, np.int32)

Item = tuple[ParsedBlock, Parts]


class Spool:
    """Parsed blocks in their order; close it when done.

    Args:
        path: the file. One that is there is cut to ``size`` and continued.
        size: its bytes that are whole.
        memory: bytes of blocks that are kept before they are written.
    """

    def __init__(self, path: Path, size: int = 0, memory: int = 0) -> None:
        self.path = path
        # Those of the file.
        self.bytes = size
        self._memory = memory
        self._held: list[Item] = []
        self._held_bytes = 0
        self._file = path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)

    def close(self) -> None:
        """Forgets what was not written."""
        self._file.close()
        self._held = []

    def add(self, parsed: ParsedBlock, parts: Parts) -> None:
        """Appends a block that :func:`slim` made."""
        self._held.append((parsed, parts))
        self._held_bytes += _bytes(parsed)
        if self._held_bytes > self._memory:
            self._write()

    def sync(self) -> None:
        """Flushes all to disk."""
        self._write()
        self._file.flush()
        os.fsync(self._file.fileno())

    def blocks(self) -> Iterator[Item]:
        """The blocks; those of the file lie in mapped memory."""
        self._file.flush()
        held = list(self._held)
        for head, data in _read(self.path, self.bytes):
            yield _unpacked(json.loads(bytes(head)), data)
        yield from held

    def _write(self) -> None:
        for item in self._held:
            for buffer in _packed(*item):
                self._file.write(buffer)
                self.bytes += len(buffer)
        self._held, self._held_bytes = [], 0


def whole(path: Path, size: int) -> bool:
    """Whether the first bytes of a file are undamaged blocks."""
    try:
        if path.stat().st_size < size:
            return False
        for _ in _read(path, size, check=True):
            pass
    except (OSError, ValueError):
        return False
    return True


def _read(path: Path, size: int, *, check: bool = False) -> Iterator[tuple[memoryview, memoryview]]:
    if not size:
        return
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    at = 0
    while at < size:
        lengths = np.frombuffer(content[at : at + _LENGTHS], np.int64)
        head_bytes, data_bytes, crc = lengths.tolist()
        end = at + _LENGTHS + head_bytes + data_bytes
        if head_bytes < 0 or data_bytes < 0 or end > size:
            raise ValueError("a block ends outside the file")
        head = content[at + _LENGTHS : at + _LENGTHS + head_bytes]
        data = content[at + _LENGTHS + head_bytes : end]
        if check and zlib.crc32(data, zlib.crc32(head)) != crc:
            raise ValueError("a block is damaged")
        yield head, data
        at = end


def slim(parsed: ParsedBlock) -> ParsedBlock:
    """A block without texts, its codes as small as they can be."""
    ids = {}
    for name, found in parsed.ids.items():
        smallest = next(kind for kind in _CODES if len(found.keys) <= np.iinfo(kind).max)
        ids[name] = Ids(found.codes.astype(smallest), found.keys, _NO_TEXTS)
    return replace(parsed, ids=ids)


def _bytes(parsed: ParsedBlock) -> int:
    arrays = [getattr(parsed, name) for name in _PLAIN]
    arrays += [*parsed.numbers.values(), *parsed.vectors.values()]
    arrays += [array for ids in parsed.ids.values() for array in (ids.codes, ids.keys)]
    return sum(array.nbytes for array in arrays)


def _packed(parsed: ParsedBlock, parts: Parts) -> list[Any]:
    """A block as bytes to be written one after the other."""
    arrays: list[tuple[str, str, NDArray[Any]]] = [("parts", "", parts)]
    arrays += [(name, "", _shortened(getattr(parsed, name))) for name in _PLAIN]
    for name, ids in parsed.ids.items():
        arrays += [("codes", name, ids.codes), ("keys", name, ids.keys)]
    arrays += [("numbers", name, values) for name, values in parsed.numbers.items()]
    arrays += [("vectors", name, values) for name, values in parsed.vectors.items()]
    head: list[list[Any]] = []
    data: list[Any] = []
    at = 0
    for group, name, array in arrays:
        head.append([group, name, array.dtype.str, array.shape, at])
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        data += [content, bytes(-len(content) % _ALIGNMENT)]
        at += len(content) + len(data[-1])
    text = json.dumps({"rows": parsed.rows, "arrays": head}).encode()
    text += b" " * (-(_LENGTHS + len(text)) % _ALIGNMENT)
    crc = zlib.crc32(text)
    for part in data:
        crc = zlib.crc32(part, crc)
    return [np.array([len(text), at, crc], np.int64).tobytes(), text, *data]


def _unpacked(head: dict[str, Any], data: memoryview) -> Item:
    groups: dict[str, dict[str, Any]] = {name: {} for name in ("codes", "keys", "numbers", "vectors")}
    plain: dict[str, Any] = {}
    for group, name, kind, shape, start in head["arrays"]:
        dtype = np.dtype(kind)
        count = int(np.prod(shape))
        array = np.frombuffer(data[start : start + count * dtype.itemsize], dtype).reshape(shape)
        if name:
            groups[group][name] = array
        else:
            plain[group] = array
    rows, parts = head["rows"], plain.pop("parts")
    ids = {name: Ids(codes, groups["keys"][name], _NO_TEXTS) for name, codes in groups["codes"].items()}
    fields: dict[str, Any] = {name: _lengthened(array, rows) for name, array in plain.items()}
    return (
        ParsedBlock(rows=rows, ids=ids, numbers=groups["numbers"], vectors=groups["vectors"], **fields),
        parts,
    )


_PLAIN = ("labels", "weight", "position", "request", "user", "time")


def _shortened(column: NDArray[Any]) -> NDArray[Any]:
    """One row for all where they agree, as those of a column that the log does not have."""
    if len(column) < 2 or column.ndim > 1:
        return column
    first = column[0]
    same = np.isnan(column) if first != first else column == first
    return column[:1] if same.all() else column


def _lengthened(column: NDArray[Any], rows: int) -> NDArray[Any]:
    return column if len(column) == rows else np.repeat(column, rows)
