"""Gated Deep Cross Network: cross layers whose every column is gated, stacked before or beside a DNN."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.cross import entry, entry_flops
from mldcn.interactions.dnn import MLP
from mldcn.layout import FieldLayout, as_layout

PAPER = "Wang et al., Towards Deeper, Lighter and Interpretable Cross Network for CTR Prediction"


class GatedCrossLayer(nn.Module):
    """``c_{l+1} = c0 * (W_c c_l + b) * sigmoid(W_g c_l) + c_l``: a gate lets each column's crosses through.

    Xavier-normal weights and zero b, so that every gate starts at one half. ``2d^2 + d`` parameters,
    ``4d^2`` FLOPs.

    Args:
        features: width d.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.cross = nn.Linear(features, features)
        self.gate = nn.Linear(features, features, bias=False)
        nn.init.xavier_normal_(self.cross.weight)
        nn.init.xavier_normal_(self.gate.weight)
        nn.init.zeros_(self.cross.bias)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """``x0 (B, d)``, the network's input, and ``x (B, d)``, the layer's, to ``(B, d)``."""
        out: Tensor = x0 * self.cross(x) * self.gate(x).sigmoid() + x
        return out

    def flops(self) -> int:
        """``4d^2``."""
        return 4 * self.cross.in_features**2


@register(
    "gdcn_s",
    title="GDCN, stacked",
    paper=PAPER,
    year=2023,
    order="L + 1",
    cost="4Ld² + Σ 2ab",
    knob="projection",
    secondary="hidden",
    structure="stacked",
    hidden=(),
)
@register(
    "gdcn_p",
    title="GDCN, parallel",
    paper=PAPER,
    year=2023,
    order="L + 1",
    cost="4Ld² + Σ 2ab",
    knob="projection",
    secondary="hidden",
)
class GDCN(Interaction):
    """Gated Deep Cross Network: layers of :class:`GatedCrossLayer` and a DNN. Order ``num_layers + 1``.

    In parallel (GDCN-P) the result is ``[c_L; MLP(x0)]``, stacked (GDCN-S) ``MLP(c_L)``. A model has a deep
    part behind its interaction anyway, so ``gdcn_s`` has no hidden layers of its own unless told.

    With the ``(a, b)`` the neighbouring widths of the DNN: ``L (2d^2 + d) + sum(ab + b)`` parameters,
    ``4 L d^2 + sum(2ab)`` FLOPs; a projection of width p adds ``dp`` and ``2dp``, and makes d = p.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        structure: ``parallel`` (GDCN-P) or ``stacked`` (GDCN-S).
        hidden: width of each layer of the DNN.
        dropout: after every layer of the DNN.
        batch_norm: between every linear map of the DNN and its ReLU.
        projection: width p to which ``x0`` is projected linearly at the entry (the layers have no width of
            their own to turn); by default there is none.

    Raises:
        ValueError: the DNN of the parallel structure has no layer.

    Example:
        >>> import torch
        >>> from mldcn.interactions import GDCN
        >>> net = GDCN(128, num_layers=2, hidden=(64,))
        >>> net(torch.randn(8, 128)).shape, net.flops()
        (torch.Size([8, 192]), 147456)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 3,
        structure: Literal["parallel", "stacked"] = "parallel",
        hidden: tuple[Count, ...] = (256, 128),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
        projection: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        parallel = structure == "parallel"
        if parallel and not hidden:
            raise ValueError("hidden needs a layer with structure parallel; without a DNN use stacked")
        width = projection or layout.width
        deep = hidden[-1] if hidden else width
        super().__init__(layout.width, width + deep if parallel else deep)
        self.parallel = parallel
        self.projection = entry(layout.width, projection)
        self.layers = nn.ModuleList(GatedCrossLayer(width) for _ in range(num_layers))
        self.mlp = MLP(width, hidden, dropout=dropout, batch_norm=batch_norm)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d + hidden[-1])``, or stacked ``(B, hidden[-1])``."""
        x = x0 = self.projection(x0)
        for layer in self.layers:
            x = layer(x0, x)
        out: Tensor = torch.cat([x, self.mlp(x0)], dim=1) if self.parallel else self.mlp(x)
        return out

    def flops(self) -> int:
        """``4 L d^2 + sum(2ab)``, and ``2dp`` of a projection."""
        crosses = sum(layer.flops() for layer in self.layers if isinstance(layer, GatedCrossLayer))
        return entry_flops(self.projection) + crosses + self.mlp.flops()
