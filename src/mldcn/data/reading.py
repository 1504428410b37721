"""Streams a log (CSV, TSV or Parquet; plain, gzip or zstd; one file or many) as blocks of bounded size.

Text is never guessed at: the columns of a text log come as strings, those of a Parquet log in their own types.
Memory holds one read buffer and one block of rows; a Parquet row group is read whole.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq

from mldcn.config import DataConfig, suggest
from mldcn.errors import UserError

Format = Literal["csv", "tsv", "parquet"]

READ_BYTES = 4 << 20
_FORMATS: dict[str, Format] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_ENDINGS = (".gz", ".zst")


@dataclass(frozen=True)
class RawBlock:
    """Some consecutive rows of one file, as they were read.

    ``first_row`` is the number of the block's first row in its file; the first row below the header is 1.
    """

    table: pa.Table
    file: str
    first_row: int

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def error(self, index: int, column: str, value: object, problem: str) -> UserError:
        """An error that names the file, the row, the column and the value."""
        return UserError(
            f"{self.file}: row {self.first_row + index}, column {column!r}: {shown(value)} {problem}"
        )


def shown(value: object) -> str:
    """A value as an error prints it, cut where it is long."""
    text = "an empty cell" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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

    def blocks(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[RawBlock]:
        """See :func:`open_log`."""
        self.bytes_done = 0
        for path, kind, size in zip(self.files, self.formats, self.sizes, strict=True):
            before = self.bytes_done
            if size == 0:
                raise UserError(f"{path}: is empty; remove it from the data's files or write it again")
            source = self._parquet if kind == "parquet" else self._text
            rows = 0
            for table in _reblocked(source(path, columns, optional), self.data.block_rows):
                yield RawBlock(_without_missing(table, self.data.missing, kind), str(path), rows + 1)
                rows += table.num_rows
            if rows == 0:
                raise UserError(f"{path}: holds no rows; remove it from the data's files or write it again")
            self.bytes_done = before + size

    def names(self, path: Path, kind: Format) -> list[str]:
        """The columns that a file has.

        Raises:
            UserError: the file has no readable header.
        """
        if kind == "parquet":
            with _parquet_file(path) as file:
                return list(file.schema_arrow.names)
        if not self.data.header:
            if not self.data.column_names:
                raise UserError(f"{path}: data.header is false, so data.column_names must name the columns")
            return list(self.data.column_names)
        with path.open("rb") as raw:
            if path.stat().st_size == 0:
                raise UserError(f"{path}: is empty; remove it from the data's files or write it again")
            try:
                first = next(_records(_decompressed(raw), _delimiter(kind)), None)
            except (OSError, csv.Error, ValueError) as error:
                raise UserError(
                    f"{path}: its header cannot be read ({error}); write the file again"
                ) from None
        if not first or _undecodable(first):
            raise UserError(f"{path}: its first line is no header in UTF-8; write the file again in UTF-8")
        return first

    def _wanted(self, path: Path, kind: Format, columns: Sequence[str], optional: Sequence[str]) -> list[str]:
        names = self.names(path, kind)
        for name in columns:
            if name not in names:
                raise UserError(f"{path}: has no column {name!r}{suggest(name, names)}")
        wanted = list(dict.fromkeys([*columns, *(name for name in optional if name in names)])) or names
        twice = [name for name, count in Counter(names).items() if count > 1 and name in wanted]
        if twice:
            raise UserError(f"{path}: column {twice[0]!r} is there twice; rename one of them")
        return wanted

    def _text(self, path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[pa.Table]:
        kind: Format = "tsv" if _format(path, self.data) == "tsv" else "csv"
        wanted = self._wanted(path, kind, columns, optional)
        before = self.bytes_done
        with path.open("rb") as raw:
            counted = _Counted(raw, self._digesting)
            try:
                reader = arrow_csv.open_csv(
                    _decompressed(raw, counted),
                    read_options=arrow_csv.ReadOptions(
                        block_size=READ_BYTES,
                        use_threads=False,
                        column_names=None if self.data.header else list(self.data.column_names),
                    ),
                    parse_options=arrow_csv.ParseOptions(
                        delimiter=_delimiter(kind), newlines_in_values=True, ignore_empty_lines=True
                    ),
                    convert_options=arrow_csv.ConvertOptions(
                        column_types=dict.fromkeys(wanted, pa.string()),
                        include_columns=wanted,
                        null_values=list(self.data.missing),
                        strings_can_be_null=True,
                    ),
                )
                for batch in reader:
                    yield pa.Table.from_batches([batch])
                    self.bytes_done = before + counted.bytes
            except (pa.ArrowInvalid, OSError) as error:
                raise self._text_error(path, kind, error) from None
            if self._digesting:
                self.digests[str(path)] = counted.digest.hexdigest()

    def _text_error(self, path: Path, kind: Format, error: Exception) -> UserError:
        """Finds the row that the fast parser could not read, in a slow pass of its own."""
        names = self.names(path, kind)
        row = 0
        with path.open("rb") as raw:
            try:
                for record in _records(_decompressed(raw), _delimiter(kind)):
                    if row == 0 and self.data.header:
                        row = 1
                        continue
                    number = row if self.data.header else row + 1
                    if len(record) != len(names):
                        remedy = "mend or remove the row"
                        if number == 1:
                            remedy = "check data.format, data.header and data.column_names"
                        return UserError(
                            f"{path}: row {number} has {len(record)} columns, expected {len(names)}; {remedy}"
                        )
                    bad = _undecodable(record)
                    if bad is not None:
                        return UserError(
                            f"{path}: row {number}, column {names[bad]!r}: {_as_bytes(record[bad])} is not UTF-8; "
                            "write the file again in UTF-8"
                        )
                    row += 1
            except (OSError, EOFError, pa.ArrowInvalid) as cut:
                read = row - 1 if self.data.header else row
                return UserError(
                    f"{path}: the compressed file is cut short or damaged after row {max(read, 0)} ({cut}); "
                    "copy it again"
                )
            except csv.Error as problem:
                return UserError(f"{path}: row {row + 1} cannot be read ({problem}); mend or remove the row")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if row == 0:
            return UserError(f"{path}: holds no rows; remove it from the data's files or write it again")
        return UserError(f"{path}: cannot be read as {kind.upper()} ({reason})")

    def _parquet(self, path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[pa.Table]:
        wanted = self._wanted(path, "parquet", columns, optional)
        before, size = self.bytes_done, path.stat().st_size
        rows = 0
        try:
            with _parquet_file(path) as file:
                total = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(
                    batch_size=self.data.block_rows, columns=wanted, use_threads=True
                ):
                    rows += batch.num_rows
                    yield pa.Table.from_batches([batch]).select(wanted)
                    self.bytes_done = before + size * rows // total
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise UserError(
                f"{path}: damaged Parquet file, unreadable after row {rows} ({_first_line(error)}); copy it again"
            ) from None
        if self._digesting:
            self.digests[str(path)] = digest(path)


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
    """BLAKE2b of a file's bytes, 128 bits, in hexadecimal."""
    value = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value.update(chunk)
    return value.hexdigest()


class _Counted(io.RawIOBase):
    """A file that counts what is read from it, and digests it if asked."""

    def __init__(self, raw: BinaryIO, digesting: bool) -> None:
        self._raw = raw
        self._digesting = digesting
        self.bytes = 0
        self.digest = hashlib.blake2b(digest_size=16)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        chunk = self._raw.read(size)
        self.bytes += len(chunk)
        if self._digesting:
            self.digest.update(chunk)
        return chunk


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


def _delimiter(kind: Format) -> str:
    return "\t" if kind == "tsv" else ","


def _decompressed(raw: BinaryIO, source: Any = None) -> Any:
    """A binary stream of the file's content; the compression is told by its first bytes."""
    head = raw.read(4)
    raw.seek(0)
    for magic, compression in _COMPRESSED.items():
        if head.startswith(magic):
            return pa.CompressedInputStream(pa.PythonFile(source or raw, mode="r"), compression)
    return pa.PythonFile(source or raw, mode="r")


def _records(stream: Any, delimiter: str) -> Iterator[list[str]]:
    """The records of a text log, slowly; bytes that are not UTF-8 become lone surrogates."""
    text = io.TextIOWrapper(
        io.BufferedReader(_Readable(stream)), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )
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


def _undecodable(record: list[str]) -> int | None:
    for index, field in enumerate(record):
        try:
            field.encode("utf-8")
        except UnicodeEncodeError:
            return index
    return None


def _as_bytes(field: str) -> str:
    """A text that is not UTF-8 as an error prints it: the wrong bytes in hexadecimal."""
    text = field.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return f"'{text}'" if len(text) <= 78 else f"'{text[:75]}..."


def _parquet_file(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{path}: no readable Parquet file ({_first_line(error)}); copy it again") from None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _reblocked(tables: Iterator[pa.Table], block_rows: int) -> Iterator[pa.Table]:
    """Tables of exactly ``block_rows`` rows, the last one shorter, each column in one chunk."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        if rows < block_rows:
            continue
        joined = pa.concat_tables(held)
        whole = rows - rows % block_rows
        for start in range(0, whole, block_rows):
            yield joined.slice(start, block_rows).combine_chunks()
        held, rows = [joined.slice(whole)], rows - whole
    if rows:
        yield pa.concat_tables(held).combine_chunks()


def _without_missing(table: pa.Table, missing: tuple[str, ...], kind: Format) -> pa.Table:
    """Texts that mean a missing value become nulls in a Parquet log too, so that both kinds of log agree."""
    if kind != "parquet":
        return table
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            column = table.column(index)
            is_missing = pc.is_in(column, value_set=pa.array(missing, field.type))
            if pc.any(is_missing).as_py():
                table = table.set_column(
                    index, field.name, pc.if_else(is_missing, pa.scalar(None, field.type), column)
                )
    return table
