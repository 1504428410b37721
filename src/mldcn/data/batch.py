"""``Batch``, the tensors of some rows, and ``EncodedLayout``, which says what each of their columns is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mldcn.layout import Source

# The first rows of every table. Vocabulary ids start behind them.
MISSING = 0
OUT_OF_VOCABULARY = 1
RESERVED_ROWS = 2


@dataclass(frozen=True)
class IdSlot:
    """Columns ``start .. start + length * hashes`` of ``Batch.ids``: one feature's table rows.

    ``length`` is 1 for a single id; lists are padded with ``MISSING`` at the end (sequences: newest first).
    With ``hashes`` 2 the columns are ``length`` first hashes, then ``length`` second ones; rows are summed.
    ``role`` is ``actions`` for the actions beside a sequence, else ``values``.
    """

    feature: str
    table: str
    source: Source
    start: int
    length: int
    hashes: int = 1
    kind: Literal["categorical", "multi", "sequence"] = "categorical"
    role: Literal["values", "actions"] = "values"

    @property
    def columns(self) -> slice:
        """The slot's columns of ``Batch.ids``."""
        return slice(self.start, self.start + self.length * self.hashes)


@dataclass(frozen=True)
class DenseSlot:
    """Columns ``start .. start + width`` of ``Batch.dense``.

    ``times`` beside a sequence are log(1 + time since the event), padded with 0.
    """

    feature: str
    source: Source
    start: int
    width: int
    kind: Literal["numeric", "embedding", "sequence"] = "numeric"

    @property
    def columns(self) -> slice:
        """The slot's columns of ``Batch.dense``."""
        return slice(self.start, self.start + self.width)


@dataclass(frozen=True)
class EncodedLayout:
    """What the columns of encoded rows are. ``tables`` maps each table to its number of rows."""

    ids: tuple[IdSlot, ...]
    dense: tuple[DenseSlot, ...]
    tables: dict[str, int]
    tasks: tuple[str, ...]
    num_positions: int = 0

    @property
    def num_id_columns(self) -> int:
        """Columns of ``Batch.ids``."""
        return sum(slot.length * slot.hashes for slot in self.ids)

    @property
    def num_dense_columns(self) -> int:
        """Columns of ``Batch.dense``."""
        return sum(slot.width for slot in self.dense)

    def to_json(self) -> dict[str, Any]:
        """The layout as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> EncodedLayout:
        """The inverse of :meth:`to_json`."""
        return cls(
            ids=tuple(IdSlot(**slot) for slot in raw["ids"]),
            dense=tuple(DenseSlot(**slot) for slot in raw["dense"]),
            tables=dict(raw["tables"]),
            tasks=tuple(raw["tasks"]),
            num_positions=int(raw["num_positions"]),
        )


@dataclass(frozen=True)
class Batch:
    """Some encoded rows.

    ids: ``(B, C)`` int32, rows of tables. dense: ``(B, D)`` float32. labels: ``(B, T)`` float32, NaN where
    unknown. weight: ``(B,)`` float32. position: ``(B,)`` int32, 0 where unknown.
    """

    ids: Tensor
    dense: Tensor
    labels: Tensor
    weight: Tensor
    position: Tensor

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return Batch(
            *(
                tensor.to(device, non_blocking=non_blocking)
                for tensor in (self.ids, self.dense, self.labels, self.weight, self.position)
            )
        )
