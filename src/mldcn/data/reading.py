"""Streams a log (CSV, TSV or Parquet; plain, gzip or zstd; one file or many) as blocks of bounded size.

Text is never guessed at: the columns of a text log come as strings, those of a Parquet log in their own types.
Memory holds one read buffer and one block of rows: at most ``data.block_rows`` of them, and some 16 MiB.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn.config import DataConfig, suggest
from mldcn.data.located import Located, NotPlainError
from mldcn.data.parquet_log import ParquetLog
from mldcn.data.rejects import BadRows, Reject, described
from mldcn.data.text_log import Piece, TextLog
from mldcn.errors import UserError

Format = Literal["csv", "tsv", "parquet"]

# A block that has reached so many bytes takes no more rows.
BLOCK_BYTES = 16 << 20
_FORMATS: dict[str, Format] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
_ENDINGS = (".gz", ".zst")


@dataclass(frozen=True)
class RawBlock:
    """Some rows of one file, as they were read.

    first_row: the number of the block's first row in its file; the first row below the header is 1.
    numbers: each row's number in its file, where rows of the block may have been left out; None if none was.
    rejects: the rows of the block's range that were left out. skip: leave out bad rows, do not stop at them.
    """

    rows: pa.Table | Located
    file: str
    first_row: int
    numbers: NDArray[np.int64] | None = None
    rejects: tuple[Reject, ...] = ()
    skip: bool = False

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def table(self) -> pa.Table:
        """The rows as a table."""
        return self.rows.table() if isinstance(self.rows, Located) else self.rows

    @property
    def span(self) -> int:
        """The number of rows of the file that the block stands for, those left out included."""
        return len(self) + len(self.rejects)

    def positions(self) -> NDArray[np.int64]:
        """Each row's place in the block's range, from 0, ``(n,)``; rows left out have places too."""
        if self.numbers is None:
            return np.arange(len(self))
        return self.numbers - self.first_row

    def error(self, column: str, found: Iterable[tuple[int, object, str]]) -> BadRows:
        """An error that names the file, the row, the column, the value and the problem.

        Args:
            column: the column.
            found: (index of the row in the block, value, problem), the first row first. Unless bad rows are
                skipped, only the first is taken.
        """
        rejects: dict[int, Reject] = {}
        message = None
        for index, value, problem in found:
            if index not in rejects:
                row = self.first_row + index if self.numbers is None else int(self.numbers[index])
                text = "" if value is None else str(value)
                rejects[index] = Reject(self.file, row, column, text, problem)
                message = message or described(rejects[index], value)
            if not self.skip:
                break
        return BadRows(rejects, message)

    def without(self, bad: BadRows) -> RawBlock:
        """The block with some rows left out."""
        good = np.setdiff1d(np.arange(len(self)), list(bad.rejects), assume_unique=True)
        numbers = self.first_row + np.arange(len(self)) if self.numbers is None else self.numbers
        rejects = sorted([*self.rejects, *bad.rejects.values()], key=lambda reject: reject.row)
        return replace(self, rows=self.rows.take(good), numbers=numbers[good], rejects=tuple(rejects))


def open_log(
    files: Sequence[str | Path], data: DataConfig, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[RawBlock]:
    """The named columns of a log, in blocks of ``data.block_rows`` rows; no block spans two files.

    Args:
        files: files, folders or glob patterns, read in this order (a folder's and a pattern's files by name).
        data: the log's format.
        columns: the columns to read; none means all.
        optional: columns that are read where the log has them.

    Raises:
        UserError: a file or a column is missing or damaged.
    """
    return LogReader(files, data).blocks(columns, optional)


def table_blocks(table: pa.Table, block_rows: int) -> Iterator[RawBlock]:
    """An Arrow table in memory, cut like a log; errors call it ``table``."""
    for start in range(0, table.num_rows, block_rows):
        yield RawBlock(table.slice(start, block_rows).combine_chunks(), "table", start + 1)


class LogReader:
    """Reads a log and counts: ``bytes_done`` of ``bytes_total``, and, if asked, a digest of each file.

    Raises:
        UserError: a file is missing, empty, or of no known format.
    """

    def __init__(self, files: Sequence[str | Path], data: DataConfig, *, digests: bool = False) -> None:
        self.files = expand(files)
        self._digesting = digests
        self.data = data
        self.formats = [_format(path, data) for path in self.files]
        self.sizes = [path.stat().st_size for path in self.files]
        self.bytes_done = 0
        self.digests: dict[str, str] = {}

    @property
    def bytes_total(self) -> int:
        """Bytes of all files as they lie on the disk."""
        return sum(self.sizes)

    def blocks(
        self,
        columns: Sequence[str],
        optional: Sequence[str] = (),
        numbers: Collection[str] = (),
        ids: Collection[str] | None = None,
    ) -> Iterator[RawBlock]:
        """See :func:`open_log`.

        Args:
            columns: the columns to read; none means all.
            optional: columns that are read where the log has them.
            numbers: those of ``columns`` that nothing but numbers is made of: where a text log has only numbers
                there, they come as numbers.
            ids: those that single ids are made of. Where this is given, the rows of a plain text log are only
                located.
        """
        self.bytes_done = 0
        skip = self.data.on_error == "skip"
        for path, kind, size in zip(self.files, self.formats, self.sizes, strict=True):
            before = self.bytes_done
            if size == 0:
                raise UserError(f"{path}: is empty; remove it from the data's files or write it again")
            row = 1
            for rows, own, rejects in self._cuts(path, kind, columns, optional, numbers, ids):
                block = RawBlock(rows, str(path), row, own, rejects, skip)
                row += block.span
                yield block
            if row == 1:
                raise UserError(f"{path}: holds no rows; remove it from the data's files or write it again")
            self.bytes_done = before + size

    def names(self, path: Path, kind: Format) -> list[str]:
        """The columns that a file has.

        Raises:
            UserError: the file has no readable header.
        """
        return self._log(path, kind).names()

    def _log(self, path: Path, kind: Format) -> TextLog | ParquetLog:
        if kind == "parquet":
            return ParquetLog(path, self.data)
        delimiter = self.data.delimiter or ("\t" if kind == "tsv" else ",")
        return TextLog(path, self.data, delimiter, digesting=self._digesting)

    def _wanted(
        self, path: Path, names: list[str], columns: Sequence[str], optional: Sequence[str]
    ) -> list[str]:
        lacking = [name for name in columns if name not in names]
        if lacking:
            others = f", nor {len(lacking) - 1} others that are asked for" if len(lacking) > 1 else ""
            raise UserError(f"{path}: has no column {lacking[0]!r}{others}{suggest(lacking[0], names)}")
        wanted = list(dict.fromkeys([*columns, *(name for name in optional if name in names)])) or names
        twice = [name for name, count in Counter(names).items() if count > 1 and name in wanted]
        if twice:
            raise UserError(f"{path}: column {twice[0]!r} is there twice; rename one of them")
        return wanted

    def _cuts(
        self,
        path: Path,
        kind: Format,
        columns: Sequence[str],
        optional: Sequence[str],
        numbers: Collection[str],
        ids: Collection[str] | None,
    ) -> Iterator[tuple[pa.Table | Located, NDArray[np.int64] | None, tuple[Reject, ...]]]:
        """What the blocks of one file are made of: rows, their numbers, and those left out."""
        before, rows = self.bytes_done, 0
        log = self._log(path, kind)
        if ids is not None and isinstance(log, TextLog):
            wanted = self._wanted(path, log.names(), columns, optional)
            with contextlib.suppress(NotPlainError):
                for located in log.located(wanted, ids, numbers, BLOCK_BYTES):
                    self.bytes_done = before + log.bytes_done
                    yield located, None, ()
                    rows += located.num_rows
                if self._digesting:
                    self.digests[str(path)] = log.digest
                return
        # The parser begins at the beginning, where it finds the same rows.
        pieces = _behind(rows, self._pieces(path, kind, columns, optional, numbers))
        for cut in _Reblocker(self.data.block_rows).blocks(pieces):
            yield cut.table, cut.numbers, cut.rejects

    def _pieces(
        self,
        path: Path,
        kind: Format,
        columns: Sequence[str],
        optional: Sequence[str],
        numbers: Collection[str],
    ) -> Iterator[Piece]:
        log = self._log(path, kind)
        wanted = self._wanted(path, log.names(), columns, optional)
        before, size = self.bytes_done, path.stat().st_size
        for piece in log.pieces(wanted, numbers) if isinstance(log, TextLog) else log.pieces(wanted):
            yield piece
            done = log.bytes_done if isinstance(log, TextLog) else int(size * log.share_done)
            self.bytes_done = before + done
        if self._digesting:
            self.digests[str(path)] = log.digest if isinstance(log, TextLog) else digest(path)


def expand(files: Sequence[str | Path]) -> list[Path]:
    """Files, the files of folders, and those that patterns match, as paths.

    Raises:
        UserError: a file is missing, or a folder or pattern holds none.
    """
    found: list[Path] = []
    for name in files:
        path = Path(name)
        if path.is_dir():
            parts = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] not in "._")
        elif path.exists():
            parts = [path]
        else:
            parts = sorted(Path(p) for p in glob.glob(str(name)))
        if not parts:
            there = path.parent.iterdir() if path.parent.is_dir() else ()
            hint = suggest(path.name, [p.name for p in there]) if not path.is_dir() else ": an empty folder"
            raise UserError(f"{path}: no such file{hint if hint != '; known: ' else ''}")
        found += parts
    if not found:
        raise UserError("data.train names no file; give the log's files there")
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value.update(chunk)
    return value.hexdigest()


def _format(path: Path, data: DataConfig) -> Format:
    if data.format != "auto":
        return data.format
    name = path.with_suffix("") if path.suffix in _ENDINGS else path
    if name.suffix not in _FORMATS:
        raise UserError(
            f"{path}: its ending says no format ({', '.join(_FORMATS)}, each also with .gz or .zst); "
            "rename it, or set data.format to csv, tsv or parquet"
        )
    return _FORMATS[name.suffix]


def _behind(rows: int, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Pieces without their first rows, which are all good."""
    for piece in pieces:
        given = min(rows, piece.table.num_rows)
        rows -= given
        numbers = None if piece.numbers is None else piece.numbers[given:]
        if not given:
            yield piece
        elif given < piece.table.num_rows or piece.rejects:
            yield Piece(piece.table.slice(given), numbers, piece.rejects)


class _Reblocker:
    """Makes blocks of pieces: exactly ``block_rows`` rows each, fewer where they are large and at the end.

    A block comes with its rows' numbers, and the rejects before its last row.
    """

    def __init__(self, block_rows: int) -> None:
        self._block_rows = block_rows
        self._tables: list[pa.Table] = []
        self._numbers: list[NDArray[np.int64]] = []
        self._rejects: deque[Reject] = deque()
        self._rows = self._bytes = 0

    def blocks(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The blocks of one file; each column in one chunk."""
        for piece in pieces:
            # A block's columns have one type, though a text log's may turn from numbers to texts.
            if self._tables and self._tables[0].schema != piece.table.schema:
                if self._rows:
                    yield self._cut(self._rows)
                self._tables = []
            self._tables.append(piece.table)
            if piece.numbers is not None:
                self._numbers.append(piece.numbers)
            self._rejects += piece.rejects
            self._rows += piece.table.num_rows
            self._bytes += piece.table.nbytes
            while self._rows >= self._block_rows:
                yield self._cut(self._block_rows)
            if self._bytes >= BLOCK_BYTES:
                yield self._cut(self._rows)
        if self._rows:
            last = self._cut(self._rows)
            yield replace(last, rejects=(*last.rejects, *self._rejects))
        elif self._rejects:
            last = self._cut(0)
            yield replace(last, rejects=tuple(self._rejects))

    def _cut(self, rows: int) -> Piece:
        joined = pa.concat_tables(self._tables)
        table, rest = joined.slice(0, rows).combine_chunks(), joined.slice(rows)
        self._tables, self._rows, self._bytes = [rest], rest.num_rows, rest.nbytes if rest.num_rows else 0
        if not self._numbers:
            return Piece(table)
        joined_numbers = np.concatenate(self._numbers)
        numbers, self._numbers = joined_numbers[:rows], [joined_numbers[rows:]]
        rejects: list[Reject] = []
        while self._rejects and rows and self._rejects[0].row < numbers[-1]:
            rejects.append(self._rejects.popleft())
        return Piece(table, numbers, tuple(rejects))
