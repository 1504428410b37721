"""Which inputs of a program the candidates of a request share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mldcn import schema as spec
from mldcn.data.batch import EncodedLayout
from mldcn.serving.halves import shared_features
from mldcn.serving.program import LookUp, Tables
from mldcn.serving.rewriting import PerRequest, Rewritten


@dataclass(frozen=True)
class Division:
    """Which inputs of a program are a request's, and which a candidate's own.

    Attributes:
        columns: for ids, dense, and each file of tables: which columns are a request's.
        first: the look-ups of the former, of the files where there are any.
        own: those of the latter.
    """

    columns: tuple[tuple[bool, ...], ...]
    first: tuple[LookUp, ...]
    own: tuple[LookUp, ...]

    def to_json(self) -> dict[str, Any]:
        """The look-ups as plain data."""
        return {side: [each.to_json() for each in getattr(self, side)] for side in ("first", "own")}


def divided(schema: spec.Schema, layout: EncodedLayout, plan: Sequence[LookUp]) -> Division | None:
    """How a model's inputs divide; None where all of them are of one side."""
    shared = shared_features(schema)
    ids, dense = [False] * layout.num_id_columns, [False] * layout.num_dense_columns
    for slot in layout.ids:
        ids[slot.columns] = [slot.feature in shared] * (slot.length * slot.hashes)
    for place in layout.dense:
        dense[place.columns] = [place.feature in shared] * place.width
    if len({*ids, *dense}) < 2:
        return None
    flags = [_asked(each, ids) for each in plan]
    first, own = (
        tuple(_narrowed(each, ids, side) for each, asked in zip(plan, flags, strict=True) if side in asked)
        for side in (True, False)
    )
    return Division((tuple(ids), tuple(dense), *flags), first, own)


def per_request(
    program: torch.export.ExportedProgram,
    division: Division,
    first: Tables,
    own: Tables,
    rows: tuple[Tensor, Tensor],
    device: torch.device,
) -> torch.export.ExportedProgram:
    """The program over requests and their candidates, exported.

    Args:
        program: over rows.
        division: of its inputs.
        first: the tables as a request reads them.
        own: the tables as a candidate does.
        rows: ids and dense of some that it may be tried with.
        device: where the program computes.
    """
    heads = [each[::3].to(device) for each in rows]
    given = [each.to(device) for each in rows]
    request = torch.arange(len(rows[0]), device=device) // 3
    found = [
        [each.to(device) for each in side] for side in (first.look_up(rows[0][::3]), own.look_up(rows[0]))
    ]
    inputs = (tuple(heads), tuple(given), *found, request)
    module = PerRequest(program, division.columns).eval()
    requests, candidates = (torch.export.Dim(name, min=1) for name in ("requests", "candidates"))
    shapes = (
        ({0: requests}, {0: requests}),
        ({0: candidates}, {0: candidates}),
        [{0: requests}] * len(found[0]),
        [{0: candidates}] * len(found[1]),
        {0: candidates},
    )
    with torch.no_grad():
        module(*inputs)  # makes the blocks of its weights
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def merged(
    program: torch.export.ExportedProgram, ids: Tensor, dense: Tensor, rows: list[Tensor]
) -> torch.export.ExportedProgram:
    """The program over rows with fewer and faster matrix products, exported; the inputs are such as it takes."""
    module = Rewritten(program).eval()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        module(ids, dense, rows)  # lays out its weights
        shapes = ({0: batch}, {0: batch}, [{0: batch}] * len(rows))
        return torch.export.export(module, (ids, dense, rows), dynamic_shapes=shapes)


def _asked(plan: LookUp, ids: Sequence[bool]) -> tuple[bool, ...]:
    """Which of the rows that are looked up are a request's."""
    each = [ids[column] for column in plan.columns]
    if not plan.members:
        return tuple(each)
    hashes = len(plan.salts[0])
    return tuple(all(each[i] for i in members) for members in plan.members for _ in range(hashes))


def _narrowed(plan: LookUp, ids: Sequence[bool], side: bool) -> LookUp:
    """The look-up of one side's rows."""
    each = [ids[column] for column in plan.columns]
    if not plan.members:
        kept = [i for i, shared in enumerate(each) if shared is side]
        return replace(plan, columns=[plan.columns[i] for i in kept], shift=[plan.shift[i] for i in kept])
    crossed = [p for p, members in enumerate(plan.members) if all(each[i] for i in members) is side]
    return replace(plan, members=[plan.members[p] for p in crossed], salts=[plan.salts[p] for p in crossed])
