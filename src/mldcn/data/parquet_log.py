"""One Parquet file as pieces of some rows, each column in its own type. Pages are streamed, row groups not held.

What a column holds at a time is one page, its dictionary page and a small read buffer. Where the writer stored
checksums of pages, they are checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mldcn.config import DataConfig
from mldcn.data.rejects import Reject
from mldcn.data.text_log import Piece
from mldcn.errors import UserError

# Rows and bytes read at a time, where a row is not larger than that.
_BATCH_ROWS = 8_192
_BATCH_BYTES = 4 << 20
_BUFFER_BYTES = 256 << 10
# More elements than a list of the metadata has: a damaged length keeps the reader busy for so long.
_LONGEST_LIST = 100_000
# What a damaged file makes the reader raise; it also builds Python objects from damaged names and numbers.
_DAMAGE = (
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
)


class ParquetLog:
    """One file.

    Args:
        path: the file.
        data: the log's format.
    """

    def __init__(self, path: Path, data: DataConfig) -> None:
        self._path = path
        self._data = data
        self.share_done = 0.0

    def names(self) -> list[str]:
        """The columns.

        Raises:
            UserError: this is no readable Parquet file.
        """
        with self._open() as file:
            return list(file.schema_arrow.names)

    def _open(self) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(
                self._path,
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                page_checksum_verification=True,
                thrift_container_size_limit=_LONGEST_LIST,
            )
            [name.encode() for name in file.schema_arrow.names]
        except _DAMAGE as error:
            raise UserError(
                f"{self._path}: no readable Parquet file ({_first_line(error)}); copy it again"
            ) from None
        return file

    def pieces(self, wanted: Sequence[str]) -> Iterator[Piece]:
        """The rows, in order.

        Raises:
            UserError: the file is damaged.
        """
        rows = 0
        with self._open() as file:
            try:
                total = file.metadata.num_rows
                size = _batch_rows(file.metadata, self._data.block_rows)
                for batch in file.iter_batches(batch_size=size, columns=list(wanted), use_threads=True):
                    table = _plain(pa.Table.from_batches([batch]).select(list(wanted)))
                    first, rows = rows + 1, rows + batch.num_rows
                    self.share_done = rows / max(total, rows, 1)
                    yield self._checked(table, first)
            except UserError:
                raise
            except _DAMAGE as error:
                raise UserError(
                    f"{self._path}: damaged Parquet file, unreadable after row {rows} ({_first_line(error)}); "
                    "copy it again"
                ) from None
        if rows != total:
            raise UserError(
                f"{self._path}: damaged Parquet file: it says {total} rows and has {rows}; copy it again"
            )

    def _checked(self, table: pa.Table, first: int) -> Piece:
        """Leaves out rows whose texts are not UTF-8, and knows the texts that mean a missing value."""
        skip = self._data.on_error == "skip"
        bad: dict[int, Reject] = {}
        for name in table.column_names:
            for index, value in _not_utf8(table.column(name)):
                problem = "is not UTF-8; write the file again in UTF-8"
                bad.setdefault(index, Reject(str(self._path), first + index, name, value, problem))
        if bad and not skip:
            raise UserError(str(next(iter(bad.values()))))
        numbers = np.arange(first, first + table.num_rows)
        if bad:
            good = np.setdiff1d(np.arange(table.num_rows), list(bad), assume_unique=True)
            table, numbers = table.take(good), numbers[good]
        rejects = tuple(sorted(bad.values(), key=lambda reject: reject.row))
        return Piece(_without_missing(table, self._data.missing), numbers if skip else None, rejects)


def _batch_rows(metadata: pq.FileMetaData, block_rows: int) -> int:
    """How many rows to read at a time: fewer where rows are large, by what the file says of itself."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1.0)
    return int(min(max(_BATCH_BYTES / max(largest, 1.0), 1), _BATCH_ROWS, block_rows))


def _plain(table: pa.Table) -> pa.Table:
    """The table with its dictionaries decoded."""
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(field.type.value_type))
    return table


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _not_utf8(column: pa.ChunkedArray) -> Iterator[tuple[int, str]]:
    """Rows that hold a text which is not UTF-8, and the text; the format promises that there are none."""
    kind = column.type
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not _is_text(kind.value_type if nested else kind):
        return
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        binary = pa.large_binary()
        for index, value in enumerate(column.cast(pa.large_list(binary) if nested else binary).to_pylist()):
            texts = (value or []) if nested else [value]
            for text in texts:
                try:
                    (text or b"").decode()
                except UnicodeDecodeError:
                    yield index, text.decode("utf-8", "backslashreplace")
                    break


def _without_missing(table: pa.Table, missing: tuple[str, ...]) -> pa.Table:
    """Texts that mean a missing value become nulls, as in a text log."""
    for index, field in enumerate(table.schema):
        if _is_text(field.type):
            column = table.column(index)
            is_missing = pc.is_in(column, value_set=pa.array(missing, field.type))
            if pc.any(is_missing).as_py():
                table = table.set_column(
                    index, field.name, pc.if_else(is_missing, pa.scalar(None, field.type), column)
                )
    return table


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
