"""Embedding tables of one width in one weight, looked up together, with gradients only for the rows read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mldcn.data.batch import MISSING, IdSlot
from mldcn.errors import UserError


class TableStack(nn.Module):
    """Tables of equal width below one another in one weight ``(rows of all, e)``.

    All id columns that read them are gathered by one call, so a step costs one gather and one sort however
    many features there are. The gradient of ``weight`` is sparse: see :func:`gather_rows`.

    Args:
        tables: rows of each table, in order.
        width: e.
        slots: groups of id slots. A group's columns come out side by side in one tensor.
        items: the slot whose ids tell what is padding, for each feature with a list.
        init_std: deviation of the normal distribution that rows are drawn from.
    """

    columns: Tensor
    shift: Tensor
    limit: Tensor
    item_columns: Tensor
    single: Tensor

    def __init__(
        self,
        tables: Mapping[str, int],
        width: int,
        slots: Sequence[Sequence[IdSlot]],
        items: Mapping[str, IdSlot],
        init_std: float,
    ) -> None:
        super().__init__()
        self.spans: dict[str, slice] = {}
        total = 0
        for name, rows in tables.items():
            self.spans[name] = slice(total, total + rows)
            total += rows
        # In place: a table may fill most of the memory.
        self.weight = nn.Parameter(torch.empty(total, width).normal_(0.0, init_std))

        self.group_sizes = [sum(slot.length * slot.hashes for slot in group) for group in slots]
        flat = [slot for group in slots for slot in group]
        each = [(slot, column) for slot in flat for column in range(slot.length * slot.hashes)]
        self.features = [slot.feature for slot, _ in each]
        columns = [slot.start + column for slot, column in each]
        # Columns that follow one another are a view of the batch's ids, not a copy.
        adjacent = columns == list(range(columns[0], columns[0] + len(columns)))
        self.adjacent = slice(columns[0], columns[0] + len(columns)) if adjacent else None
        # int32 as the ids are, unless the stack is too tall for it.
        shift_type = torch.int32 if total < 2**31 else torch.int64
        shifts = [self.spans[slot.table].start for slot, _ in each]
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.register_buffer("shift", torch.tensor(shifts, dtype=shift_type), persistent=False)
        limits = [tables[slot.table] for slot, _ in each]
        # Second hashes and actions are padding where their item is.
        item_columns = [items[slot.feature].start + column % slot.length for slot, column in each]
        single = [slot.kind == "categorical" for slot, _ in each]
        self.register_buffer("limit", torch.tensor(limits, dtype=shift_type), persistent=False)
        self.register_buffer("item_columns", torch.tensor(item_columns), persistent=False)
        self.register_buffer("single", torch.tensor(single), persistent=False)
        self.all_single = all(single)

    @property
    def width(self) -> int:
        """e, the tables' common width."""
        return int(self.weight.shape[1])

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Rows ``(B, columns of the group, e)`` for each group of slots, from all ids ``(B, C)``.

        Raises:
            UserError: an id lies outside its table (on CUDA a device-side assertion instead).
        """
        own = ids[:, self.adjacent] if self.adjacent is not None else ids.index_select(1, self.columns)
        if not torch.compiler.is_compiling():
            self._check(own)
        keep = None
        if not self.all_single:
            keep = (ids.index_select(1, self.item_columns) != MISSING) | self.single
        return self.split(gather_rows(self.weight, own + self.shift, keep))

    def split(self, gathered: Tensor) -> tuple[Tensor, ...]:
        """All rows that were read, ``(B, columns of all groups, e)``, by group."""
        if len(self.group_sizes) == 1:
            return (gathered,)
        # One split rather than slices: its backward pass writes the gradient once, not once a slice.
        return tuple(torch.split_with_sizes(gathered, self.group_sizes, dim=1))

    def _check(self, own: Tensor) -> None:
        if own.shape[0] == 0:
            return
        bad = (own < 0) | (own >= self.limit)
        if own.is_cuda:
            torch._assert_async(~bad.any(), "an id lies outside its embedding table")
        elif bool(bad.any()):
            # The first column that is wrong, and the first row in it.
            column, at = bad.t().nonzero()[0].tolist()
            rows, wrong = int(self.limit[column]), int(own[at, column])
            raise UserError(
                f"feature {self.features[column]!r}: id {wrong} in the batch's row {at} is outside "
                f"its table of {rows} rows; encode the log with the encoder that the model was built for"
            )


def gather_rows(weight: Tensor, rows: Tensor, keep: Tensor | None = None) -> Tensor:
    """``weight[rows]`` whose gradient is sparse, holds each row once, and costs nothing for unread rows.

    Equals ``functional.embedding(rows, weight, sparse=True)`` with its gradient coalesced, several times
    faster: duplicates are brought together by one integer sort and summed by one bag sum, both in the order
    of the batch, so that the result does not depend on the number of threads.

    Args:
        weight: ``(N, e)``.
        rows: ``(B, n)``, int32 or int64.
        keep: ``(B, n)`` bool; rows read at False places (padding) get no gradient from there.

    Returns:
        ``(B, n, e)``.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        gathered: Tensor = _GatherRows.apply(weight, rows, keep)  # type: ignore[no-untyped-call]
        return gathered
    return functional.embedding(rows, weight)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, keep)
        ctx.shape = weight.shape
        return functional.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, keep = ctx.saved_tensors
        flat, values = rows.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if keep is None:
            ordered, order = torch.sort(flat, stable=True)
        else:
            kept = keep.reshape(-1).nonzero().squeeze(1)
            ordered, order = torch.sort(flat.index_select(0, kept), stable=True)
            order = kept.index_select(0, order)
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        starts = first.nonzero().squeeze(1)
        distinct = ordered.index_select(0, starts).long()
        summed = (
            functional.embedding_bag(order, values, starts, mode="sum")
            if len(starts)
            else values.new_zeros((0, values.shape[1]))
        )
        sparse = torch.sparse_coo_tensor(
            distinct.unsqueeze(0), summed, ctx.shape, check_invariants=False, is_coalesced=True
        )
        return sparse, None, None
