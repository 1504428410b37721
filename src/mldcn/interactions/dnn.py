"""The plain multi-layer perceptron: an architecture of its own, and the deep part of every other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.layout import FieldLayout, as_layout


class MLP(nn.Module):
    """``h_{l+1} = ReLU(W_l h_l + b_l)``, optionally with BatchNorm before and dropout after each ReLU.

    He-normal weights and zero biases (DCN V2, Section 7.1.3). No hidden layer makes it the identity.
    Parameters ``sum(a b + b)`` and FLOPs ``sum(2 a b)`` over neighbouring widths a, b.

    Args:
        in_features: width of the input.
        hidden: width of each layer, the last being the output's.
        dropout: after every layer.
        batch_norm: between every layer's linear map and its ReLU.

    Example:
        >>> import torch
        >>> mlp = MLP(10, [8, 4])
        >>> mlp(torch.zeros(2, 10)).shape, mlp.flops()
        (torch.Size([2, 4]), 224)
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], *, dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.widths = (in_features, *hidden)
        self.out_features = self.widths[-1]
        layers: list[nn.Module] = []
        for before, after in pairwise(self.widths):
            linear = nn.Linear(before, after)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if batch_norm:
                layers.append(nn.BatchNorm1d(after))
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_features) -> (B, hidden[-1])``."""
        out: Tensor = self.net(x)
        return out

    def flops(self) -> int:
        """GEMM FLOPs per example."""
        return sum(2 * before * after for before, after in pairwise(self.widths))


@register(
    "dnn",
    title="DNN",
    paper="Covington et al., Deep Neural Networks for YouTube Recommendations",
    year=2016,
    order="none (ReLU)",
    cost="Σ 2ab",
    knob="hidden",
)
class DNN(Interaction):
    """A multi-layer perceptron on ``x0``: the yardstick of every cross network.

    Parameters ``sum(a b + b)``, FLOPs ``sum(2 a b)`` over neighbouring widths a, b of ``(d, *hidden)``.

    Args:
        features: width d of ``x0``, or its layout.
        hidden: width of each layer; none makes it the identity.
        dropout: after every layer.
        batch_norm: between every layer's linear map and its ReLU.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DNN
        >>> DNN(128, hidden=(256, 64))(torch.randn(8, 128)).shape
        torch.Size([8, 64])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        hidden: tuple[Count, ...] = (256, 128),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, hidden[-1] if hidden else layout.width)
        self.mlp = MLP(layout.width, hidden, dropout=dropout, batch_norm=batch_norm)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, hidden[-1])``."""
        out: Tensor = self.mlp(x0)
        return out

    def flops(self) -> int:
        """``sum(2 a b)`` over neighbouring widths."""
        return self.mlp.flops()
