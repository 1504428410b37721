"""Embedding tables in files of their own, read by memory map: the pages that are in use lie in memory once,
for all processes that serve them.

``fp32`` and ``bf16`` files hold a table's rows one after another, little-endian. Quantised rows hold codes, then
their scale and offset; a number is ``offset + scale * code``:

- ``int8``: e codes of a byte, scale and offset in float32: e + 8 bytes. The offset is the row's smallest number,
  the scale a 255th of its range.
- ``int4``: two codes a byte, the first in the lower half, scale and offset in float16: ceil(e / 2) + 4 bytes. The
  offset is the row's smallest number rounded down, the scale a 15th of what is from there to the largest, rounded
  up.

So a number is off by at most half a scale: for int8 by (max - min) / 510 of its row, beside the rounding of
float32; for int4 by (max - min + |min| / 1000) / 29.9 + 4e-8. One of bf16 is off by at most 1/256 of its size.
These are the rows that FBGEMM's kernels in PyTorch read.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mldcn.errors import UserError
from mldcn.files import atomic

Kind = Literal["fp32", "bf16", "int8", "int4"]
KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8", "int4")
_LEVELS = {"int8": 255, "int4": 15}
_CHUNK = 1 << 16  # rows written at a time
_READERS = 32  # threads that wait for the disk, each for another page
_FEW_WAITS = 8  # of one look-up, for which the threads are not worth it


def row_bytes(kind: Kind, width: int) -> int:
    """Bytes of a row of ``width`` numbers."""
    return {"fp32": 4 * width, "bf16": 2 * width, "int8": width + 8, "int4": (width + 1) // 2 + 4}[kind]


def write_table(weight: Tensor, path: Path, kind: Kind) -> None:
    """Writes a table ``(N, e)`` atomically, in bounded memory beside the table itself.

    Raises:
        UserError: it holds numbers that ``kind`` does not.
    """
    with atomic(path) as temporary, temporary.open("wb") as file:
        for start in range(0, len(weight), _CHUNK):
            file.write(packed(weight[start : start + _CHUNK].detach().float().cpu(), kind).numpy().tobytes())


def packed(weight: Tensor, kind: Kind) -> Tensor:
    """Rows ``(n, e)`` float32 as bytes ``(n, row_bytes)``.

    Raises:
        UserError: they hold numbers that ``kind`` does not.
    """
    if kind == "fp32":
        return weight.contiguous().view(torch.uint8)
    if kind == "bf16":
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8)
    # In float64: the range of two large numbers may be more than float32 holds.
    low, high = (each.double() for each in torch.aminmax(weight, dim=1, keepdim=True))
    if kind == "int8":
        scale, offset = ((high - low) / _LEVELS[kind]).float(), low.float()
    else:
        offset = _half(low, up=False)
        scale = _half((high - offset.double()) / _LEVELS[kind], up=True)
    if not (scale.isfinite().all() and offset.isfinite().all()):
        raise UserError(f"a table holds numbers too large for {kind} rows, or none; use --embeddings fp32")
    step = torch.where(scale > 0, scale, 1.0).double()
    codes = ((weight.double() - offset.double()) / step).round().clamp(0, _LEVELS[kind]).to(torch.uint8)
    if kind == "int4":
        even = functional.pad(codes, (0, codes.shape[1] % 2))
        codes = even[:, ::2] | (even[:, 1::2] << 4)
    return torch.cat([codes, torch.cat([scale, offset], 1).view(torch.uint8)], 1)


def _half(values: Tensor, *, up: bool) -> Tensor:
    """Float16 numbers that are not below (``up``) or not above the values; infinite where there are none."""
    with np.errstate(over="ignore"):
        exact = values.numpy()
        near = exact.astype(np.float16)
        beyond = near < exact if up else near > exact
        away = np.nextafter(near, np.float16(np.inf if up else -np.inf))
    return torch.from_numpy(np.where(beyond, away, near))


def unpacked(rows: Tensor, kind: Kind, width: int) -> Tensor:
    """The inverse of :func:`packed`, as float32 on the rows' device; of any shape ``(..., row_bytes)``."""
    if kind == "fp32":
        return rows.view(torch.float32)
    if kind == "bf16":
        return rows.view(torch.bfloat16).float()
    codes, scale, offset = parts(rows, kind)
    if kind == "int4":
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :width]
    return torch.addcmul(offset, codes.float(), scale)


def parts(rows: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Of quantised rows ``(..., row_bytes)`` the codes' bytes, and scale and offset ``(..., 1)`` float32."""
    size, dtype = (8, torch.float32) if kind == "int8" else (4, torch.float16)
    head = rows[..., -size:].reshape(-1).view(dtype).float().view(*rows.shape[:-1], 2)
    return rows[..., :-size], head[..., :1], head[..., 1:]


def gathered(table: Tensor, rows: Tensor, kind: Kind, width: int) -> Tensor:
    """Rows ``(n,)`` of a packed table ``(N, row_bytes)`` in memory, as ``(n, e)`` float32.

    One pass over what is read, by PyTorch's kernels of embeddings and of bags of quantised ones (here of one).
    """
    if kind == "fp32":
        return functional.embedding(rows, table.view(torch.float32))
    if kind == "bf16":
        return functional.embedding(rows, table.view(torch.bfloat16)).float()
    bags = torch.ops.quantized
    kernel = (
        bags.embedding_bag_byte_rowwise_offsets if kind == "int8" else bags.embedding_bag_4bit_rowwise_offsets
    )
    found: Tensor = kernel(table, rows, torch.arange(len(rows), dtype=rows.dtype))
    return found[:, :width]


class TableFile:
    """One table, open to be read.

    Args:
        path: the file.
        kind: how its numbers are written.
        rows: N.
        width: e.

    Raises:
        UserError: the file is missing, or of another size.
    """

    def __init__(self, path: Path, kind: Kind, rows: int, width: int) -> None:
        if sys.byteorder != "little":
            raise UserError(f"{path}: holds little-endian numbers, which this machine does not read")
        self.kind = kind
        self.width = width
        size = row_bytes(kind, width)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); export the run again") from None
        if found != rows * size:
            raise UserError(
                f"{path}: has {found} bytes, expected {rows * size}; export the run again or restore the file"
            )
        self._bytes = _mapped(path, rows, size)
        self._waits = False

    def look_up(self, rows: Tensor) -> Tensor:
        """Rows ``(B, n)`` as ``(B, n, e)`` float32."""
        flat = rows.reshape(-1)
        with self._watched(flat):
            found = gathered(self._bytes, flat, self.kind, self.width)
        return found.view(*rows.shape, self.width)

    def packed(self, rows: Tensor) -> Tensor:
        """Rows ``(n,)`` as they lie in the file, ``(n, row_bytes)``."""
        with self._watched(rows):
            return self._bytes.index_select(0, rows)

    @contextlib.contextmanager
    def _watched(self, rows: Tensor) -> Iterator[None]:
        """Around a look-up. When the last one waited for the disk, this one's rows are first touched by several
        threads: one alone would wait for one page after the other.
        """
        before = _page_waits()
        if self._waits:
            list(_readers().map(self._touch, [rows[i::_READERS] for i in range(_READERS)]))
        yield
        self._waits = _page_waits() - before > _FEW_WAITS

    def _touch(self, rows: Tensor) -> None:
        self._bytes[:, :1].index_select(0, rows)


def _page_waits() -> int:
    """Pages that this process has waited for until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, "table")


def _mapped(path: Path, rows: int, size: int) -> Tensor:
    if not rows * size:
        return torch.zeros((rows, size), dtype=torch.uint8)
    with path.open("rb") as file:
        # A private mapping: nobody writes to it, and PyTorch takes only arrays that could be written to.
        mapped = mmap.mmap(file.fileno(), rows * size, access=mmap.ACCESS_COPY)
    # Look-ups come in no order: what lies beside a row is not wanted more than what lies elsewhere.
    mapped.madvise(mmap.MADV_RANDOM)
    return torch.from_numpy(np.frombuffer(mapped, np.uint8).reshape(rows, size))
