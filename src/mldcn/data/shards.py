"""Encoded rows on disk: uncompressed Arrow files read by memory map, and batches gathered from them.

The shuffle: the rows are cut into chunks of ``CHUNK_ROWS`` neighbours, the chunks are dealt to windows that fit
into memory, and a window's rows are permuted; a batch is one gather a matrix from the window. The chunks are
dealt by lot, but one to each window in turn: of every W chunks in a row each of the W windows gets one. So each
row comes once an epoch, any row can come anywhere in it, and each window is a sample of the whole log that
follows its order: in a log sorted by label, day or anything else the windows are alike. Up to one window's size
(a million rows, or less where rows are wide) it is a full shuffle. The order depends on (seed, epoch) and the
number of rows alone.
"""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mldcn.data.batch import Batch, EncodedLayout
from mldcn.data.encoder import EncodedBlock
from mldcn.errors import UserError
from mldcn.files import checksum, sync_file, sync_folder, write_text, writing

FORMAT = 1
CHUNK_ROWS = 4_096
WINDOW_ROWS = 1 << 20
WINDOW_BYTES = 256 << 20
# A file holds this many rows, or one block more.
FILE_ROWS = 1 << 20

_MANIFEST = "manifest.json"
_MATRICES = ("ids", "dense", "labels")
_BATCH = ("ids", "dense", "labels", "weight", "position")
_TYPES: dict[str, pa.DataType] = {
    "ids": pa.int32(),
    "dense": pa.float32(),
    "labels": pa.float32(),
    "weight": pa.float32(),
    "position": pa.int32(),
    "request": pa.int64(),
    "user": pa.int64(),
    "time": pa.float64(),
}


def _widths(layout: EncodedLayout) -> dict[str, int]:
    return {"ids": layout.num_id_columns, "dense": layout.num_dense_columns, "labels": len(layout.tasks)}


class ShardFiles:
    """Writes encoded blocks into files of a folder.

    Args:
        folder: the folder; it is made if need be.
        layout: what the columns are.
        files: what an earlier writer of the same rows had finished, as :attr:`files` told; go on behind them.
        flush: brings a finished file to the disk, at once or later.
    """

    def __init__(
        self,
        folder: Path,
        layout: EncodedLayout,
        files: Sequence[dict[str, Any]] = (),
        flush: Callable[[Path], object] = sync_file,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._flush = flush
        self._folder.mkdir(parents=True, exist_ok=True)
        # The finished ones, as the manifest describes them.
        self.files: list[dict[str, Any]] = list(files)
        self._blocks: list[int] = []
        self._sink: _Checked | None = None
        self._writer: Any = None
        self._widths = _widths(layout)
        # Arrow has no lists of length 0 worth the name: a matrix without columns is left out.
        self._schema = pa.schema(
            [
                (name, pa.list_(kind, self._widths[name]) if name in _MATRICES else kind)
                for name, kind in _TYPES.items()
                if self._widths.get(name, 1)
            ]
        )

    def write(self, block: EncodedBlock) -> bool:
        """Appends rows; says whether a file was finished with them."""
        if not len(block):
            return False
        if self._sink is None:
            self._sink = _Checked(self._folder / f"rows-{len(self.files):05}.arrow")
            self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), self._schema)
        arrays = []
        for field in self._schema:
            flat = pa.array(np.ascontiguousarray(getattr(block, field.name)).ravel(), _TYPES[field.name])
            wide = field.name in _MATRICES
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, self._widths[field.name]) if wide else flat)
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._blocks.append(len(block))
        if sum(self._blocks) < FILE_ROWS:
            return False
        self._end_file()
        return True

    def finish(self) -> None:
        """Writes what is left, and the manifest."""
        self._end_file()
        manifest = {
            "format": FORMAT,
            "rows": sum(sum(file["blocks"]) for file in self.files),
            "layout": self._layout.to_json(),
            "files": self.files,
        }
        write_text(self._folder / _MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")

    @property
    def path(self) -> Path | None:
        """The unfinished file."""
        return None if self._sink is None else self._folder / self._sink.name

    def close(self) -> None:
        """Gives an unfinished file back."""
        if self._sink is not None:
            self._sink.close()

    def _end_file(self) -> None:
        if self._sink is None:
            return
        self._writer.close()
        self._sink.close()
        self._flush(self._folder / self._sink.name)
        facts = {"bytes": self._sink.bytes, "crc32": f"{self._sink.crc:08x}"}
        self.files.append({"name": self._sink.name, "blocks": self._blocks, **facts})
        self._sink, self._blocks = None, []


class ShardWriter:
    """Writes encoded blocks into a folder that appears only when all is written and flushed.

    Use it as a context manager; when the block ends with an error, nothing is left behind.

    Args:
        folder: the folder to make; one that is there already is replaced.
        layout: what the columns are.
    """

    def __init__(self, folder: str | Path, layout: EncodedLayout) -> None:
        self._folder = Path(folder)
        self._temporary = self._folder.with_name(f".{self._folder.name}.partial")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._files = ShardFiles(self._temporary, layout)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._files.close()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def write(self, block: EncodedBlock) -> None:
        """Appends rows."""
        self._files.write(block)

    def close(self) -> None:
        """Flushes everything and gives the folder its name."""
        self._files.finish()
        replace_folder(self._temporary, self._folder)


class _Checked(io.RawIOBase):
    """A file being written, with its size and checksum."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._file = path.open("wb")
        self.crc = 0
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.bytes += len(data)
        with writing(self._path):
            return self._file.write(data)

    def close(self) -> None:
        if not self.closed:
            with writing(self._path):
                self._file.close()
        super().close()


def replace_folder(temporary: Path, folder: Path) -> None:
    """Gives a finished folder its name; what had the name before is removed."""
    sync_folder(temporary)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


class EncodedRows:
    """The rows of one split, memory-mapped.

    Args:
        folder: what a :class:`ShardWriter` wrote.

    Raises:
        UserError: the folder is missing, damaged, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / _MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version = manifest["format"]
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror or error}); encode the log again"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged; encode the log again") from None
        if version != FORMAT:
            raise UserError(
                f"{self.folder}: encoded rows of format {version}; this version of mldcn reads format {FORMAT}. "
                "Encode the log again"
            )
        try:
            self.layout = EncodedLayout.from_json(manifest["layout"])
            self._files: list[dict[str, Any]] = manifest["files"]
            self._opened = [self._open(file) for file in self._files]
            sizes = [
                (which, at, n) for which, f in enumerate(self._files) for at, n in enumerate(f["blocks"])
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error!r}); encode the log again") from None
        self._blocks = [(which, at) for which, at, _ in sizes]
        # starts[b] is the number of block b's first row; the last entry is the number of rows.
        self._starts = np.concatenate([[0], np.cumsum([n for *_, n in sizes])]).astype(np.int64)
        self._widths = _widths(self.layout)
        self._columns = [name for name in _TYPES if self._widths.get(name, 1)]
        # The byte of its file where each column of each block begins; -1 before the block is first looked at.
        # Kept as numbers: Arrow's own descriptions would come to lie between the large arrays that come and go
        # with the batches, and the allocator's heap would grow with the log by what no longer fits between them.
        self._places = np.full((len(self._blocks), len(self._columns)), -1, np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def verify(self) -> None:
        """Reads every file and compares checksums.

        Raises:
            UserError: a file was changed.
        """
        for file in self._files:
            path = self.folder / file["name"]
            if checksum(path) != file["crc32"]:
                raise UserError(f"{path}: damaged (its checksum is not the manifest's); encode the log again")

    @property
    def labels(self) -> NDArray[np.float32]:
        """All labels, ``(n, T)``, NaN where unknown."""
        return self.column("labels")

    def column(self, name: str) -> NDArray[Any]:
        """A whole column in memory: ``request``, ``user``, ``time``, ``weight``, ``position`` or ``labels``."""
        return self._gathered(name, [(0, len(self))])

    def pieces(self, names: Sequence[str], rows: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Columns as :meth:`column` names them, ``rows`` rows at a time in the log's order."""
        for start in range(0, len(self), rows):
            piece = [(start, min(start + rows, len(self)))]
            yield {name: self._gathered(name, piece) for name in names}

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        start_batch: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Batches of CPU tensors.

        Args:
            batch_size: rows in each; the last one may be shorter.
            shuffle: permute the rows, by (seed, epoch); without it they come in the log's order.
            seed: of the shuffle.
            epoch: of the shuffle; each has an order of its own.
            start_batch: begin with this batch; what is before it is not read.
            drop_last: leave out a last batch that is shorter.
        """
        next_row = start_batch * batch_size
        end = len(self) - len(self) % batch_size if drop_last else len(self)
        if not shuffle:
            for start in range(next_row, end, batch_size):
                piece = [(start, min(start + batch_size, end))]
                yield _batch({name: self._gathered(name, piece) for name in _BATCH})
            return
        out: dict[str, NDArray[Any]] = {}
        size = filled = 0
        for number, start, stop, pieces in self._windows(seed, epoch):
            if stop <= next_row or next_row >= end:
                continue
            window = {name: self._gathered(name, pieces) for name in _BATCH}
            order = np.random.default_rng([seed % 2**64, epoch, number + 1]).permutation(stop - start)
            while next_row < min(stop, end):
                if not filled:
                    size = min(batch_size, end - next_row)
                    out = {
                        name: np.empty((size, *array.shape[1:]), array.dtype)
                        for name, array in window.items()
                    }
                rows = order[next_row - start :][: size - filled]
                for name, array in window.items():
                    # mode: the row numbers are in range, and checking them would cost a second copy.
                    array.take(rows, axis=0, out=out[name][filled : filled + len(rows)], mode="clip")
                filled += len(rows)
                next_row += len(rows)
                # A batch may begin in one window and end in the next.
                if filled == size:
                    yield _batch(out)
                    filled = 0
            # Freed before the next window is read.
            del window, array

    def _windows(self, seed: int, epoch: int) -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
        """Number, first and last place in the epoch's order, and pieces of the log of each window."""
        rows = len(self)
        row_bytes = 4 * (sum(self._widths.values()) + 2)
        most = max(1, min(WINDOW_ROWS, WINDOW_BYTES // row_bytes) // CHUNK_ROWS)
        chunks = -(-rows // CHUNK_ROWS)
        windows = -(-chunks // most)
        lots = np.tile(np.arange(windows), (-(-chunks // max(windows, 1)), 1))
        window_of = np.random.default_rng([seed % 2**64, epoch, 0]).permuted(lots, axis=1).ravel()[:chunks]
        place = 0
        for number in range(windows):
            starts = (np.flatnonzero(window_of == number) * CHUNK_ROWS).tolist()
            pieces = [(start, min(start + CHUNK_ROWS, rows)) for start in starts]
            size = sum(stop - start for start, stop in pieces)
            yield number, place, place + size, pieces
            place += size

    def _gathered(self, name: str, pieces: list[tuple[int, int]]) -> NDArray[Any]:
        """Pieces of one column, copied end to end."""
        total = sum(stop - start for start, stop in pieces)
        shape = (total, self._widths[name]) if name in _MATRICES else (total,)
        result = np.empty(shape, _TYPES[name].to_pandas_dtype())
        filled = 0
        for start, stop in pieces:
            block = int(np.searchsorted(self._starts, start, side="right")) - 1
            while start < stop:
                first, last = int(self._starts[block]), min(stop, int(self._starts[block + 1]))
                count = last - start
                result[filled : filled + count] = self._mapped(block, name)[start - first : last - first]
                filled += count
                start, block = last, block + 1
        return result

    def _mapped(self, block: int, name: str) -> NDArray[Any]:
        """One column of one block, as it lies in the file."""
        rows, width = int(self._starts[block + 1] - self._starts[block]), self._widths.get(name, 1)
        kind = np.dtype(_TYPES[name].to_pandas_dtype())
        if width == 0:
            return np.empty((rows, 0), kind)
        which, at = self._blocks[block]
        reader, mapped = self._opened[which]
        column = self._columns.index(name)
        if self._places[block, column] < 0:
            batch = reader.get_batch(at)
            self._places[block] = [_values(batch, name).address - mapped.address for name in self._columns]
        place = int(self._places[block, column])
        values: NDArray[Any] = np.frombuffer(mapped, kind, rows * width, place)
        return values.reshape(rows, width) if name in _MATRICES else values

    def _open(self, file: dict[str, Any]) -> tuple[Any, pa.Buffer]:
        """A file's blocks, and its bytes, mapped."""
        path = self.folder / file["name"]
        remedy = "encode the log again"
        if not path.is_file():
            raise UserError(f"{path}: missing from the encoded rows; {remedy}")
        if path.stat().st_size != file["bytes"]:
            raise UserError(
                f"{path}: damaged ({path.stat().st_size} bytes, expected {file['bytes']}); {remedy}"
            )
        try:
            mapped = pa.memory_map(str(path)).read_buffer()
            reader = pa.ipc.open_file(mapped)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged ({error}); {remedy}") from None
        if reader.num_record_batches != len(file["blocks"]):
            raise UserError(f"{path}: damaged ({reader.num_record_batches} blocks); {remedy}")
        return reader, mapped


def _values(batch: pa.RecordBatch, name: str) -> pa.Buffer:
    """The bytes of a column's numbers."""
    column = batch.column(name)
    return (column.values if name in _MATRICES else column).buffers()[1]


def _batch(arrays: dict[str, NDArray[Any]]) -> Batch:
    return Batch(*(torch.from_numpy(arrays[name]) for name in _BATCH))
