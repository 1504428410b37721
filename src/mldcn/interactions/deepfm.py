"""Linear and factorisation models with a DNN: Wide & Deep, DeepFM, NFM."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.fm import FM, FirstOrderKind, LinearTerm, bi_interaction
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, as_layout


@register(
    "wide_deep",
    title="Wide & Deep",
    paper="Cheng et al., Wide & Deep Learning for Recommender Systems",
    year=2016,
    order="1",
    cost="Σ 2ab",
    knob="hidden",
)
class WideDeep(Interaction):
    """``[sum(w_i x_i); DNN(x0)]``: a wide linear term beside a DNN.

    Under a linear head whose weight on the first number is 1 this is the paper's logit. The paper's crossed
    columns are features of the log: give them in the schema. The DNN's parameters ``sum(a b + b)`` and FLOPs
    ``sum(2 a b)`` over neighbouring widths a, b of ``(d, *hidden)``; ``embedding`` adds d and 2d.

    Args:
        features: width d of ``x0``, or its layout.
        first_order: ``ids``, as in the paper: a learned weight an id or a number (a side input).
            ``embedding``: ``<x0, w>``, a learned vector a field.
        hidden: width of each layer of the DNN.
        dropout: after every layer of the DNN.
        batch_norm: in every layer of the DNN.

    Example:
        >>> import torch
        >>> from mldcn.interactions import WideDeep
        >>> net = WideDeep(64, hidden=(32, 16))
        >>> net(torch.randn(5, 64), torch.randn(5, 4)).shape, net.flops()
        (torch.Size([5, 17]), 5120)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        first_order: Literal["ids", "embedding"] = "ids",
        hidden: tuple[Count, ...] = (1024, 512, 256),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        mlp = MLP(layout.width, hidden, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, 1 + mlp.out_features)
        self.wide = LinearTerm(layout.width, first_order)
        self.sides = self.wide.sides
        self.mlp = mlp

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the first-order terms ``(B, F)``, to ``(B, 1 + hidden[-1])``."""
        return torch.cat([self.wide(x0, *first), self.mlp(x0)], dim=1)

    def flops(self) -> int:
        """``sum(2 a b)``, and 2d with ``embedding``."""
        return self.wide.flops() + self.mlp.flops()


@register(
    "deepfm",
    title="DeepFM",
    paper="Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction",
    year=2017,
    order="2",
    cost="Σ 2ab",
    knob="hidden",
    secondary="token_width",
)
class DeepFM(Interaction):
    """``[FM(x0); DNN(x0)]``: a factorisation machine and a DNN on the same embeddings.

    Under a linear head whose weight on the first number is 1 this is the paper's logit. The DNN's parameters
    ``sum(a b + b)`` and FLOPs ``sum(2 a b)`` over neighbouring widths a, b of ``(d, *hidden)``, and those of
    :class:`FM`.

    Args:
        features: width d of ``x0``, or its layout.
        first_order: of the FM. ``ids``, as in the paper: a learned weight an id or a number (a side input).
            ``embedding``: ``<x0, w>``, a learned vector a field. ``none``.
        token_width: of the FM, to which each field is projected linearly; by default the commonest width, and
            only fields of other widths are projected.
        hidden: width of each layer of the DNN.
        dropout: after every layer of the DNN.
        batch_norm: in every layer of the DNN.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DeepFM
        >>> from mldcn.layout import FieldLayout
        >>> net = DeepFM(FieldLayout.uniform(4, 16), hidden=(32, 16))
        >>> net(torch.randn(5, 64), torch.randn(5, 4)).shape, net.flops()
        (torch.Size([5, 17]), 5120)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        first_order: FirstOrderKind = "ids",
        token_width: Count | None = None,
        hidden: tuple[Count, ...] = (400, 400, 400),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        mlp = MLP(layout.width, hidden, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, 1 + mlp.out_features)
        self.fm = FM(layout, first_order=first_order, token_width=token_width)
        self.sides = self.fm.sides
        self.mlp = mlp

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the first-order terms ``(B, F)``, to ``(B, 1 + hidden[-1])``."""
        return torch.cat([self.fm(x0, *first), self.mlp(x0)], dim=1)

    def flops(self) -> int:
        """``sum(2 a b)``, and the FM's."""
        return self.fm.flops() + self.mlp.flops()


@register(
    "nfm",
    title="NFM",
    paper="He and Chua, Neural Factorization Machines for Sparse Predictive Analytics",
    year=2017,
    order="2",
    cost="Σ 2ab",
    knob="hidden",
    secondary="token_width",
)
class NFM(Interaction):
    """``[sum(w_i x_i); DNN(f_BI)]``: a DNN on the pooled pairs, ``f_BI = sum_{i<j} v_i * v_j``.

    Under a linear head whose weight on the first number is 1 this is the paper's logit; with ``hidden`` empty
    and a head of ones it is FM. The DNN's parameters ``sum(a b + b)`` and FLOPs ``sum(2 a b)`` over
    neighbouring widths a, b of ``(e, *hidden)``, and those of :class:`LinearTerm` and
    :class:`~mldcn.interactions.tokens.FieldTokens`.

    Args:
        features: width d of ``x0``, or its layout.
        first_order: ``ids``, as in the paper: a learned weight an id or a number (a side input).
            ``embedding``: ``<x0, w>``, a learned vector a field.
        token_width: e, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.
        hidden: width of each layer of the DNN.
        dropout: of ``f_BI`` and after every layer of the DNN.
        batch_norm: of ``f_BI`` and in every layer of the DNN, as in the paper.

    Example:
        >>> import torch
        >>> from mldcn.interactions import NFM
        >>> from mldcn.layout import FieldLayout
        >>> net = NFM(FieldLayout.uniform(4, 16), hidden=(32, 8))
        >>> net(torch.randn(5, 64), torch.randn(5, 4)).shape, net.flops()
        (torch.Size([5, 9]), 1536)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        first_order: Literal["ids", "embedding"] = "ids",
        token_width: Count | None = None,
        hidden: tuple[Count, ...] = (64,),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        tokens = FieldTokens(layout, token_width)
        mlp = MLP(tokens.width, hidden, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, 1 + mlp.out_features)
        self.linear = LinearTerm(layout.width, first_order)
        self.sides = self.linear.sides
        self.tokens = tokens
        self.pooled = nn.Sequential(
            nn.BatchNorm1d(tokens.width) if batch_norm else nn.Identity(), nn.Dropout(dropout)
        )
        self.mlp = mlp

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the first-order terms ``(B, F)``, to ``(B, 1 + hidden[-1])``."""
        pooled = self.pooled(bi_interaction(self.tokens(x0)))
        return torch.cat([self.linear(x0, *first), self.mlp(pooled)], dim=1)

    def flops(self) -> int:
        """``sum(2 a b)``, 2d with ``embedding``, and the projections'."""
        return self.linear.flops() + self.tokens.flops() + self.mlp.flops()
