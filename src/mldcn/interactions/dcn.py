"""The cross network of the first Deep & Cross Network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, register
from mldcn.interactions.cross import CrossNetwork, entry
from mldcn.layout import FieldLayout, as_layout

PAPER = "Wang et al., Deep & Cross Network for Ad Click Predictions"


class VectorCrossLayer(nn.Module):
    """``x_{l+1} = x0 (x_l . w) + b + x_l``: one number an example scales ``x0``, and b is outside.

    Computed in this order, never as the d x d product of ``x0`` and ``x_l``. Xavier-normal w, zero b.
    ``2d`` parameters, ``2d`` FLOPs.

    Args:
        features: width d.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(features))
        nn.init.xavier_normal_(self.linear.weight)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """``x0 (B, d)``, the network's input, and ``x (B, d)``, the layer's, to ``(B, d)``."""
        out: Tensor = x0 * self.linear(x) + self.bias + x
        return out

    def flops(self) -> int:
        """``2d``."""
        return 2 * self.linear.in_features


@register("dcn", title="DCN", paper=PAPER, year=2017, order="L + 1", cost="2Ld", knob="projection")
class DCN(CrossNetwork):
    """The cross network of DCN: layers of :class:`VectorCrossLayer`. Polynomial order ``num_layers + 1``.

    It is DCN-V2 with ``W = 1 w^T`` and the bias outside of the product (DCN V2, Section 3.2), so that all
    crosses of one order share d weights. The paper's DNN beside it is a model's ``deep`` part with
    ``structure: parallel``.

    ``2Ld`` parameters, ``2Ld`` FLOPs; a projection of width p adds ``dp`` and ``2dp``, and makes d = p in
    the layers.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        projection: width p to which ``x0`` is projected linearly before the first layer (the layers have no
            width of their own to turn); by default there is none.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DCN
        >>> cross = DCN(128, num_layers=4)
        >>> cross(torch.randn(8, 128)).shape, cross.flops()
        (torch.Size([8, 128]), 1024)
    """

    def __init__(
        self, features: int | FieldLayout, *, num_layers: Count = 4, projection: Count | None = None
    ) -> None:
        layout = as_layout(features)
        width = projection or layout.width
        super().__init__(layout.width, width)
        self.projection = entry(layout.width, projection)
        self.layers = nn.ModuleList(VectorCrossLayer(width) for _ in range(num_layers))
