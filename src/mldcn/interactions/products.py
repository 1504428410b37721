"""Networks on the products of pairs of fields: PNN (inner, outer, both) and DLRM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.pairs import InnerProducts, Kernel, KernelProducts
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, as_layout

PAPER = "Qu et al., Product-based Neural Networks for User Response Prediction"


@register(
    "ipnn",
    title="IPNN",
    paper=PAPER,
    year=2016,
    order="2",
    cost="2F²e + Σ 2ab",
    knob="hidden",
    secondary="token_width",
    products="inner",
)
@register(
    "opnn",
    title="OPNN",
    paper=PAPER,
    year=2016,
    order="2",
    cost="2Pe² + Σ 2ab",
    knob="hidden",
    secondary="token_width",
    products="outer",
)
@register(
    "pnn",
    title="PNN*",
    paper=PAPER,
    year=2016,
    order="2",
    cost="2F²e + 2Pe² + Σ 2ab",
    knob="hidden",
    secondary="token_width",
)
class PNN(Interaction):
    """``DNN([x0; products of all pairs of fields])``.

    IPNN's products are ``<v_i, v_j>``, OPNN's ``v_i v_j^T`` weighed by a kernel and summed
    (:class:`~mldcn.interactions.pairs.KernelProducts`), PNN*'s both. This is the form that libraries have and
    that DCN V2 compares (Table 4): each pair has its own product and, in OPNN, its own kernel. The first form
    published, whose first layer sums over pairs, is :class:`PNN2016`.

    With F tokens of width e and P = F (F - 1) / 2 pairs: the DNN's parameters ``sum(a b + b)`` and FLOPs
    ``sum(2 a b)`` over neighbouring widths a, b of ``(d + P, *hidden)``, or ``(d + 2P, *hidden)`` with both.
    Inner products have ``2 F^2 e`` FLOPs and no parameters; outer ones ``P e^2`` parameters and ``2 P e^2``
    FLOPs with ``mat``, ``P e`` and ``2 P e`` with ``vec``, P and ``2 F^2 e`` with ``num``. Projected fields add
    those of :class:`~mldcn.interactions.tokens.FieldTokens`.

    Args:
        features: width d of ``x0``, or its layout.
        products: ``inner``, ``outer`` or ``both``.
        kernel: of the outer products: a matrix, a vector or a number for each pair.
        linear: whether the DNN reads ``x0`` beside the products.
        self_products: those of each field with itself as well. With ``linear`` off, one token for all numbers
            and a ``mat`` kernel this gives the sizes that DCN V2 prints for Criteo (Table 6).
        token_width: e, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.
        hidden: width of each layer of the DNN.
        dropout: after every layer.
        batch_norm: in every layer.

    Example:
        >>> import torch
        >>> from mldcn.interactions import PNN
        >>> from mldcn.layout import FieldLayout
        >>> net = PNN(FieldLayout.uniform(4, 16), products="outer", kernel="mat", hidden=(32,))
        >>> net(torch.randn(5, 64)).shape, net.flops()
        (torch.Size([5, 32]), 7552)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        products: Literal["inner", "outer", "both"] = "both",
        kernel: Kernel = "mat",
        linear: bool = True,
        self_products: bool = False,
        token_width: Count | None = None,
        hidden: tuple[Count, ...] = (256, 128),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        tokens = FieldTokens(layout, token_width)
        count, width = tokens.num_tokens, tokens.width
        # A lone field has no other pair, and the DNN needs something to read.
        self_products = self_products or (not linear and count == 1)
        inner = InnerProducts(count, width, self_products) if products != "outer" else None
        outer = KernelProducts(count, width, kernel, self_products) if products != "inner" else None
        inputs = sum(part.num_pairs for part in (inner, outer) if part is not None)
        mlp = MLP(inputs + layout.width * linear, hidden, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, mlp.out_features)
        self.linear = linear
        self.tokens = tokens
        self.inner = inner
        self.outer = outer
        self.mlp = mlp

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, hidden[-1])``."""
        tokens = self.tokens(x0)
        found = [x0] if self.linear else []
        found += [part(tokens) for part in (self.inner, self.outer) if part is not None]
        out: Tensor = self.mlp(torch.cat(found, dim=1))
        return out

    def flops(self) -> int:
        """The products' and the DNN's."""
        products = sum(part.flops() for part in (self.inner, self.outer) if part is not None)
        return self.tokens.flops() + products + self.mlp.flops()


@register(
    "ipnn_2016",
    title="IPNN, original",
    paper=PAPER,
    year=2016,
    order="2",
    cost="2D(d + Fe) + Σ 2ab",
    knob="hidden",
    secondary="token_width",
    products="inner",
)
@register(
    "opnn_2016",
    title="OPNN, original",
    paper=PAPER,
    year=2016,
    order="2",
    cost="2D(d + e²) + Σ 2ab",
    knob="hidden",
    secondary="token_width",
)
class PNN2016(Interaction):
    """PNN's product layer as first published: ``l_1 = ReLU(W_z x0 + l_p + b)``, a DNN behind it.

    IPNN: node n of ``l_p`` is ``|sum_i theta_i^n v_i|^2``, all inner products under a kernel of rank one. OPNN:
    ``<W_p^n, f f^T>`` with ``f = sum_i v_i``, all outer products summed first.
    With F tokens of width e and D nodes in ``l_1``: ``D d + D`` parameters and ``2 D d`` FLOPs for ``W_z`` and
    b; ``D F`` and ``2 D F e`` for theta, or ``D e^2`` and ``2 D e^2`` for ``W_p``; then the DNN's
    ``sum(a b + b)`` and ``sum(2 a b)`` over neighbouring widths of ``hidden``. Xavier-normal theta and ``W_p``.

    Args:
        features: width d of ``x0``, or its layout.
        products: ``inner`` or ``outer``.
        token_width: e, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.
        hidden: D, and the widths of the layers behind ``l_1``.
        dropout: after every layer.
        batch_norm: in every layer behind ``l_1``.

    Example:
        >>> import torch
        >>> from mldcn.interactions import PNN2016
        >>> from mldcn.layout import FieldLayout
        >>> net = PNN2016(FieldLayout.uniform(4, 16), products="inner", hidden=(32, 8))
        >>> net(torch.randn(5, 64)).shape, net.flops()
        (torch.Size([5, 8]), 8704)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        products: Literal["inner", "outer"] = "outer",
        token_width: Count | None = None,
        hidden: tuple[Count, ...] = (256, 128),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        if not hidden:
            raise ValueError("hidden is empty; its first width is that of the product layer")
        first, *rest = hidden
        mlp = MLP(first, rest, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, mlp.out_features)
        self.tokens = FieldTokens(layout, token_width)
        self.inner = products == "inner"
        read = self.tokens.num_tokens if self.inner else self.tokens.width**2
        self.linear = nn.Linear(layout.width, first)
        self.kernel = nn.Linear(read, first, bias=False)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)
        nn.init.xavier_normal_(self.kernel.weight)
        self.dropout = nn.Dropout(dropout)
        self.mlp = mlp

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, hidden[-1])``."""
        tokens = self.tokens(x0)
        if self.inner:
            products = self.kernel(tokens.mT).square().sum(dim=1)  # (B, e, D) -> (B, D)
        else:
            f = tokens.sum(dim=1)
            products = self.kernel((f.unsqueeze(2) * f.unsqueeze(1)).flatten(1))
        out: Tensor = self.mlp(self.dropout((self.linear(x0) + products).relu()))
        return out

    def flops(self) -> int:
        """``2 D d``, ``2 D F e`` or ``2 D e^2``, the DNN's and the projections'."""
        products = 2 * self.kernel.weight.numel() * (self.tokens.width if self.inner else 1)
        return self.tokens.flops() + 2 * self.linear.weight.numel() + products + self.mlp.flops()


@register(
    "dlrm",
    title="DLRM",
    paper="Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems",
    year=2019,
    order="2",
    cost="2T²e + Σ 2ab (bottom, top)",
    knob="hidden",
    secondary="token_width",
)
class DLRM(Interaction):
    """``DNN_top([z; <t_i, t_j>_{i<j}])`` over the tokens ``t = (z, v_1, ..., v_F)``, ``z = DNN_bottom(numbers)``.

    Numeric fields go through the bottom DNN, which ends in the embeddings' width; all others are tokens. The
    top DNN reads z and the products, not the embeddings. Without numeric fields there is no bottom DNN and no z.
    With T tokens of width e and P = T (T - 1) / 2: parameters ``sum(a b + b)`` and FLOPs ``sum(2 a b)`` over
    neighbouring widths a, b of the bottom's ``(numbers, *bottom, e)`` and the top's ``(e + P, *hidden)``, and
    ``2 T^2 e`` FLOPs for the products. Projected fields add those of
    :class:`~mldcn.interactions.tokens.FieldTokens`.

    Args:
        features: width d of ``x0``, or its layout.
        bottom: width of each layer of the bottom DNN, without the last one's, e.
        self_interaction: products of each token with itself as well, as in DCN V2's comparison, whose sizes
            come out so (Table 6).
        token_width: e, to which each field that is no number is projected linearly; by default their commonest
            width, and only those of other widths are projected.
        hidden: width of each layer of the top DNN.
        dropout: after every layer of the top DNN.
        batch_norm: in every layer of both.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DLRM
        >>> from mldcn.layout import FieldLayout
        >>> numbers = [(f"n{i}", "numeric", "context", 1) for i in range(3)]
        >>> layout = FieldLayout.build([*numbers, ("user", "categorical", "user", 16)])
        >>> DLRM(layout, bottom=(32,), hidden=(64, 8))(torch.randn(5, 19)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        bottom: tuple[Count, ...] = (512, 256, 64),
        self_interaction: bool = False,
        token_width: Count | None = None,
        hidden: tuple[Count, ...] = (512, 256),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        fields = [(field.name, field.kind, field.source, field.width) for field in layout]
        others = [field for field in fields if field[1] != "numeric"]
        numbers = layout.width - sum(width for *_, width in others)
        tokens = FieldTokens(FieldLayout.build(others), token_width) if others else None
        width = tokens.width if tokens is not None else token_width or (bottom or (numbers,))[-1]
        count = len(others) + (numbers > 0)
        # A lone token has no other pair, and the top needs something to read.
        products = InnerProducts(count, width, self_interaction or count == 1)
        inputs = products.num_pairs + (width if numbers else 0)
        top = MLP(inputs, hidden, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, top.out_features)
        # Neighbours that are numbers, and that are not: whether they are, and how many columns they have.
        self.runs = [
            (numeric, sum(field.width for field in run))
            for numeric, run in groupby(layout, lambda field: field.kind == "numeric")
        ]
        self.bottom = MLP(numbers, (*bottom, width), batch_norm=batch_norm) if numbers else None
        self.tokens = tokens
        self.products = products
        self.top = top

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, hidden[-1])``."""
        parts = torch.split(x0, [columns for _, columns in self.runs], dim=1)
        z: list[Tensor] = []
        tokens: list[Tensor] = []
        if self.bottom is not None:
            z = [self.bottom(self._of(parts, numeric=True))]
            tokens = [z[0].unsqueeze(1)]
        if self.tokens is not None:
            tokens.append(self.tokens(self._of(parts, numeric=False)))
        products = self.products(torch.cat(tokens, dim=1))
        out: Tensor = self.top(torch.cat([*z, products], dim=1))
        return out

    def flops(self) -> int:
        """``2 T^2 e``, both DNNs' and the projections'."""
        parts = (self.bottom, self.tokens, self.products, self.top)
        return sum(part.flops() for part in parts if part is not None)

    def _of(self, parts: Sequence[Tensor], numeric: bool) -> Tensor:
        chosen = [part for part, (kind, _) in zip(parts, self.runs, strict=True) if kind == numeric]
        return torch.cat(chosen, dim=1) if len(chosen) > 1 else chosen[0]
