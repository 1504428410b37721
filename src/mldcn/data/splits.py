"""Which rows are for training, validation and test. Nothing but these rules looks at a row before the fit."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from mldcn.config import ColumnSplit, HashSplit, OrderSplit, TimeSplit
from mldcn.data import cells
from mldcn.data.hashing import hash_numbers, hash_texts, splitmix64
from mldcn.data.reading import RawBlock

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
TRAIN, VALID, TEST, LEFT_OUT = 0, 1, 2, 3

Parts = NDArray[np.int8]


class HashRule:
    """Random by a keyed hash: of the named columns' texts, or of the row's number in the whole log."""

    def __init__(self, split: HashSplit) -> None:
        self._split = split
        self.columns = split.columns

    def parts(self, block: RawBlock, first: int) -> Parts:
        """The part of each row, ``(n,)``; ``first`` is the number of the first one in the whole log, from 0."""
        split = self._split
        if split.columns:
            keys = np.zeros(len(block), np.uint64)
            for name in split.columns:
                keys = splitmix64(keys ^ hash_texts(cells.texts(block, name), split.seed))
        else:
            keys = hash_numbers(first + block.positions(), split.seed)
        # The upper 53 bits: a uniform number in [0, 1) that float64 holds exactly.
        uniform = (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53
        rest = np.where(uniform < split.test + split.valid, VALID, TRAIN)
        return np.where(uniform < split.test, TEST, rest).astype(np.int8)

    def remedy(self, part: Part) -> str:
        """What helps where a part came out empty."""
        return _raise_share(part)


class ColumnRule:
    """A column's text says it."""

    def __init__(self, split: ColumnSplit) -> None:
        self._split = split
        self.columns = (split.column,)
        self.seen: Counter[str] = Counter()

    def parts(self, block: RawBlock, first: int) -> Parts:
        """The part of each row, ``(n,)``; rows with another value are left out."""
        coded = cells.texts(block, self._split.column).dictionary_encode()
        values = coded.dictionary.to_pylist()
        self.seen.update(values if len(self.seen) < 100 else ())
        names = {self._split.train: TRAIN, self._split.valid: VALID, self._split.test: TEST}
        parts = np.array([*(names.get(value, LEFT_OUT) for value in values), LEFT_OUT], np.int8)
        codes = pc.fill_null(coded.indices, len(values)).to_numpy(zero_copy_only=False)
        found: Parts = parts[codes]
        return found

    def remedy(self, part: Part) -> str:
        """What helps where a part came out empty."""
        seen = ", ".join(sorted(str(value) for value in self.seen)[:10])
        return (
            f"no cell of column {self._split.column!r} is {getattr(self._split, part)!r}; set data.split.{part} "
            f"to one of its values: {seen}"
        )


class ThresholdRule:
    """By the event's time, or by the row's number where no time column is given.

    Rows at or above ``test_from`` are test rows, those at or above ``valid_from`` validation rows; rows of one
    time always fall together.
    """

    def __init__(self, time: str | None, valid_from: float, test_from: float) -> None:
        self.columns: tuple[str, ...] = () if time is None else (time,)
        self._valid_from, self._test_from = valid_from, test_from

    @property
    def bounds(self) -> tuple[float, float]:
        """Where validation and test rows begin."""
        return self._valid_from, self._test_from

    def parts(self, block: RawBlock, first: int) -> Parts:
        """The part of each row, ``(n,)``; ``first`` is the number of the first one in the whole log, from 0."""
        at = row_times(block, self.columns[0]) if self.columns else first + block.positions()
        rest = np.where(at >= self._valid_from, VALID, TRAIN)
        return np.where(at >= self._test_from, TEST, rest).astype(np.int8)

    def remedy(self, part: Part) -> str:
        """What helps where a part came out empty."""
        return _raise_share(part)


def _raise_share(part: Part) -> str:
    if part == "train":
        return "lower data.split.valid and test, or give a longer log"
    return f"raise data.split.{part}, or give a longer log"


Rule = HashRule | ColumnRule | ThresholdRule


def order_rule(split: OrderSplit, rows: int) -> ThresholdRule:
    """The rule for a log of so many rows."""
    test_from = rows - round(rows * split.test)
    return ThresholdRule(None, test_from - round(rows * split.valid), test_from)


def row_times(block: RawBlock, name: str) -> cells.Floats:
    """The times of rows, none missing.

    Raises:
        UserError: a row has no time.
    """
    return cells.known_times(block, name, cells.times(block, name))


class TimesOnDisk:
    """All rows' times in a temporary file, of which exact order statistics are taken in bounded memory."""

    def __init__(self, folder: Path) -> None:
        handle, name = tempfile.mkstemp(prefix=".times-", dir=folder)
        self._path = Path(name)
        self._file = os.fdopen(handle, "wb")
        self.rows = 0

    def add(self, times: cells.Floats) -> None:
        """Appends times."""
        self._file.write(times.tobytes())
        self.rows += len(times)

    def rule(self, split: TimeSplit, column: str) -> ThresholdRule:
        """The rule that puts the newest shares of rows apart."""
        self._file.flush()
        tests = round(self.rows * split.test)
        valids = round(self.rows * split.valid)
        test_from = self._smallest(self.rows - tests) if tests else np.inf
        valid_from = self._smallest(self.rows - tests - valids) if tests + valids else np.inf
        return ThresholdRule(column, valid_from, test_from)

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _smallest(self, rank: int) -> float:
        """The time at a place (from 0) of the sorted order: 16 bits of it a pass, from the highest."""
        prefix = np.uint64(0)
        for level in range(4):
            shift = np.uint64(48 - 16 * level)
            counts = np.zeros(1 << 16, np.int64)
            for bits in self._ordered():
                if level:
                    bits = bits[bits >> (shift + np.uint64(16)) == prefix]
                counts += np.bincount(
                    ((bits >> shift) & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16
                )
            through = np.cumsum(counts)
            digit = int(np.searchsorted(through, rank, side="right"))
            rank -= int(through[digit - 1]) if digit else 0
            prefix = (prefix << np.uint64(16)) | np.uint64(digit)
        # The inverse of _ordered.
        sign = np.uint64(1 << 63)
        bits = np.array([prefix ^ sign if prefix & sign else ~prefix], np.uint64)
        return float(bits.view(np.float64)[0])

    def _ordered(self) -> Iterator[NDArray[np.uint64]]:
        """The times' bits, mapped so that they sort as unsigned numbers like the times."""
        sign = np.uint64(1 << 63)
        with self._path.open("rb") as file:
            while chunk := file.read(8 << 20):
                # Adding zero makes -0.0 the same time as 0.0.
                bits = (np.frombuffer(chunk, np.float64) + 0.0).view(np.uint64)
                yield np.where(bits & sign, ~bits, bits | sign)
