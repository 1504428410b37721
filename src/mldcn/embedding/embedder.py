"""``Embedder``: the ids and dense columns of a batch become ``x0 (B, d)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mldcn import schema as spec
from mldcn.config import EmbeddingConfig, suggest
from mldcn.data.batch import MISSING, DenseSlot, EncodedLayout, IdSlot
from mldcn.embedding.fields import BatchNorm, FieldNorm, SequencePooling, pool
from mldcn.embedding.tables import TableStack
from mldcn.errors import UserError
from mldcn.layout import FieldKind, FieldLayout, Source

# By stack: one tensor (B, columns, e) for each group of id columns.
Rows = dict[str, tuple[Tensor, ...]]


class Embedder(nn.Module):
    """Turns encoded rows into ``x0``, one field a feature, in the schema's order.

    A categorical feature is its table's row (the sum of two where it has two hashes); the missing row is
    learned like any other. Lists and sequences are pooled over their real items: padding is no item, and an
    empty list is a zero vector. Numbers enter as they were encoded.

    Tables of one width lie in one weight, so that a batch needs one look-up a width. The gradients of these
    weights (:meth:`tables`) are sparse, with each row once: give them to an optimiser of
    ``mldcn.training.table_optim`` or to ``torch.optim.SparseAdam``. All other parameters are dense. Compile
    what follows the embedder rather than the embedder itself.

    Args:
        layout: what the columns of encoded rows are.
        schema: the meaning of the log.
        config: widths, initialisation, normalisation and dropout.

    Raises:
        UserError: ``config.dims`` names something without a table of its own, or a width is below 1.
        ValueError: layout and schema do not belong together.
    """

    def __init__(self, layout: EncodedLayout, schema: spec.Schema, config: EmbeddingConfig) -> None:
        super().__init__()
        plan = _Plan(layout, schema, table_widths(layout, schema, config))
        self.parts = nn.ModuleList(plan.parts)
        self.layout = FieldLayout.build(plan.fields)
        self.stacks = nn.ModuleDict({key: plan.stack(key, config.init_std) for key in plan.groups})
        self.norm: nn.Module | None = None
        if config.normalise == "l2":
            self.norm = FieldNorm(self.layout)
        elif config.normalise == "layer":
            self.norm = nn.LayerNorm(self.layout.width)
        elif config.normalise == "batch":
            self.norm = BatchNorm(self.layout.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """``x0 (B, d)``; its fields are in ``layout``.

        Args:
            ids: ``(B, C)`` int32 or int64, rows of tables.
            dense: ``(B, D)`` float32.

        Raises:
            UserError: an id lies outside its table (on CUDA a device-side assertion instead).
        """
        return self.assemble({key: stack(ids) for key, stack in self.stacks.items()}, ids, dense)

    def assemble(self, rows: Rows, ids: Tensor, dense: Tensor) -> Tensor:
        """``x0 (B, d)`` from rows that were looked up already; ``ids`` only tell what is padding."""
        pieces = [part(rows, ids, dense) for part in self.parts]
        x0 = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        if self.norm is not None:
            x0 = self.norm(x0)
        dropped: Tensor = self.dropout(x0)
        return dropped

    def tables(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are sparse in their rows: one for each width of table."""
        return {f"stacks.{key}.weight": stack.weight for key, stack in self._stacks()}

    def table(self, name: str) -> Tensor:
        """The rows ``(N, e)`` of one table: a view of the weight, outside of autograd.

        Raises:
            KeyError: no such table.
        """
        for _, stack in self._stacks():
            if name in stack.spans:
                return stack.weight.detach()[stack.spans[name]]
        raise KeyError(name)

    def spans(self) -> dict[str, dict[str, slice]]:
        """Parameter, as :meth:`tables` names it -> table -> its rows there."""
        return {f"stacks.{key}.weight": dict(stack.spans) for key, stack in self._stacks()}

    def flops(self) -> int:
        """GEMM FLOPs per example: projections, and 4 L e for an attention over L items (scores and sum)."""
        return sum(part.flops() for part in self.parts if isinstance(part, _Part))

    def _stacks(self) -> list[tuple[str, TableStack]]:
        return [(key, stack) for key, stack in self.stacks.items() if isinstance(stack, TableStack)]


def table_widths(layout: EncodedLayout, schema: spec.Schema, config: EmbeddingConfig) -> dict[str, int]:
    """The width of each table.

    ``auto`` is ``6 * rows ** 0.25``, rounded, at least 1. A table of actions, whose rows are added to those
    of a sequence's items, is as wide as the items' table.

    Raises:
        UserError: ``config.dims`` names something without a table of its own, or a width is below 1.
    """
    owner = {f.name: schema.table_of(f) for f in schema.features if isinstance(f, spec.TableFeature)}
    for name in config.dims:
        if name not in owner:
            known = [feature for feature, table in owner.items() if feature == table]
            raise UserError(f"model.embedding.dims: no feature {name!r} with a table{suggest(name, known)}")
        if owner[name] != name:
            raise UserError(
                f"model.embedding.dims: feature {name!r} uses the table of {owner[name]!r}; "
                f"give the width for {owner[name]!r}"
            )
    widths: dict[str, int] = {}
    for table in (slot.table for slot in layout.ids if slot.role == "values"):
        dim = config.dims.get(table, config.dim)
        widths[table] = max(1, round(6 * layout.tables[table] ** 0.25)) if dim == "auto" else dim
        if widths[table] < 1:
            raise UserError(f"model.embedding: table {table!r} has width {dim}; it must be at least 1")
    values = {slot.feature: slot for slot in layout.ids if slot.role == "values"}
    for slot in layout.ids:
        if slot.role == "actions":
            width = widths[values[slot.feature].table]
            if widths.setdefault(slot.table, width) != width:
                raise ValueError(f"table {slot.table!r} serves widths {widths[slot.table]} and {width}")
    return widths


@dataclass(frozen=True)
class _Place:
    """Where a slot's rows come out: columns ``first .. first + length * hashes`` of a group of a stack."""

    key: str
    group: int
    first: int
    slot: IdSlot

    def rows(self, rows: Rows) -> Tensor:
        """``(B, L, e)``, the rows of two hashes summed."""
        slot = self.slot
        found = rows[self.key][self.group].narrow(1, self.first, slot.length * slot.hashes)
        if slot.hashes == 1:
            return found
        return found.reshape(-1, slot.hashes, slot.length, found.shape[-1]).sum(1)

    def valid(self, ids: Tensor) -> Tensor:
        """``(B, L)`` bool: which are items and no padding."""
        return ids[:, self.slot.start : self.slot.start + self.slot.length] != MISSING


class _Part(nn.Module):
    """Some adjacent columns of ``x0``: ``forward(rows, ids, dense) -> (B, width)``."""

    def flops(self) -> int:
        """GEMM FLOPs per example."""
        return 0


class _Numbers(_Part):
    """Numbers, as they are."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, rows: Rows, ids: Tensor, dense: Tensor) -> Tensor:
        return dense[:, self.columns]


class _Vector(_Part):
    """A given vector, scaled to norm 1 and projected where the schema says so. A missing one is zero."""

    def __init__(self, columns: slice, feature: spec.EmbeddingFeature) -> None:
        super().__init__()
        self.columns = columns
        self.normalise = feature.normalise
        self.projection = nn.Linear(feature.width, feature.project_to) if feature.project_to else None

    def forward(self, rows: Rows, ids: Tensor, dense: Tensor) -> Tensor:
        vector = dense[:, self.columns]
        if self.normalise:
            vector = functional.normalize(vector, dim=1)
        if self.projection is not None:
            vector = self.projection(vector)
        return vector

    def flops(self) -> int:
        return 2 * self.projection.in_features * self.projection.out_features if self.projection else 0


class _Singles(_Part):
    """The rows of a whole group of single ids, side by side; or of one feature with two hashes."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def forward(self, rows: Rows, ids: Tensor, dense: Tensor) -> Tensor:
        if self.place.slot.hashes > 1:
            return self.place.rows(rows).flatten(1)
        return rows[self.place.key][self.place.group].flatten(1)


class _List(_Part):
    """The pooled rows of a list of ids."""

    def __init__(self, place: _Place, pooling: Literal["mean", "sum", "max"]) -> None:
        super().__init__()
        self.place = place
        self.pooling = pooling

    def forward(self, rows: Rows, ids: Tensor, dense: Tensor) -> Tensor:
        return pool(self.place.rows(rows), self.place.valid(ids), self.pooling)


class _Sequence(_Part):
    """The pooled rows of a sequence, those of its actions added to them."""

    def __init__(
        self, place: _Place, width: int, actions: _Place | None, target: _Place | None, ages: slice | None
    ) -> None:
        super().__init__()
        self.place = place
        self.width = width
        self.actions = actions
        self.target = target
        self.ages = ages
        self.pooling = SequencePooling(width, times=ages is not None)

    def forward(self, rows: Rows, ids: Tensor, dense: Tensor) -> Tensor:
        items = self.place.rows(rows)
        if self.actions is not None:
            items = items + self.actions.rows(rows)
        pooled: Tensor = self.pooling(
            items,
            self.place.valid(ids),
            target=self.target.rows(rows).squeeze(1) if self.target is not None else None,
            log_age=dense[:, self.ages] if self.ages is not None else None,
        )
        return pooled

    def flops(self) -> int:
        return 4 * self.place.slot.length * self.width if self.target is not None else 0


class _Plan:
    """Which id columns are looked up in which stack, in which groups, and what becomes of them.

    Neighbours in the schema that have one id each and tables of one width form a group, so that their fields
    of ``x0`` are one reshape of what was gathered. Everything else is a group of its own.
    """

    def __init__(self, layout: EncodedLayout, schema: spec.Schema, widths: dict[str, int]) -> None:
        self.layout = layout
        self.schema = schema
        self.widths = widths
        self.groups: dict[str, list[list[IdSlot]]] = {}
        self.fields: list[tuple[str, FieldKind, Source, int]] = []
        self.parts: list[_Part] = []
        self._values = {slot.feature: slot for slot in layout.ids if slot.role == "values"}
        self._actions = {slot.feature: slot for slot in layout.ids if slot.role == "actions"}
        self._dense = {slot.feature: slot for slot in layout.dense}
        self._places: dict[str, _Place] = {}
        # All places first: a sequence's target may come after it.
        previous = ""
        for feature in schema.features:
            previous = self._reserve(feature, previous)
        for feature in schema.features:
            self._add(feature)

    def stack(self, key: str, init_std: float) -> TableStack:
        """The stack of all tables of one width."""
        used = dict.fromkeys(slot.table for group in self.groups[key] for slot in group)
        tables = {name: self.layout.tables[name] for name in used}
        return TableStack(tables, self.widths[next(iter(used))], self.groups[key], self._values, init_std)

    def _reserve(self, feature: spec.Feature, previous: str) -> str:
        """Places a feature's id columns; the stack whose last group the next feature may join, or ''."""
        if not isinstance(feature, spec.TableFeature):
            return ""
        slot = self._slot(self._values, feature)
        key = f"width_{self.widths[slot.table]}"
        groups = self.groups.setdefault(key, [])
        single = slot.kind == "categorical" and slot.hashes == 1
        if single and previous == key:
            groups[-1].append(slot)
        else:
            groups.append([slot])
        self._places[feature.name] = _Place(key, len(groups) - 1, len(groups[-1]) - 1, slot)
        return key if single else ""

    def _add(self, feature: spec.Feature) -> None:
        """Appends a feature's field, and the part that makes it."""
        kind: FieldKind
        if isinstance(feature, spec.Numeric):
            slot = self._dense_slot(feature, "numeric")
            kind, width = "numeric", slot.width
            last = self.parts[-1] if self.parts else None
            if isinstance(last, _Numbers) and last.columns.stop == slot.start:
                last.columns = slice(last.columns.start, slot.columns.stop)
            else:
                self.parts.append(_Numbers(slot.columns))
        elif isinstance(feature, spec.EmbeddingFeature):
            slot = self._dense_slot(feature, "embedding")
            if slot.width != feature.width:
                raise ValueError(f"feature {feature.name!r}: width {slot.width}, schema's {feature.width}")
            kind, width = "embedding", feature.project_to or feature.width
            self.parts.append(_Vector(slot.columns, feature))
        else:
            place = self._places[feature.name]
            width = self.widths[place.slot.table]
            if isinstance(feature, spec.Sequence):
                kind = "sequence"
                self.parts.append(self._sequence(feature, place, width))
            elif isinstance(feature, spec.MultiCategorical):
                kind = "multi"
                self.parts.append(_List(place, feature.pooling))
            else:
                kind = "categorical"
                if place.first == 0:  # the others come out with the first of their group
                    self.parts.append(_Singles(place))
        self.fields.append((feature.name, kind, feature.source, width))

    def _sequence(self, feature: spec.Sequence, place: _Place, width: int) -> _Sequence:
        actions = None
        if feature.actions is not None:
            slot = self._slot(self._actions, feature)
            groups = self.groups[place.key]
            groups.append([slot])
            actions = _Place(place.key, len(groups) - 1, 0, slot)
        target = self._places[feature.target] if feature.target is not None else None
        ages = self._dense_slot(feature, "sequence").columns if feature.times is not None else None
        return _Sequence(place, width, actions, target, ages)

    def _slot(self, slots: dict[str, IdSlot], feature: spec.TableFeature) -> IdSlot:
        if feature.name not in slots:
            raise ValueError(f"feature {feature.name!r} has no ids in the encoded layout")
        return slots[feature.name]

    def _dense_slot(self, feature: spec.FeatureBase, kind: str) -> DenseSlot:
        slot = self._dense.get(feature.name)
        if slot is None or slot.kind != kind:
            raise ValueError(f"feature {feature.name!r} has no {kind} columns in the encoded layout")
        return slot
