"""One file of a text log (CSV, TSV; plain, gzip or zstd) as pieces of some rows, all columns as strings.

Rows are numbered as records: the first below the header is row 1, blank lines do not count, and a record with
line ends inside quotes counts once.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import math
import re
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
from numpy.typing import NDArray

from mldcn.config import DataConfig
from mldcn.data.located import Located, Wanted, locate, without_header
from mldcn.data.rejects import Reject
from mldcn.data.text_bytes import Counted, chunks_of, decompressed, records
from mldcn.errors import UserError

# What is read at a time; a row may be as long as this.
# Arrow reads up to 32 such pieces ahead.
READ_BYTES = 1 << 20
_SETTLING_SECONDS = 0.5
# What is decompressed at a time.
_STEP_BYTES = 32 << 10

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# A byte that is not UTF-8 goes through the parser as this noncharacter and two hexadecimal digits.
_MARK = "\ufdd0"
_MARKED = re.compile(_MARK + "([0-9a-f]{2})")
_SURROGATE = re.compile("[\udc80-\udcff]")
# The last record that the parser is given. It has one column too many: if the parser does not say so, then an open
# quote has swallowed it.
_END = _MARK + "end"


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of a file, and those among or before them that were left out.

    numbers: each row's number in the file; None where no row of the file may be left out.
    """

    table: pa.Table
    numbers: NDArray[np.int64] | None = None
    rejects: tuple[Reject, ...] = ()


class _NoNumber(Exception):
    """A cell is no finite number."""


class TextLog:
    """One file.

    Args:
        path: the file.
        data: the log's format.
        delimiter: between columns.
        digesting: whether to digest the file's bytes on the way.
    """

    def __init__(self, path: Path, data: DataConfig, delimiter: str, *, digesting: bool = False) -> None:
        self._path = path
        self._data = data
        self._delimiter = delimiter
        self._digesting = digesting
        self._counted: Counted | None = None

    @property
    def bytes_done(self) -> int:
        """Bytes of the file that were read."""
        return self._counted.bytes if self._counted is not None else 0

    @property
    def digest(self) -> str:
        """BLAKE2b of the file's bytes, where asked for, once all pieces were read."""
        assert self._counted is not None
        return self._counted.digest.hexdigest()

    def names(self) -> list[str]:
        """The columns.

        Raises:
            UserError: the file has no readable header.
        """
        path = self._path
        self._refuse_others()
        if not self._data.header:
            if not self._data.column_names:
                raise UserError(f"{path}: data.header is false, so data.column_names must name the columns")
            return list(self._data.column_names)
        with path.open("rb") as raw:
            try:
                first = next(records(decompressed(raw), self._delimiter), None)
            except (OSError, csv.Error, ValueError) as error:
                raise UserError(
                    f"{path}: its header cannot be read ({error}); write the file again"
                ) from None
        if first is None:
            raise UserError(f"{path}: holds no rows; remove it from the data's files or write it again")
        if any(_SURROGATE.search(name) for name in first):
            raise UserError(f"{path}: its first line is no header in UTF-8; write the file again in UTF-8")
        return first

    def _refuse_others(self) -> None:
        if self._path.stat().st_size == 0:
            raise UserError(f"{self._path}: is empty; remove it from the data's files or write it again")
        with self._path.open("rb") as raw:
            try:
                start = decompressed(raw).read(200)
            except OSError as error:
                raise self._cut(0, error) from None
        if start.startswith(_UTF16) or start.count(b"\0") * 4 > len(start):
            raise UserError(f"{self._path}: is in UTF-16 or no text; write it again in UTF-8")

    def _cut(self, rows: int, error: Exception) -> UserError:
        return UserError(
            f"{self._path}: the compressed file is cut short or damaged after row {rows} ({error}); copy it again"
        )

    def located(
        self, wanted: Sequence[str], ids: Collection[str], numbers: Collection[str], block_bytes: int
    ) -> Iterator[Located]:
        """The rows where they lie in the text, as blocks.

        Args:
            wanted: the columns.
            ids: those that single ids are made of.
            numbers: those that numbers are made of.
            block_bytes: a block that has reached so many bytes takes no more rows.

        Raises:
            NotPlainError: the next row can only be had from :meth:`pieces`.
        """
        data, names = self._data, tuple(self.names())
        single, numeric = (tuple(name for name in wanted if name in some) for some in (ids, numbers))
        what = Wanted(names, tuple(wanted), single, numeric, data.missing)
        with self._path.open("rb") as raw:
            self._counted = Counted(raw, self._digesting)
            chunks = chunks_of(decompressed(raw, self._counted), READ_BYTES)
            rows = without_header(chunks, names if data.header else None, self._delimiter)
            yield from locate(rows, what, self._delimiter, data.block_rows, block_bytes)

    def pieces(self, wanted: Sequence[str], numbers: Collection[str] = ()) -> Iterator[Piece]:
        """The rows, in order; the last piece may have none.

        Args:
            wanted: the columns.
            numbers: those to be read as numbers, which is faster. At the first cell that is no finite number,
                all are texts from there on.

        Raises:
            UserError: a row cannot be read, and bad rows are not skipped, or the rest of the file is lost.
        """
        done = 0
        if numbers:
            with contextlib.suppress(_NoNumber):
                for piece in self._pieces(wanted, numbers):
                    # Numbers whose sum is infinite though they are not are rare, and can be read as texts.
                    if not all(math.isfinite(pc.sum(piece.table[name]).as_py() or 0) for name in numbers):
                        raise _NoNumber
                    yield piece
                    done += 1
                return
        # The file is cut into the same pieces again.
        yield from islice(self._pieces(wanted, ()), done, None)

    def _pieces(self, wanted: Sequence[str], numbers: Collection[str]) -> Iterator[Piece]:
        names = self.names()
        lines = _Lines(str(self._path), names, self._data, self._delimiter)
        with self._path.open("rb") as raw:
            self._counted = Counted(raw, self._digesting)
            try:
                source = _Source(
                    decompressed(raw, self._counted), (_END + self._delimiter * len(names)).encode()
                )
                _UNFINISHED.add(source)
                for batch in self._batches(source, wanted, numbers, lines):
                    if numbers and source.damaged:
                        raise _NoNumber
                    yield lines.piece(pa.Table.from_batches([batch]), damaged=source.damaged)
                _UNFINISHED.discard(source)
            except (pa.ArrowException, OSError) as error:
                if numbers and "CSV conversion error" in str(error):
                    raise _NoNumber from None
                raise lines.problem or self._lost(lines, source.error or error) from None
        if source.error is not None:
            raise self._cut(lines.rows, source.error)
        if not lines.ended:
            raise lines.open_quote(lines.rows)
        yield lines.rest(_types(wanted, numbers))

    def _batches(
        self, source: Any, wanted: Sequence[str], numbers: Collection[str], lines: _Lines
    ) -> Iterator[pa.RecordBatch]:
        data = self._data
        reader = arrow_csv.open_csv(
            pa.PythonFile(source, mode="r"),
            read_options=arrow_csv.ReadOptions(
                block_size=READ_BYTES,
                use_threads=False,
                column_names=None if data.header else list(data.column_names),
            ),
            parse_options=arrow_csv.ParseOptions(
                delimiter=self._delimiter,
                newlines_in_values=True,
                ignore_empty_lines=True,
                invalid_row_handler=lines.malformed,
            ),
            convert_options=arrow_csv.ConvertOptions(
                # The source gives only UTF-8.
                check_utf8=False,
                column_types=_types(wanted, numbers),
                include_columns=list(wanted),
                null_values=list(data.missing),
                strings_can_be_null=True,
            ),
        )
        yield from reader

    def _lost(self, lines: _Lines, error: Exception) -> UserError:
        """What made the rest of the file unreadable."""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, OSError):
            return self._cut(lines.rows, error)
        if "straddling object" in reason:
            return UserError(
                f"{self._path}: row {lines.rows + 1} is longer than {READ_BYTES >> 20} MiB, or a quote in it is "
                "never closed; mend or remove the row"
            )
        return UserError(
            f"{self._path}: cannot be read after row {lines.rows} ({reason}); mend or remove the row that follows"
        )


def _types(wanted: Sequence[str], numbers: Collection[str]) -> dict[str, pa.DataType]:
    return {name: pa.float64() if name in numbers else pa.string() for name in wanted}


class _Lines:
    """Numbers the rows of a file, and knows those that are no rows."""

    def __init__(self, file: str, names: list[str], data: DataConfig, delimiter: str) -> None:
        self._file = file
        self._names = names
        self._delimiter = delimiter
        self._header = int(data.header)
        self._skip = data.on_error == "skip"
        self._malformed: deque[Reject] = deque()
        self.rows = 0
        self.ended = False
        self.problem: UserError | None = None

    def malformed(self, row: arrow_csv.InvalidRow) -> str:
        """Called by the parser, which may be ahead of the pieces."""
        if row.text.startswith(_END):
            self.ended = True
            return "skip"
        number = row.number - self._header
        if _END in row.text:
            self.problem = self.open_quote(number)
            return "error"
        problem = f"has {row.actual_columns} columns, expected {len(self._names)}; "
        if number == 1 and not self._skip:
            problem += "check data.format, data.delimiter, data.header and data.column_names"
        else:
            problem += "mend or remove the row"
        reject = Reject(self._file, number, "", _unmarked(row.text), problem)
        if self._skip:
            self._malformed.append(reject)
            return "skip"
        self.problem = UserError(str(reject))
        return "error"

    def open_quote(self, row: int) -> UserError:
        """The error of a last row that has swallowed all that follows."""
        return UserError(
            f"{self._file}: row {row}, the last: a quote in it is never closed, so all that follows is lost; "
            "close or remove the quote"
        )

    def piece(self, table: pa.Table, *, damaged: bool) -> Piece:
        """The rows that the parser gave next."""
        if not self._skip and not damaged:
            self.rows += table.num_rows
            return Piece(table)
        first, rejects = self.rows + 1, []
        after = first + table.num_rows
        while self._malformed and self._malformed[0].row < after:
            rejects.append(self._malformed.popleft())
            after += 1
        numbers = np.setdiff1d(
            np.arange(first, after), [reject.row for reject in rejects], assume_unique=True
        )
        self.rows = after - 1
        if damaged:
            bad = self._not_utf8(table, numbers)
            if bad and not self._skip:
                raise UserError(str(next(iter(bad.values()))))
            good = np.setdiff1d(np.arange(len(numbers)), list(bad), assume_unique=True)
            table, numbers = table.take(good), numbers[good]
            rejects = sorted([*rejects, *bad.values()], key=lambda reject: reject.row)
        return Piece(table, numbers if self._skip else None, tuple(rejects))

    def rest(self, types: dict[str, pa.DataType]) -> Piece:
        """What is left at the end: malformed lines after the last row."""
        rejects = tuple(self._malformed)
        self.rows += len(rejects)
        table = pa.table({name: pa.array([], kind) for name, kind in types.items()})
        return Piece(table, np.zeros(0, np.int64) if self._skip else None, rejects)

    def _not_utf8(self, table: pa.Table, numbers: NDArray[np.int64]) -> dict[int, Reject]:
        found: dict[int, Reject] = {}
        for name in table.column_names:
            column = table.column(name)
            marked = pc.fill_null(pc.match_substring(column, _MARK), False).to_numpy()
            for index in np.flatnonzero(marked).tolist():
                value = _unmarked(column[index].as_py())
                problem = "is not UTF-8; write the file again in UTF-8"
                found.setdefault(index, Reject(self._file, int(numbers[index]), name, value, problem))
        return dict(sorted(found.items()))


class _Source:
    """A text log's content for the parser: UTF-8 alone, and one record more at its end.

    A compressed file that is cut short or damaged ends with its last whole line; ``error`` then says why.

    Args:
        stream: the content.
        end: the record to add.
    """

    closed = False

    def __init__(self, stream: Any, end: bytes) -> None:
        self._stream = stream
        self._end = b"\n" + end + b"\n"
        self._held = b""
        self._ready = b""
        self.damaged = False
        self.error: OSError | None = None
        self._stopped = False

    def stop(self) -> None:
        """Ends the content here."""
        self._stopped = True

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        if self._stopped:
            return b""
        # Bytes that are not UTF-8 have made more of what was read: the rest alone may hold no line end.
        if len(self._ready) < size:
            self._ready += self._next(size - len(self._ready))
        given, self._ready = self._ready[:size], self._ready[size:]
        return given

    def _next(self, size: int) -> bytes:
        while True:
            chunk = self._read(size)
            if not chunk:
                rest, self._held = self._held + self._end, b""
                self._end = b""
                return self._clean(rest)
            chunk = self._held + chunk if self._held else chunk
            whole = _whole(chunk)
            self._held = chunk[whole:]
            if whole:
                return self._clean(chunk if whole == len(chunk) else chunk[:whole])

    def _read(self, size: int) -> bytes:
        if self.error is not None:
            return b""
        parts: list[bytes] = []
        try:
            while size > 0 and (part := self._stream.read(min(size, _STEP_BYTES))):
                parts.append(part)
                size -= len(part)
        except OSError as error:
            self.error = error
            whole = b"".join(parts)
            return whole[: max(whole.rfind(b"\n"), whole.rfind(b"\r")) + 1]
        return b"".join(parts)

    def _clean(self, chunk: bytes) -> bytes:
        ends = np.array([0, len(chunk)], np.int32)
        try:
            buffers = [None, pa.py_buffer(ends), pa.py_buffer(chunk)]
            pa.Array.from_buffers(pa.string(), 1, buffers).validate(full=True)
            return chunk
        except pa.ArrowInvalid:
            self.damaged = True
        text = chunk.decode("utf-8", "surrogateescape")
        return _SURROGATE.sub(lambda byte: f"{_MARK}{ord(byte[0]) - 0xDC00:02x}", text).encode()

    def close(self) -> None:
        """Nothing to do: whoever opened the file closes it."""

    def readable(self) -> bool:
        """Yes."""
        return True


# Sources whose end was not reached: after an error, or where nobody wanted the rest.
_UNFINISHED: weakref.WeakSet[_Source] = weakref.WeakSet()


@atexit.register
def _settle() -> None:
    """Lets Arrow's threads, which read ahead through Python, come to an end before Python does: else it aborts."""
    for source in _UNFINISHED:
        source.stop()
    if _UNFINISHED:
        time.sleep(_SETTLING_SECONDS)


def _whole(chunk: bytes) -> int:
    """How many bytes of a chunk are whole characters: the last one may be cut."""
    for back in range(1, min(4, len(chunk) + 1)):
        byte = chunk[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(chunk) - back if length > back else len(chunk)
    return len(chunk)


def _unmarked(text: str) -> str:
    """A text with the bytes that are not UTF-8 in hexadecimal."""
    return _MARKED.sub(r"\\x\1", text)
