"""MemoNet's HCNet: representations of all crosses of ids, remembered in a codebook by multiple hashing."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import CrossedIds, FieldLayout, as_layout

Restoring = Literal["linear", "attentive"]
Shrinking = Literal["attentive", "sum"]


def _two_layers(in_width: int, out_width: int) -> nn.Sequential:
    """``W2 ReLU(W1 x)`` with W1 square: the authors' weight networks, at a reduction ratio of one."""
    net = nn.Sequential(
        nn.Linear(in_width, in_width, bias=False), nn.ReLU(), nn.Linear(in_width, out_width, bias=False)
    )
    for weight in net.parameters():
        nn.init.xavier_normal_(weight)
    return net


class CrossMemory(nn.Module):
    """From the codewords of all combinations of one order to one vector a field.

    Restoring: a combination's m codewords, side by side, are mapped to one vector of width w. ``linear`` (LMR)
    maps them as they are, ``attentive`` (AMR) first multiplies them by weights made from the combination's
    embeddings, ``W2 ReLU(W1 [v_i; v_j])``, a weight a coordinate.
    Shrinking: a field's vector is the sum of all its combinations' vectors, as they are (``sum``) or each
    times a number (``attentive``, GAS) made from the whole row, ``W2 ReLU(W1 x0)``.

    With P combinations of k of C fields, e the embeddings' width and l the codewords': ``m l w`` parameters
    and ``2 P m l w`` FLOPs; with AMR ``(k e)^2 + k e m l`` more, and ``2 P`` times that; with GAS ``d^2 + d P``
    more, and twice that.

    Args:
        in_features: width d of ``x0``.
        num_fields: C, the categorical ones.
        width: e, of their embeddings.
        side: what the codewords are.
        out_width: w.
        restoring: LMR or AMR.
        shrinking: sum or GAS.
    """

    members: Tensor
    owners: Tensor

    def __init__(
        self,
        in_features: int,
        num_fields: int,
        width: int,
        side: CrossedIds,
        out_width: int,
        restoring: Restoring,
        shrinking: Shrinking,
    ) -> None:
        super().__init__()
        crosses = list(combinations(range(num_fields), side.order))
        self.num_crosses = len(crosses)
        self.code_width = side.hashes * side.dim
        self.cross_width = side.order * width
        of_field = [[p for p, cross in enumerate(crosses) if f in cross] for f in range(num_fields)]
        self.of_field = (num_fields, len(of_field[0]))
        self.register_buffer("members", torch.tensor(crosses).flatten(), persistent=False)
        self.register_buffer("owners", torch.tensor(of_field).flatten(), persistent=False)
        self.restore = nn.Linear(self.code_width, out_width, bias=False)
        nn.init.xavier_normal_(self.restore.weight)
        self.reweigh = _two_layers(self.cross_width, self.code_width) if restoring == "attentive" else None
        self.attention = _two_layers(in_features, len(crosses)) if shrinking == "attentive" else None

    def forward(self, x0: Tensor, tokens: Tensor | None, codewords: Tensor) -> Tensor:
        """``x0 (B, d)``, for AMR embeddings ``(B, C, e)``, and codewords ``(B, P m l)`` to ``(B, C w)``."""
        words = codewords.reshape(-1, self.num_crosses, self.code_width)
        if self.reweigh is not None and tokens is not None:
            crosses = tokens.index_select(1, self.members)
            words = words * self.reweigh(crosses.reshape(-1, self.num_crosses, self.cross_width))
        vectors = self.restore(words)  # (B, P, w)
        if self.attention is not None:
            vectors = vectors * self.attention(x0).unsqueeze(2)
        of_fields = vectors.index_select(1, self.owners).reshape(-1, *self.of_field, vectors.shape[2])
        out: Tensor = of_fields.sum(dim=2).flatten(1)
        return out

    def flops(self) -> int:
        """GEMM FLOPs per example."""
        once = 0 if self.attention is None else _macs(self.attention)
        each = _macs(self.restore) + (0 if self.reweigh is None else _macs(self.reweigh))
        return 2 * (once + self.num_crosses * each)


def _macs(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@register(
    "hcnet",
    title="MemoNet (HCNet)",
    paper=(
        "Zhang and Zhang, MemoNet: Memorizing All Cross Features' Representations Efficiently via Multi-Hash "
        "Codebook Network for CTR Prediction"
    ),
    year=2023,
    order="none (ids)",
    cost="2Pmlw + 2 (d² + dP) + Σ 2ab",
    knob="hidden",
    secondary="codeword_width",
)
class HCNet(Interaction):
    """``DNN([x0; HCNet])``: a codebook remembers the representation of every cross of ids that occurs.

    Each combination of categorical fields is hashed m times to codewords of one codebook, the side input
    :class:`~mldcn.layout.CrossedIds`. :class:`CrossMemory` restores a vector from a combination's codewords and
    shrinks the vectors to one a field. Several orders have a codebook and a memory each. Fields of other kinds
    than ``categorical`` take part in no cross (the authors hash numbers by their digits: make them categories
    first), but are in ``x0`` and in the weights.

    Parameters and FLOPs are the memories' (:class:`CrossMemory`), the DNN's ``sum(a b + b)`` and
    ``sum(2 a b)`` over neighbouring widths a, b of ``(d + C w n, *hidden)`` for C categorical fields and n
    orders, and with attentive restoring those of :class:`~mldcn.interactions.tokens.FieldTokens` on these
    fields. The codebook has ``num_codewords * codeword_width`` parameters an order; it is embedding.

    Args:
        features: the layout of ``x0``; with a plain width there are no ids to cross, and only the DNN is left.
        num_codewords: codewords in a codebook. The paper's are 0.5 to 1 million.
        codeword_width: l.
        num_hashes: m, codewords a combination.
        orders: fields in a combination; each at most once.
        restoring: ``linear`` (LMR) or ``attentive`` (AMR).
        shrinking: ``attentive`` (GAS) or ``sum``.
        out_width: w; by default l.
        hidden: width of each layer of the DNN; none gives its input.
        dropout: after every layer of the DNN.
        batch_norm: in every layer of the DNN.
        token_width: e, to which each categorical field is projected linearly for attentive restoring; by default
            the commonest width, and only fields of other widths are projected.

    Raises:
        ValueError: an order is given twice or is 1.

    Example:
        >>> import torch
        >>> from mldcn.interactions import HCNet
        >>> from mldcn.layout import FieldLayout
        >>> layout = FieldLayout.uniform(6, 8)
        >>> net = HCNet(layout, codeword_width=10, hidden=(32,))
        >>> codewords = torch.randn(4, net.sides[0].width(layout))
        >>> codewords.shape, net(torch.randn(4, 48), codewords).shape
        (torch.Size([4, 300]), torch.Size([4, 32]))
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_codewords: Count = 100_000,
        codeword_width: Count = 10,
        num_hashes: Count = 2,
        orders: Annotated[tuple[Count, ...], pydantic.Field(min_length=1)] = (2,),
        restoring: Restoring = "linear",
        shrinking: Shrinking = "attentive",
        out_width: Count | None = None,
        hidden: tuple[Count, ...] = (400, 400),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
        token_width: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        if len(set(orders)) < len(orders) or 1 in orders:
            raise ValueError(f"orders: each from 2 on and at most once (found {', '.join(map(str, orders))})")
        sides = tuple(CrossedIds(num_codewords, codeword_width, num_hashes, order) for order in orders)
        ids = [field for field in layout if field.kind == "categorical"]
        out_width = out_width or codeword_width
        crossed = [place for place, side in enumerate(sides) if side.combinations(layout)]
        mlp = MLP(
            layout.width + len(crossed) * len(ids) * out_width, hidden, dropout=dropout, batch_norm=batch_norm
        )
        super().__init__(layout.width, mlp.out_features)
        self.sides = sides
        self.tokens: FieldTokens | None = None
        if crossed and restoring == "attentive":
            own = FieldLayout.build([(field.name, field.kind, field.source, field.width) for field in ids])
            self.tokens = FieldTokens(own, token_width)
        self.crossed = crossed
        self.columns = [field.columns for field in ids]
        width = self.tokens.width if self.tokens is not None else 0
        self.memories = nn.ModuleList(
            CrossMemory(layout.width, len(ids), width, sides[place], out_width, restoring, shrinking)
            for place in crossed
        )
        self.mlp = mlp

    def forward(self, x0: Tensor, *codewords: Tensor) -> Tensor:
        """``x0 (B, d)`` and each order's codewords ``(B, P m l)`` to ``(B, hidden[-1])``."""
        if len(codewords) != len(self.sides):
            raise ValueError(
                f"expected {len(self.sides)} side inputs beside x0, found {len(codewords)}: the codewords of "
                "each order"
            )
        tokens = None
        if self.tokens is not None:
            tokens = self.tokens(torch.cat([x0[:, columns] for columns in self.columns], dim=1))
        found = [x0]
        for memory, place in zip(self.memories, self.crossed, strict=True):
            found.append(memory(x0, tokens, codewords[place]))
        out: Tensor = self.mlp(torch.cat(found, dim=1))
        return out

    def flops(self) -> int:
        """The memories', the DNN's and the projections'."""
        memories = sum(memory.flops() for memory in self.memories if isinstance(memory, CrossMemory))
        projections = self.tokens.flops() if self.tokens is not None else 0
        return projections + memories + self.mlp.flops()
