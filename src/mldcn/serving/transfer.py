"""A batch's tensors on their way to the device that computes: one copy of one piece of memory, quantised rows as
they lie in their tables.

On a GPU the copy runs beside the computation of the batch before: it has a stream of its own, and starts from
memory that is pinned, in one of a few buffers that are used again when their copy is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mldcn.serving.store import Kind, unpacked

_ALIGNED = 64  # bytes on which each tensor begins
_BUFFERS = 3  # one that is filled, one on its way, one that waits


@dataclass(frozen=True)
class PackedRows:
    """Rows of a table as they lie there, ``(..., row_bytes)``, to be unpacked on the device."""

    data: Tensor
    kind: Kind
    width: int

    def numbers(self) -> Tensor:
        """``(..., e)`` float32."""
        return unpacked(self.data, self.kind, self.width)


class Transfer:
    """Sends nested lists and tuples of tensors and :class:`PackedRows` to a device.

    Several threads may send at the same time, and others receive.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._free: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def send(self, tensors: Any) -> Callable[[], Any]:
        """Copies the tensors into one buffer and begins to send it.

        Returns:
            What gives them on the device, the packed rows as float32, to whoever computes there next.
        """
        leaves, spec = tree_flatten(tensors)
        places, size = _places([_raw(leaf) for leaf in leaves])
        buffer = self._buffer(size)
        for leaf, start in zip(leaves, places, strict=True):
            raw = _raw(leaf)
            target = buffer[start : start + raw.nbytes].view(raw.dtype).view(raw.shape)
            target.copy_(raw)
        if self._stream is None:
            there, done = buffer[:size].to(self.device, copy=True), None
        else:
            with torch.cuda.stream(self._stream):
                there = buffer[:size].to(self.device, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(self._stream)
        with self._lock:
            # Whoever takes it next waits until its copy is done.
            self._free.append((buffer, done))

        def receive() -> Any:
            if done is not None:
                # What computes runs after the copy; the memory is not given to others before it has run.
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(done)
                there.record_stream(stream)
            return tree_unflatten(
                [_opened(there, start, leaf) for leaf, start in zip(leaves, places, strict=True)], spec
            )

        return receive

    def _buffer(self, size: int) -> Tensor:
        with self._lock:
            fitting = [
                i
                for i, (buffer, done) in enumerate(self._free)
                if len(buffer) >= size and (done is None or done.query())  # type: ignore[no-untyped-call]
            ]
            if fitting or len(self._free) >= _BUFFERS:
                buffer, done = self._free.pop(fitting[0] if fitting else 0)
            else:
                buffer, done = None, None
        if done is not None:
            done.synchronize()
        if buffer is None or len(buffer) < size:
            room = 1 << max(size - 1, 1).bit_length()
            buffer = torch.empty(room, dtype=torch.uint8, pin_memory=self._stream is not None)
        return buffer


def _raw(leaf: Tensor | PackedRows) -> Tensor:
    return leaf.data if isinstance(leaf, PackedRows) else leaf


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins in the buffer, and the buffer's bytes."""
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    return places, end


def _opened(there: Tensor, start: int, leaf: Tensor | PackedRows) -> Tensor:
    raw = _raw(leaf)
    tensor = there[start : start + raw.nbytes].view(raw.dtype).view(raw.shape)
    return PackedRows(tensor, leaf.kind, leaf.width).numbers() if isinstance(leaf, PackedRows) else tensor
