"""Embedding tables in files of their own, read by memory map: the pages that are in use lie in memory once,
for all processes that serve them.

``fp32`` and ``bf16`` files hold a table's rows one after another, little-endian. An ``int8`` row of e numbers is
4 bytes scale, 4 bytes offset (float32) and e codes of a byte each; it stands for ``offset + scale * code``, with
``offset`` the row's smallest number and ``scale`` a 255th of the row's range. So a number is off by at most half a
scale, (max - min) / 510, beside the rounding of float32; one of bf16 by at most 1/256 of its size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mldcn.errors import UserError
from mldcn.files import atomic

Kind = Literal["fp32", "bf16", "int8"]
KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8")
_HEAD = 8  # bytes of scale and offset before an int8 row's codes
_LEVELS = 255
_CHUNK = 1 << 16  # rows written at a time


def row_bytes(kind: Kind, width: int) -> int:
    """Bytes of a row of ``width`` numbers."""
    return {"fp32": 4 * width, "bf16": 2 * width, "int8": _HEAD + width}[kind]


def write_table(weight: Tensor, path: Path, kind: Kind) -> None:
    """Writes a table ``(N, e)`` atomically, in bounded memory beside the table itself."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        for start in range(0, len(weight), _CHUNK):
            file.write(packed(weight[start : start + _CHUNK].detach().float().cpu(), kind).numpy().tobytes())


def packed(weight: Tensor, kind: Kind) -> Tensor:
    """Rows ``(n, e)`` float32 as bytes ``(n, row_bytes)``."""
    if kind == "fp32":
        return weight.contiguous().view(torch.uint8)
    if kind == "bf16":
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8)
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    # In float64: the range of two large numbers may be more than float32 holds.
    scale = ((high.double() - low.double()) / _LEVELS).float()
    step = torch.where(scale > 0, scale, 1.0).double()
    codes = ((weight.double() - low.double()) / step).round().clamp(0, _LEVELS)
    return torch.cat([torch.cat([scale, low], 1).view(torch.uint8), codes.to(torch.uint8)], 1)


def unpacked(rows: Tensor, kind: Kind) -> Tensor:
    """The inverse of :func:`packed`, as float32; of any shape ``(..., row_bytes)``."""
    if kind == "fp32":
        return rows.view(torch.float32)
    if kind == "bf16":
        return rows.view(torch.bfloat16).float()
    head = rows[..., :_HEAD].reshape(-1).view(torch.float32).view(*rows.shape[:-1], 2)
    return torch.addcmul(head[..., 1:], rows[..., _HEAD:].float(), head[..., :1])


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
        # A private mapping: nobody writes to it, and PyTorch takes only arrays that could be written to.
        mapped = np.memmap(path, np.uint8, "c", shape=(rows, size)) if rows else np.zeros((0, size), np.uint8)
        self._bytes = torch.from_numpy(mapped)
        # What PyTorch can look up as numbers needs no second step.
        self._numbers = self._bytes.view(torch.float32) if kind == "fp32" else None

    def look_up(self, rows: Tensor) -> Tensor:
        """Rows ``(B, n)`` as ``(B, n, e)`` float32."""
        if self._numbers is not None:
            return functional.embedding(rows, self._numbers)
        flat = self._bytes.index_select(0, rows.reshape(-1))
        return unpacked(flat, self.kind).view(*rows.shape, self.width)
