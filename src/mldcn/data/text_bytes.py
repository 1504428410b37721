"""The bytes of a text log: counted and digested on the way, decompressed, in chunks or as records."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from mldcn.data.located import NotPlainError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


class Counted(io.RawIOBase):
    """A file that counts what is read from it, and digests it if asked."""

    def __init__(self, raw: BinaryIO, digesting: bool) -> None:
        self._raw = raw
        self._digesting = digesting
        self.bytes = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        """Yes."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most so many bytes; none at the end."""
        chunk = self._raw.read(size)
        self.bytes += len(chunk)
        if self._digesting:
            self.digest.update(chunk)
        return chunk


def decompressed(raw: BinaryIO, source: Any = None) -> Any:
    """A binary stream of the file's content; the compression is told by its first bytes."""
    head = raw.read(4)
    raw.seek(0)
    for magic, compression in _COMPRESSED.items():
        if head.startswith(magic):
            return pa.CompressedInputStream(pa.PythonFile(source or raw, mode="r"), compression)
    return source or raw


def chunks_of(stream: Any, size: int) -> Iterator[bytes]:
    """A text, so many bytes at a time; blank lines at its end are left out, and its last line has an end.

    Raises:
        NotPlainError: it cannot be read to its end.
    """
    held = b""
    while chunk := _filled(stream, size):
        if held:
            yield held
        held = chunk
    if held:
        yield held.rstrip(b"\n") + b"\n"


def _filled(stream: Any, size: int) -> bytes:
    parts: list[bytes] = []
    try:
        while size and (part := stream.read(size)):
            parts.append(part)
            size -= len(part)
    except OSError:
        raise NotPlainError from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def records(stream: Any, delimiter: str) -> Iterator[list[str]]:
    """The records of a text log, slowly; bytes that are not UTF-8 become lone surrogates."""
    readable = io.BufferedReader(_Readable(stream))
    text = io.TextIOWrapper(readable, encoding="utf-8-sig", errors="surrogateescape", newline="")
    return (record for record in csv.reader(text, delimiter=delimiter) if record)


class _Readable(io.RawIOBase):
    """Gives an Arrow stream the interface of Python's buffered readers."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)
