"""The cross networks of DCN V2: full rank, low rank and mixture of low-rank experts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, register
from mldcn.layout import FieldLayout, as_layout

PAPER = (
    "Wang et al., DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank"
)
Gate = Literal["softmax", "sigmoid", "constant"]
Nonlinearity = Literal["identity", "relu", "tanh", "hardtanh"]
_NONLINEARITIES = {"identity": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "hardtanh": nn.Hardtanh}


class CrossLayer(nn.Module):
    """``x_{l+1} = x0 * (W x_l + b) + x_l`` (DCN V2, Eq. 1).

    He-normal W and zero b (DCN V2, Section 7.1.3). ``d^2 + d`` parameters, ``2 d^2`` FLOPs.

    Args:
        features: width d.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """``x0 (B, d)``, the network's input, and ``x (B, d)``, the layer's, to ``(B, d)``."""
        out: Tensor = x0 * self.linear(x) + x
        return out

    def flops(self) -> int:
        """``2 d^2``."""
        return 2 * self.linear.in_features**2


class LowRankCrossLayer(nn.Module):
    """``x_{l+1} = x0 * (U V^T x_l + b) + x_l`` (DCN V2, Eq. 2), optionally with a ReLU after ``V^T``.

    The ReLU between the factors is the Homefeed paper's (Section 5.2.3). Xavier-normal factors and zero b.
    ``2dr + d`` parameters, ``4dr`` FLOPs: less than a full layer only for r < d / 2.

    Args:
        features: width d.
        rank: r.
        relu: whether there is a ReLU between the factors.
    """

    def __init__(self, features: int, rank: int, relu: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, features)
        self.relu = relu
        nn.init.xavier_normal_(self.down.weight)
        nn.init.xavier_normal_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """``x0 (B, d)``, the network's input, and ``x (B, d)``, the layer's, to ``(B, d)``."""
        low = self.down(x)  # (B, r)
        if self.relu:
            low = low.relu()
        out: Tensor = x0 * self.up(low) + x
        return out

    def flops(self) -> int:
        """``4dr``."""
        return 4 * self.down.in_features * self.down.out_features


class ExpertGate(nn.Module):
    """The gates ``G(x) (B, K)`` of DCN V2, Eq. 3: softmax or sigmoid of ``x W_g``, or the constant 1.

    Xavier-normal W_g, no bias: ``Kd`` parameters, ``2Kd`` FLOPs; a constant gate has neither.

    Args:
        features: width d.
        num_experts: K.
        kind: ``softmax``, ``sigmoid`` or ``constant`` (then the experts are summed).
    """

    def __init__(self, features: int, num_experts: int, kind: Gate) -> None:
        super().__init__()
        self.num_experts, self.kind = num_experts, kind
        self.linear = None if kind == "constant" else nn.Linear(features, num_experts, bias=False)
        if self.linear is not None:
            nn.init.xavier_normal_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, d) -> (B, K)``."""
        if self.linear is None:
            return x.new_ones(x.shape[0], self.num_experts)
        scores: Tensor = self.linear(x)
        return scores.softmax(dim=1) if self.kind == "softmax" else scores.sigmoid()

    def flops(self) -> int:
        """``2Kd``, or 0."""
        return 2 * self.linear.weight.numel() if self.linear is not None else 0


class ExpertCrossLayer(nn.Module):
    """``x_{l+1} = sum_i G_i E_i(x_l) + x_l`` over K low-rank experts, b shared by them (DCN V2, Eq. 3).

    ``E_i = x0 * (U_i g(V_i^T x_l) + b)`` (Eq. 3, where g is the identity), or with the inner matrix
    ``E_i = x0 * (U_i g(C_i g(V_i^T x_l)) + b)`` (Eq. 4). All experts run as one product: the gate scales each
    expert's r numbers before U, which gives the same sum.

    Args:
        features: width d.
        num_experts: K.
        rank: r of each expert.
        activation: g.
        with_c: whether there is an inner matrix C.
    """

    def __init__(
        self, features: int, num_experts: int, rank: int, activation: Nonlinearity, with_c: bool
    ) -> None:
        super().__init__()
        self.num_experts, self.rank = num_experts, rank
        # Rows i*r .. (i+1)*r of V and the same columns of U belong to expert i.
        self.down = nn.Linear(features, num_experts * rank, bias=False)
        self.up = nn.Linear(num_experts * rank, features, bias=False)
        self.bias = nn.Parameter(torch.zeros(features))
        self.inner = nn.Parameter(torch.empty(num_experts, rank, rank)) if with_c else None
        self.activation = _NONLINEARITIES[activation]()
        # Xavier's fans are those of one expert's matrix, not of the stack.
        nn.init.normal_(self.down.weight, std=math.sqrt(2 / (features + rank)))
        nn.init.normal_(self.up.weight, std=math.sqrt(2 / (features + rank)))
        if self.inner is not None:
            nn.init.normal_(self.inner, std=math.sqrt(1 / rank))

    def forward(self, x0: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """``x0 (B, d)``, the network's input, ``x (B, d)``, the layer's, ``gates (B, K)``, to ``(B, d)``."""
        low = self.activation(self.down(x)).reshape(-1, self.num_experts, self.rank)  # (B, K, r)
        if self.inner is not None:
            # One (B, r) x (r, r) product an expert.
            low = self.activation(torch.bmm(low.transpose(0, 1), self.inner.mT).transpose(0, 1))
        mixed = self.up((low * gates.unsqueeze(2)).flatten(1))  # (B, d)
        out: Tensor = x0 * (mixed + gates.sum(dim=1, keepdim=True) * self.bias) + x
        return out

    def flops(self) -> int:
        """``4Kdr``, with C ``+ 2Kr^2``."""
        inner = self.inner.numel() if self.inner is not None else 0
        return 2 * (2 * self.down.weight.numel() + inner)


class CrossNetwork(Interaction):
    """Layers ``(x0, x_l) -> x_{l+1}`` from ``x_0 = x0``, or from ``x0`` behind an :func:`entry`."""

    projection: nn.Module
    layers: nn.ModuleList

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``, or ``(B, p)`` behind a projection of width p."""
        x0 = self.projection(x0)
        x = x0
        for layer in self.layers:
            x = layer(x0, x)
        return x

    def flops(self) -> int:
        """The sum of the projection's and the layers' FLOPs."""
        return entry_flops(self.projection) + _flops(self.layers)


def entry(features: int, width: int | None) -> nn.Module:
    """A linear map from d to ``width`` columns without a bias, Xavier-normal; with None, the identity.

    The width that full-rank layers take from what they read, and so the knob of networks of such layers.
    """
    if width is None:
        return nn.Identity()
    linear = nn.Linear(features, width, bias=False)
    nn.init.xavier_normal_(linear.weight)
    return linear


def entry_flops(module: nn.Module) -> int:
    """``2dp`` of an :func:`entry` of width p; 0 where there is none."""
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0


def _flops(modules: nn.ModuleList) -> int:
    return sum(module.flops() for module in modules)  # type: ignore[operator]


@register("dcnv2", title="DCN-V2", paper=PAPER, year=2021, order="L + 1", cost="2Ld²", knob="projection")
class DCNV2(CrossNetwork):
    """Full-rank cross network: layers of :class:`CrossLayer`. Polynomial order ``num_layers + 1``.

    ``L (d^2 + d)`` parameters, ``2 L d^2`` FLOPs; a projection of width p adds ``dp`` and ``2dp``, and makes
    d = p in the layers.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        projection: width p to which ``x0`` is projected linearly before the first layer (the layers have no
            width of their own to turn); by default there is none.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DCNV2
        >>> cross = DCNV2(128, num_layers=2)
        >>> cross(torch.randn(8, 128)).shape, cross.flops()
        (torch.Size([8, 128]), 65536)
    """

    def __init__(
        self, features: int | FieldLayout, *, num_layers: Count = 3, projection: Count | None = None
    ) -> None:
        layout = as_layout(features)
        width = projection or layout.width
        super().__init__(layout.width, width)
        self.projection = entry(layout.width, projection)
        self.layers = nn.ModuleList(CrossLayer(width) for _ in range(num_layers))


@register(
    "dcnv2_lowrank",
    title="DCN-V2, low rank",
    paper=PAPER,
    year=2021,
    order="L + 1",
    cost="4Ldr",
    knob="rank",
)
class DCNV2LowRank(CrossNetwork):
    """Low-rank cross network: layers of :class:`LowRankCrossLayer`. Polynomial order ``num_layers + 1``.

    ``L (2dr + d)`` parameters, ``4 L d r`` FLOPs. The DCN V2 paper found r = d / 4 to keep the accuracy.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        rank: r.
        relu: a ReLU between the factors (the Homefeed paper, Section 5.2.3).

    Example:
        >>> import torch
        >>> from mldcn.interactions import DCNV2LowRank
        >>> cross = DCNV2LowRank(128, num_layers=4, rank=64)
        >>> cross(torch.randn(8, 128)).shape, cross.flops()
        (torch.Size([8, 128]), 131072)
    """

    def __init__(
        self, features: int | FieldLayout, *, num_layers: Count = 3, rank: Count = 64, relu: bool = False
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, layout.width)
        self.projection = nn.Identity()
        self.layers = nn.ModuleList(LowRankCrossLayer(layout.width, rank, relu) for _ in range(num_layers))


@register(
    "dcn_mix",
    title="DCN-Mix",
    paper=PAPER,
    year=2021,
    order="none (gates)",
    cost="L (4Kdr + 2Kr² + 2Kd)",
    knob="rank",
)
class DCNMix(Interaction):
    """Mixture of low-rank cross experts: layers of :class:`ExpertCrossLayer` (DCN V2, Eq. 3, 4).

    With one expert and a softmax or constant gate, Eq. 3 is the low-rank network.
    ``L (2Kdr + d)`` parameters, ``4 L K d r`` FLOPs; C adds ``L K r^2`` and ``2 L K r^2``; a gate adds ``Kd``
    (a shared one once) and ``2Kd`` a layer.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        num_experts: K.
        rank: r of *each* expert, as in Eq. 3; the paper's Table 6 gives the total, ``num_experts * rank``.
        gate: ``softmax`` or ``sigmoid`` of a linear map of the layer's input, or ``constant`` 1.
        share_gate: one gate matrix for all layers.
        activation: g of Eq. 4, between the factors also without C.
        with_c: Eq. 4's inner matrix ``C_i (r, r)``.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DCNMix
        >>> cross = DCNMix(128, num_layers=2, num_experts=4, rank=16)
        >>> cross(torch.randn(1, 128)).shape, cross.flops()
        (torch.Size([1, 128]), 67584)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 3,
        num_experts: Count = 4,
        rank: Count = 16,
        gate: Gate = "softmax",
        share_gate: bool = False,
        activation: Nonlinearity = "identity",
        with_c: bool = False,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, layout.width)
        if share_gate and gate == "constant":
            raise ValueError("share_gate has nothing to share: the gate is constant")
        self.layers = nn.ModuleList(
            ExpertCrossLayer(layout.width, num_experts, rank, activation, with_c) for _ in range(num_layers)
        )
        self.gates = nn.ModuleList(
            ExpertGate(layout.width, num_experts, gate) for _ in range(1 if share_gate else num_layers)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        x = x0
        for i, layer in enumerate(self.layers):
            gate = self.gates[i % len(self.gates)]
            x = layer(x0, x, gate(x))
        return x

    def flops(self) -> int:
        """``L (4Kdr + 2Kr^2 + 2Kd)``, less what C or a gate would cost where there is none."""
        gates = _flops(self.gates) * (len(self.layers) // len(self.gates))
        return _flops(self.layers) + gates
