"""Values of a program over requests and their candidates, in parts: see :mod:`mldcn.serving.rewriting`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Part:
    """Columns of a value: ``(R, ...)``, the same for all candidates of a request, or ``(N, ...)``."""

    tensor: Tensor
    shared: bool

    @property
    def width(self) -> int:
        """Its columns."""
        return int(self.tensor.shape[1])

    def cut(self, start: int, stop: int) -> Part:
        """Some of the columns."""
        return replace(self, tensor=self.tensor[:, start:stop])


@dataclass(frozen=True)
class Value:
    """What ``node`` gives: parts side by side along dimension 1, or a single one of any shape."""

    parts: tuple[Part, ...]
    node: fx.Node

    @property
    def shared(self) -> bool:
        """Whether all of it is the same for all candidates of a request."""
        return all(part.shared for part in self.parts)

    @property
    def mixed(self) -> bool:
        """Whether only some of it is."""
        return not self.shared and any(part.shared for part in self.parts)

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return self.parts[0].tensor.dim()

    def cut(self, start: int, stop: int) -> tuple[Part, ...]:
        """The parts of some columns."""
        found, at = [], 0
        for part in self.parts:
            low, high = max(start - at, 0), min(stop - at, part.width)
            if low < high:
                found.append(part if high - low == part.width else part.cut(low, high))
            at += part.width
        return tuple(found)

    def joined(self, *, shared: bool) -> Tensor:
        """Its shared columns, or the others, side by side."""
        found = [part.tensor for part in self.parts if part.shared is shared]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def columns(self, *, shared: bool) -> list[slice]:
        """Where these lie."""
        found, at = [], 0
        for part in self.parts:
            if part.shared is shared:
                found.append(slice(at, at + part.width))
            at += part.width
        return found


@dataclass(frozen=True)
class Normed:
    """What ``node`` gives: a LayerNorm over all columns of ``source``, put off."""

    source: Value
    node: fx.Node


@dataclass(frozen=True)
class Weight:
    """What ``node`` gives depends on no input."""

    node: fx.Node


@dataclass(frozen=True)
class Size:
    """A whole number that grows with the batch: for R requests, and for N candidates."""

    requests: Any
    rows: Any


def runs(flags: Sequence[bool], first: Tensor | None, own: Tensor | None, *, whole: bool) -> tuple[Part, ...]:
    """An input in parts. ``whole``: both tensors have all columns; else each has its own only."""
    found: list[Part] = []
    start, taken = 0, {True: 0, False: 0}
    for shared, run in groupby(flags):
        width = len(list(run))
        begin = start if whole else taken[shared]
        tensor = cast(Tensor, first if shared else own)
        found.append(Part(tensor[:, begin : begin + width], shared))
        taken[shared] += width
        start += width
    return tuple(found) or (Part(cast(Tensor, first), True),)
