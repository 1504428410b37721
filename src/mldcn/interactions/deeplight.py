"""DeepLight's model: a field-weighted factorisation machine beside a DNN. Its pruning is part of training."""

from __future__ import annotations

import torch
from torch import Tensor

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.fm import FirstOrderKind, FwFM
from mldcn.layout import FieldLayout, as_layout


@register(
    "deeplight",
    title="DeepFwFM (DeepLight)",
    paper=(
        "Deng et al., DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR Predictions in "
        "Ad Serving"
    ),
    year=2021,
    order="2",
    cost="2F²e + 2d + Σ 2ab",
    knob="hidden",
    secondary="token_width",
)
class DeepFwFM(Interaction):
    """``[FwFM(x0); DNN(x0)]``: a factorisation machine with a weight a pair of fields, and a DNN.

    Under a linear head whose weight on the first number is 1 this is the paper's logit. DeepLight makes it
    light by pruning the DNN, the field pairs' weights R and the embeddings while it trains:
    ``training.pruning`` of a run's config. The DNN's parameters ``sum(a b + b)`` and FLOPs ``sum(2 a b)``
    over neighbouring widths a, b of ``(d, *hidden)``, and those of :class:`FwFM`.

    Args:
        features: width d of ``x0``, or its layout.
        first_order: of the FwFM. ``embedding``, as in the paper: ``<x0, w>``, a learned vector a field.
            ``ids``: a learned weight an id or a number, as in FM (a side input). ``none``.
        token_width: e of the FwFM, to which each field is projected linearly; by default the commonest width,
            and only fields of other widths are projected.
        hidden: width of each layer of the DNN.
        dropout: after every layer of the DNN.
        batch_norm: in every layer of the DNN.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DeepFwFM
        >>> from mldcn.layout import FieldLayout
        >>> DeepFwFM(FieldLayout.uniform(4, 16), hidden=(32, 16))(torch.randn(5, 64)).shape
        torch.Size([5, 17])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        first_order: FirstOrderKind = "embedding",
        token_width: Count | None = None,
        hidden: tuple[Count, ...] = (400, 400, 400),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        mlp = MLP(layout.width, hidden, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, 1 + mlp.out_features)
        self.fwfm = FwFM(layout, first_order=first_order, token_width=token_width)
        self.sides = self.fwfm.sides
        self.mlp = mlp

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the first-order terms ``(B, F)``, to ``(B, 1 + hidden[-1])``."""
        return torch.cat([self.fwfm(x0, *first), self.mlp(x0)], dim=1)

    def flops(self) -> int:
        """``sum(2 a b)``, and the FwFM's."""
        return self.fwfm.flops() + self.mlp.flops()
