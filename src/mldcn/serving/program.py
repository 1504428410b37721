"""A model cut in two: look-ups in its tables, which stay outside, and the rest, exported as one program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mldcn.embedding.embedder import Embedder
from mldcn.embedding.sides import CrossedCodewords, FirstOrderTerms, hashed_crosses
from mldcn.embedding.tables import TableStack
from mldcn.model import Ranker
from mldcn.serving.store import Kind, TableFile
from mldcn.serving.transfer import PackedRows


@dataclass(frozen=True)
class LookUp:
    """Which rows of one file of tables a batch of ids reads, as plain data.

    Attributes:
        name: the parameter of the model that the file holds.
        file: its name in the bundle.
        kind: how the file's numbers are written.
        rows: of the file.
        width: e.
        columns: ``(n,)`` columns of ids; of a codebook, those that are crossed.
        shift: ``(n,)`` where each column's table begins in the file; empty for a codebook.
        members: ``(P, order)`` of a codebook's combinations, else empty.
        salts: ``(P, hashes)`` of a codebook's combinations, else empty.
        tables: the first and the last but one row of each table in the file.
    """

    name: str
    file: str
    kind: Kind
    rows: int
    width: int
    columns: list[int]
    shift: list[int]
    members: list[list[int]]
    salts: list[list[int]]
    tables: dict[str, list[int]]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def look_ups(model: Ranker, kind: Kind) -> list[LookUp]:
    """The look-ups of a model, in the order of ``model.tables()``."""
    found = []
    spans = model.spans()
    for number, (name, weight) in enumerate(model.tables().items()):
        owner = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(owner, CrossedCodewords | TableStack)
        found.append(
            LookUp(
                name,
                f"table-{number:03}.bin",
                kind,
                rows=int(weight.shape[0]),
                width=int(weight.shape[1]),
                columns=owner.columns.tolist(),
                shift=owner.shift.tolist() if isinstance(owner, TableStack) else [],
                members=owner.members.tolist() if isinstance(owner, CrossedCodewords) else [],
                salts=owner.salts.tolist() if isinstance(owner, CrossedCodewords) else [],
                tables={table: [span.start, span.stop] for table, span in spans[name].items()},
            )
        )
    return found


class Table(Protocol):
    """A table's rows by their numbers."""

    def look_up(self, rows: Tensor) -> Tensor:
        """Rows ``(B, n)`` as ``(B, n, e)`` float32."""
        ...

    def packed(self, rows: Tensor) -> Tensor:
        """Rows ``(n,)`` as they are stored, ``(n, row_bytes)``."""
        ...


OpenTable = Callable[[LookUp], Table]


def table_files(folder: Path) -> OpenTable:
    """Maps the files of a folder into memory, each once."""
    opened: dict[str, TableFile] = {}

    def open_table(plan: LookUp) -> TableFile:
        if plan.file not in opened:
            opened[plan.file] = TableFile(folder / plan.file, plan.kind, plan.rows, plan.width)
        return opened[plan.file]

    return open_table


class Tables:
    """The tables of a bundle, looked up outside of the program.

    Args:
        open_table: gives the table of a look-up.
        plan: the look-ups.
    """

    def __init__(self, open_table: OpenTable, plan: Sequence[LookUp]) -> None:
        self._parts = [(each, open_table(each), _Wanted(each)) for each in plan]

    def look_up(self, ids: Tensor, *, packed: bool = False) -> list[Any]:
        """Rows ``(B, n, e)`` of each table, from ids ``(B, C)``.

        Args:
            ids: encoded ids.
            packed: give :class:`PackedRows`, as they are stored, instead of numbers.
        """
        return [
            _packed(plan, table, wanted.rows(ids)) if packed else table.look_up(wanted.rows(ids))
            for plan, table, wanted in self._parts
        ]


def _packed(plan: LookUp, table: Table, rows: Tensor) -> PackedRows:
    data = table.packed(rows.reshape(-1))
    return PackedRows(data.view(*rows.shape, data.shape[1]), plan.kind, plan.width)


class _Wanted:
    """Which rows of a file some ids ask for."""

    def __init__(self, plan: LookUp) -> None:
        self._rows = plan.rows
        self._columns = torch.tensor(plan.columns)
        self._shift = torch.tensor(plan.shift)
        self._crosses = (torch.tensor(plan.members), torch.tensor(plan.salts)) if plan.members else None

    def rows(self, ids: Tensor) -> Tensor:
        if self._crosses is not None:
            return hashed_crosses(ids, self._columns, *self._crosses, self._rows)
        return ids.index_select(1, self._columns) + self._shift


class Body(nn.Module):
    """All of a model but the look-ups in its tables: pooling, normalisation, interaction, heads, position term.

    Takes the model's tables away from it: write them first.

    Args:
        model: in evaluation mode; used up.
        dtype: of its weights and its work. The logits are float32.
    """

    def __init__(self, model: Ranker, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.names = list(model.tables())
        for name, weight in model.tables().items():
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, nn.Parameter(weight.new_empty(0, weight.shape[1])))
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, ids: Tensor, dense: Tensor, rows: list[Tensor]) -> Tensor:
        """Logits ``(B, T)`` of the serving position.

        Args:
            ids: ``(B, C)`` int32; they only tell what is padding.
            dense: ``(B, D)`` float32.
            rows: ``(B, n, e)`` float32 of each parameter of ``names``.
        """
        given = {name: each.to(self.dtype) for name, each in zip(self.names, rows, strict=True)}
        dense = dense.to(self.dtype)
        x0 = _assembled("embedder", self.model.embedder, given, ids, dense)
        sides = []
        for i, part in enumerate(self.model.sides.parts):
            name = f"sides.parts.{i}"
            if isinstance(part, FirstOrderTerms):
                weights = _assembled(f"{name}.embedder", part.embedder, given, ids, dense)
                sides.append(part.weighed(weights))
            elif isinstance(part, Embedder):
                sides.append(_assembled(name, part, given, ids, dense))
            else:
                sides.append(given[f"{name}.weight"].flatten(1))
        return self.model.logits(torch.cat([x0, *sides], dim=1) if sides else x0).float()


def _assembled(
    name: str, embedder: Embedder, given: Mapping[str, Tensor], ids: Tensor, dense: Tensor
) -> Tensor:
    rows = {}
    for key, stack in embedder.stacks.items():
        assert isinstance(stack, TableStack)
        rows[key] = stack.split(given[f"{name}.stacks.{key}.weight"])
    return embedder.assemble(rows, ids, dense)
