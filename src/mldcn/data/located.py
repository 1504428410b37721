"""Rows of a text log where they lie in its bytes: ids and whole numbers are read without making a text of each.

This is the fast way through a log without quotes, where every delimiter and line end is one. It finds exactly the
rows that the parser of :mod:`mldcn.data.text_log` gives; what is not plain (quotes, carriage returns, blank lines,
rows with too few or too many columns, bytes that are not UTF-8) it leaves to that parser.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mldcn.data.hashing import WORD_MASKS, Keys

Floats = NDArray[np.float64]
Longs = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Behind a text, so that twelve bytes can be read from each of its cells.
_SPARE = 16
# What is worked on at a time: it should stay in a core's cache, yet take long enough that another thread can get
# hold of the interpreter in the meantime.
_SLICE_BYTES = 1 << 20
_NEWLINE = ord("\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MINUS = np.uint64(ord("-"))
_ZEROS = np.uint64(0x3030303030303030)
# Eight digits as a number: neighbours are joined, three times (Lemire 2018, "parse eight digits").
_JOINS = [
    (np.uint64(mask), np.uint64(factor), np.uint64(shift))
    for mask, factor, shift in (
        (0x0F0F0F0F0F0F0F0F, 10 * 2**8 + 1, 8),
        (0x00FF00FF00FF00FF, 100 * 2**16 + 1, 16),
        (0x0000FFFF0000FFFF, 10_000 * 2**32 + 1, 32),
    )
]


class NotPlainError(Exception):
    """The text needs a parser."""


@dataclass(frozen=True)
class Wanted:
    """What to read of a file.

    names: all its columns, in order. columns: those to be read; of these, ``ids`` that single ids and ``numbers``
    that numbers are made of. missing: texts that mean a missing value.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    ids: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @cached_property
    def missing_words(self) -> Keys:
        """The missing texts of up to 8 bytes, as words."""
        texts = [text.encode() for text in self.missing if "\0" not in text]
        return np.array([int.from_bytes(text, "little") for text in texts if len(text) <= 8], np.uint64)


@dataclass(frozen=True)
class Located:
    """Rows whose cells lie in ``text``: row i begins at ``firsts[i]``, and its cell j ends at ``ends[i, j]``."""

    wanted: Wanted
    text: NDArray[np.uint8]
    firsts: NDArray[np.int32]
    ends: NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.firsts)

    @property
    def column_names(self) -> list[str]:
        """The columns that can be read."""
        return list(self.wanted.columns)

    def take(self, rows: Any) -> Located:
        """Some of the rows, by number or slice."""
        return replace(self, firsts=self.firsts[rows], ends=self.ends[rows])

    def table(self) -> pa.Table:
        """All columns as texts."""
        return pa.table({name: self.column(name) for name in self.wanted.columns})

    def column(self, name: str) -> pa.Array:
        """A column as texts, missing ones null."""
        place, words = self.wanted.names.index(name), self._words
        starts = self.firsts.astype(np.int64) if place == 0 else self.ends[:, place - 1] + np.int64(1)
        lengths = self.ends[:, place] - starts
        # Views, as Arrow lays them out: a length, then up to 12 bytes, or the first 4, a zero and the place.
        views = np.empty((self.num_rows, 2), np.uint64)
        head = words[starts] & WORD_MASKS.take(lengths, mode="clip") & np.uint64(2**32 - 1)
        views[:, 0] = lengths.view(np.uint64) | head << np.uint64(32)
        views[:, 1] = words[starts + 4] & WORD_MASKS.take(lengths - 4, mode="clip")
        long = lengths > 12
        views[long, 1] = starts[long].view(np.uint64) << np.uint64(32)
        buffers = [None, pa.py_buffer(views), pa.py_buffer(self.text)]
        texts = pa.Array.from_buffers(pa.string_view(), self.num_rows, buffers).cast(pa.string())
        missing = pc.is_in(texts, pa.array(self.wanted.missing, pa.string()))
        return pc.if_else(missing, pa.scalar(None, pa.string()), texts) if pc.any(missing).as_py() else texts

    def id_words(self, name: str) -> Keys | None:
        """The ids of a column as words of 8 bytes, ``(n,)``; None unless all are that short."""
        words, short, _, _ = self._read
        place = self.wanted.ids.index(name) if name in self.wanted.ids else -1
        return words[place] if place >= 0 and short[place] else None

    def whole_numbers(self, name: str) -> Floats | None:
        """The numbers of a column, NaN where missing, ``(n,)``; None unless all are whole, of up to 8 digits."""
        _, _, numbers, whole = self._read
        place = self.wanted.numbers.index(name) if name in self.wanted.numbers else -1
        if place < 0 or not whole[place]:
            return None
        # Who keeps a column does not keep others that are of no use.
        found: Floats = numbers[place]
        return found if whole.all() else found.copy()

    @property
    def _read(self) -> tuple[Keys, Bools, Floats, Bools]:
        """The ids' words, and whether all of a column are short; numbers, and whether all are whole."""
        # Python 3.11's cached_property has one lock for all objects: threads would wait for one another's blocks.
        if "_found" not in self.__dict__:
            self.__dict__["_found"] = self._find()
        found: tuple[Keys, Bools, Floats, Bools] = self.__dict__["_found"]
        return found

    def _find(self) -> tuple[Keys, Bools, Floats, Bools]:
        rows, wanted = self.num_rows, self.wanted
        ids, numbers = (
            np.array([wanted.names.index(name) for name in names], np.int64)
            for names in (wanted.ids, wanted.numbers)
        )
        words, short = np.empty((len(wanted.ids), rows), np.uint64), np.ones(len(wanted.ids), bool)
        values, whole = np.empty((len(wanted.numbers), rows), np.float64), np.ones(len(wanted.numbers), bool)
        size = int(self.ends[-1, -1] - self.firsts[0]) if rows else 0
        step = max(1, rows * _SLICE_BYTES // max(size, 1))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            stops = np.empty((len(wanted.names) + 1, len(self.firsts[part])), np.int64)
            stops[0] = self.firsts[part] - 1
            stops[1:] = self.ends[part].T
            found, lengths = self._cells(stops, ids)
            np.bitwise_and(found, WORD_MASKS.take(lengths, mode="clip"), out=words[:, part])
            short &= (lengths <= 8).all(axis=1)
            values[:, part], odd = _whole_numbers(*self._cells(stops, numbers), wanted.missing_words)
            whole &= ~odd.any(axis=1)
        return words, short, values, whole

    def _cells(self, stops: Longs, columns: Longs) -> tuple[Keys, Longs]:
        """The 8 bytes from the beginning of each cell on, and the cells' lengths; by column.

        Args:
            stops: where the rows before end, and then their cells, ``(1 + all columns, n)``.
            columns: those to read.
        """
        starts, ends = stops.take(columns, axis=0), stops.take(columns + 1, axis=0)
        starts += 1
        ends -= starts
        # By one number each: NumPy is slower where places have two axes.
        return self._words[starts.ravel()].reshape(starts.shape), ends

    @cached_property
    def _words(self) -> Keys:
        """The 8 bytes from each byte of the text on."""
        words: Keys = np.ndarray((len(self.text) - 7,), "<u8", buffer=self.text, strides=(1,))
        return words


def _whole_numbers(words: Keys, lengths: Longs, missing: Keys) -> tuple[Floats, Bools]:
    """Texts as numbers; and which are neither missing nor whole numbers of up to 8 digits, or 7 below 0.

    Args:
        words: the 8 bytes from the beginning of each text on.
        lengths: of the texts.
        missing: the texts that mean a missing number.
    """
    values, odd = _digits(words, lengths)
    absent = lengths == 0 if 0 in missing else np.zeros(lengths.shape, bool)
    others = missing[missing != 0]
    if len(others):
        masked = words & WORD_MASKS.take(lengths, mode="clip")
        for word in others:
            absent |= (masked == word) & (lengths <= 8)
    np.copyto(values, np.nan, where=absent)
    odd &= ~absent
    if odd.any():
        # The odd ones may be negative.
        at = np.nonzero(odd)
        found, still = _digits(words[at] >> np.uint64(8), lengths[at] - 1)
        values[at] = -found
        odd[at] = still | ((words[at] & np.uint64(0xFF)) != _MINUS)
    return values, odd


def _digits(words: Keys, lengths: Longs) -> tuple[Floats, Bools]:
    """Texts of 1 to 8 digits as numbers; and which texts are something else."""
    # The last digit comes into the last byte; what is behind it falls off, zeros come before the first.
    digits = words ^ _ZEROS
    digits <<= ((8 - lengths) << 3).view(np.uint64)
    # A digit's upper half is 0, also when 6 is added.
    above = digits + np.uint64(0x7676767676767676)
    above |= digits
    above &= np.uint64(0x8080808080808080)
    odd = above != 0
    odd |= (lengths - 1).view(np.uint64) > 7
    for mask, factor, by in _JOINS:
        digits &= mask
        digits *= factor
        digits >>= by
    return digits.view(np.int64).astype(np.float64), odd


def locate(
    chunks: Iterable[bytes], wanted: Wanted, delimiter: str, block_rows: int, block_bytes: int
) -> Iterator[Located]:
    """The rows of a text, in blocks of ``block_rows`` rows, or fewer that take ``block_bytes``.

    Args:
        chunks: the text without its header, to its last line end; every one holds a line end.
        wanted: what to read of it.
        delimiter: between columns.
        block_rows: a block has no more rows.
        block_bytes: a block that has reached so many bytes takes no more rows.

    Raises:
        NotPlainError: the rows that follow need a parser.
    """
    rows = _Rows(wanted, ord(delimiter))
    for chunk in chunks:
        rows.add(chunk)
        if rows.count >= block_rows or rows.taken >= block_bytes:
            yield from rows.blocks(block_rows, block_bytes)
    yield from rows.blocks(block_rows, 0)


class _Rows:
    """Text that no block has taken, and where its cells end."""

    def __init__(self, wanted: Wanted, delimiter: int) -> None:
        if len(wanted.names) < 2:
            raise NotPlainError  # a blank line would look like a row
        self._wanted = wanted
        self._delimiter = delimiter
        self._texts: list[NDArray[np.uint8]] = []
        self._ends: list[NDArray[np.int32]] = []
        self._size = self._marks = 0
        # Line ends, and what stands behind the last one.
        self.count = 0
        self._tail = b""

    @property
    def taken(self) -> int:
        """What the rows take."""
        return self._size + 4 * self._marks

    def add(self, chunk: bytes) -> None:
        """Appends text."""
        last = chunk.rfind(b"\n") + 1
        if not last or b'"' in chunk or b"\r" in chunk or b"\0" in chunk:
            raise NotPlainError
        if not (chunk.isascii() and self._tail.isascii()):
            _check_utf8(self._tail + chunk[:last])
        self._tail = chunk[last:]
        text = np.frombuffer(chunk, np.uint8)
        for start in range(0, len(text), _SLICE_BYTES):
            part = text[start : start + _SLICE_BYTES]
            lines = part == _NEWLINE
            self.count += int(np.count_nonzero(lines))
            lines |= part == self._delimiter
            ends = np.flatnonzero(lines).astype(np.int32)
            ends += np.int32(self._size + start)
            self._ends.append(ends)
            self._marks += len(ends)
        self._texts.append(text)
        self._size += len(text)

    def blocks(self, block_rows: int, block_bytes: int) -> Iterator[Located]:
        """Gives the rows away, except for a few that may become a whole block."""
        columns, rows = len(self._wanted.names), self.count
        if not rows:
            return
        text = np.concatenate([*self._texts, np.zeros(_SPARE, np.uint8)])
        marks = np.concatenate(self._ends)
        # There are as many line ends as rows: if each row ends with one, none stands elsewhere.
        if len(marks) < rows * columns:
            raise NotPlainError
        ends = marks[: rows * columns].reshape(rows, columns)
        if (text[ends[:, -1]] != _NEWLINE).any():
            raise NotPlainError
        firsts = np.zeros(rows, np.int32)
        np.add(ends[:-1, -1], 1, out=firsts[1:])
        located = Located(self._wanted, text, firsts, ends)
        whole = rows - rows % block_rows
        if self.taken * (rows - whole) >= block_bytes * rows:
            whole = rows
        for start in range(0, whole, block_rows):
            yield located.take(slice(start, min(start + block_rows, whole)))
        cut = int(ends[whole - 1, -1]) + 1 if whole else 0
        self._texts = [text[cut : self._size].copy()]
        self._ends = [marks[whole * columns :] - np.int32(cut)]
        self._size -= cut
        self._marks -= whole * columns
        self.count -= whole


def _check_utf8(text: bytes) -> None:
    buffers = [None, pa.py_buffer(np.array([0, len(text)], np.int32)), pa.py_buffer(text)]
    try:
        pa.Array.from_buffers(pa.string(), 1, buffers).validate(full=True)
    except pa.ArrowInvalid:
        raise NotPlainError from None


def without_header(chunks: Iterator[bytes], names: tuple[str, ...] | None, delimiter: str) -> Iterator[bytes]:
    """A text from its first row on.

    Args:
        chunks: the text.
        names: what its first line says; None if that is a row.
        delimiter: between columns.

    Raises:
        NotPlainError: the first line says something else, or says it with quotes.
    """
    first = next(chunks, b"")
    if first.startswith(_BYTE_ORDER_MARK):
        raise NotPlainError
    if names is not None:
        header = delimiter.join(names).encode() + b"\n"
        if not first.startswith(header):
            raise NotPlainError
        first = first[len(header) :]
    if first:
        yield first
    yield from chunks
