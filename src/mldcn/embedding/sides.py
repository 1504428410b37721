"""What some architectures read beside ``x0``: first-order terms, a second embedding, codewords of crossed ids."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor, nn

from mldcn.config import EmbeddingConfig
from mldcn.data.batch import EncodedLayout
from mldcn.embedding.embedder import Embedder
from mldcn.embedding.tables import gather_rows
from mldcn.errors import UserError
from mldcn.layout import CrossedIds, FieldLayout, FirstOrder, SecondEmbedding, Side
from mldcn.schema import EmbeddingFeature, Schema

_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # the odd constant of SplitMix64, as int64


class FirstOrderTerms(nn.Module):
    """``w_i x_i`` for every field: a weight an id (pooled as the field's vectors are), a weight a number.

    Weights of ids start at ``N(0, init_std)``, weights of dense columns at 0.

    Args:
        layout: what the columns of encoded rows are.
        schema: the meaning of the log.
        init_std: of the ids' weights.
    """

    def __init__(self, layout: EncodedLayout, schema: Schema, init_std: float) -> None:
        super().__init__()
        # A given vector is weighed as it is: a projection before the weights would add nothing.
        given = [
            feature.model_copy(update={"project_to": None})
            if isinstance(feature, EmbeddingFeature)
            else feature
            for feature in schema.features
        ]
        schema = schema.model_copy(update={"features": tuple(given)})
        self.embedder = Embedder(layout, schema, EmbeddingConfig(dim=1, init_std=init_std))
        fields = self.embedder.layout
        dense = [field.kind in ("numeric", "embedding") for field in fields]
        self.columns = list(fields.widths)
        self.weight = nn.Parameter(torch.zeros(fields.width))
        mask = torch.tensor(dense).repeat_interleave(torch.tensor(fields.widths), output_size=fields.width)
        self.register_buffer("dense", mask, persistent=False)

    dense: Tensor

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """``(B, F)``."""
        return self.weighed(self.embedder(ids, dense))

    def weighed(self, values: Tensor) -> Tensor:
        """``(B, F)`` from the ids' weights and the numbers as they are, side by side."""
        terms = torch.where(self.dense, values * self.weight, values)
        return torch.stack([part.sum(dim=1) for part in torch.split(terms, self.columns, dim=1)], dim=1)


class CrossedCodewords(nn.Module):
    """Codewords of the combinations of categorical fields, by hashing their ids into one codebook (MemoNet).

    Args:
        side: rows, width and number of codewords, and the order of the combinations.
        layout: what the columns of encoded rows are.
        fields: the fields of ``x0``.
        init_std: of the codewords.

    Raises:
        UserError: the log has fewer categorical features with one id each than a combination needs.
    """

    columns: Tensor
    members: Tensor
    salts: Tensor

    def __init__(self, side: CrossedIds, layout: EncodedLayout, fields: FieldLayout, init_std: float) -> None:
        super().__init__()
        first = {slot.feature: slot.start for slot in layout.ids if slot.role == "values"}
        columns = [first[field.name] for field in fields if field.kind == "categorical"]
        if len(columns) < side.order:
            raise UserError(
                f"interaction: crosses of {side.order} ids need as many categorical features; the schema has "
                f"{len(columns)}"
            )
        self.rows, self.width = side.rows, side.dim
        self.weight = nn.Parameter(torch.empty(side.rows, side.dim).normal_(0.0, init_std))
        members = torch.tensor(list(combinations(range(len(columns)), side.order)))  # (P, order)
        salts = torch.arange(1, len(members) * side.hashes + 1).view(len(members), side.hashes)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("salts", _mixed(salts), persistent=False)

    def codewords(self, ids: Tensor) -> Tensor:
        """Rows ``(B, P hashes)`` of the codebook."""
        return hashed_crosses(ids, self.columns, self.members, self.salts, self.rows)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """``(B, P hashes dim)``."""
        return gather_rows(self.weight, self.codewords(ids)).flatten(1)


class SideEmbedder(nn.Module):
    """All side inputs of an architecture, side by side: ``(B, widths of all)``.

    Args:
        sides: what the architecture reads.
        layout: what the columns of encoded rows are.
        schema: the meaning of the log.
        config: widths and initialisation of the tables.
        fields: the fields of ``x0``.
    """

    def __init__(
        self,
        sides: tuple[Side, ...],
        layout: EncodedLayout,
        schema: Schema,
        config: EmbeddingConfig,
        fields: FieldLayout,
    ) -> None:
        super().__init__()
        self.widths = [side.width(fields) for side in sides]
        parts: list[nn.Module] = []
        for side in sides:
            if isinstance(side, FirstOrder):
                parts.append(FirstOrderTerms(layout, schema, config.init_std))
            elif isinstance(side, SecondEmbedding):
                parts.append(Embedder(layout, schema, config))
            else:
                parts.append(CrossedCodewords(side, layout, fields, config.init_std))
        self.parts = nn.ModuleList(parts)

    def forward(self, ids: Tensor, dense: Tensor) -> list[Tensor]:
        """One tensor ``(B, width)`` a side input."""
        return [part(ids, dense) for part in self.parts]

    def tables(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are sparse in their rows."""
        found: dict[str, nn.Parameter] = {}
        for prefix, embedder in self._embedders():
            found |= {f"{prefix}.{name}": table for name, table in embedder.tables().items()}
        for i, part in enumerate(self.parts):
            if isinstance(part, CrossedCodewords):
                found[f"parts.{i}.weight"] = part.weight
        return found

    def spans(self) -> dict[str, dict[str, slice]]:
        """Parameter, as :meth:`tables` names it -> table -> its rows there."""
        found: dict[str, dict[str, slice]] = {}
        for prefix, embedder in self._embedders():
            found |= {f"{prefix}.{name}": spans for name, spans in embedder.spans().items()}
        for i, part in enumerate(self.parts):
            if isinstance(part, CrossedCodewords):
                found[f"parts.{i}.weight"] = {"codebook": slice(0, part.rows)}
        return found

    def flops(self) -> int:
        """GEMM FLOPs per example."""
        return sum(embedder.flops() for _, embedder in self._embedders())

    def _embedders(self) -> Iterator[tuple[str, Embedder]]:
        for i, part in enumerate(self.parts):
            if isinstance(part, FirstOrderTerms):
                yield f"parts.{i}.embedder", part.embedder
            elif isinstance(part, Embedder):
                yield f"parts.{i}", part


def hashed_crosses(ids: Tensor, columns: Tensor, members: Tensor, salts: Tensor, rows: int) -> Tensor:
    """Rows ``(B, P hashes)`` of a codebook for the combinations of each row's ids.

    Args:
        ids: ``(B, C)``.
        columns: ``(F,)``, which of them are crossed.
        members: ``(P, order)``, the places in ``columns`` of each combination.
        salts: ``(P, hashes)`` int64.
        rows: of the codebook.
    """
    own = ids.index_select(1, columns).long()  # (B, F)
    key = salts.unsqueeze(0)  # (1, P, hashes)
    for place in members.unbind(1):
        key = _mixed(key ^ own[:, place].unsqueeze(2))
    return key.remainder(rows).flatten(1)


def _mixed(keys: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, whose products wrap; shifts are made logical by masks."""
    keys = keys + _MIX
    keys = (keys ^ ((keys >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    keys = (keys ^ ((keys >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return keys ^ ((keys >> 31) & ((1 << 33) - 1))
