"""ML-DCN: low-rank cross layers with an instance-guided mask inside the low-rank space."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, Ratio, register
from mldcn.interactions.fields import FieldL2Norm
from mldcn.layout import FieldLayout, as_layout

Mask = Literal["full", "linear", "relu", "none"]
MaskInput = Literal["x", "projected", "x0"]
MaskStart = Literal["identity", "xavier"]
Norm = Literal["branch", "post", "batch", "none"]
Bias = Literal["inside", "outside"]
Activation = Literal["relu", "identity"]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]

PAPER = "Li et al., ML-DCN: Masked Low-Rank Deep Crossing Network Towards Scalable Ads CTR Prediction"


class InstanceMask(nn.Module):
    """The mask of Eq. 5, ``m = ReLU(x W1 + b1) W2 + b2``, made per example from the layer's input.

    Table 4 of the paper takes it apart: ``full`` is the equation, ``linear`` its first layer alone, ``relu``
    that layer with the ReLU. The single layer must then be ``rank`` wide, so that at a mask ratio below one
    these two cost more than ``full``.

    Args:
        in_features: width of what the mask reads.
        rank: width of the mask.
        hidden: width k of the layer between, in ``full``.
        kind: full, linear or relu.
        start: ``identity`` starts with a mask of ones (last weights 0, last bias 1), ``xavier`` with random
            weights and zero biases.
        activation: ``identity`` leaves the ReLU out, for tests of the polynomial degree.
    """

    def __init__(
        self,
        in_features: int,
        rank: int,
        hidden: int,
        kind: Literal["full", "linear", "relu"] = "full",
        start: MaskStart = "identity",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        widths = [in_features, hidden, rank] if kind == "full" else [in_features, rank]
        rectifier = nn.ReLU() if activation == "relu" else nn.Identity()
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        if kind != "linear":
            layers.append(rectifier)
        if kind == "full":
            layers.append(nn.Linear(widths[1], widths[2]))
        self.net = nn.Sequential(*layers)
        self.macs = sum(a * b for a, b in pairwise(widths))
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if start == "identity":
            nn.init.zeros_(linears[-1].weight)
            nn.init.ones_(linears[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_features) -> (B, rank)``."""
        mask: Tensor = self.net(x)
        return mask


class MLDCNLayer(nn.Module):
    """One layer of ML-DCN (Eq. 8), read as ``LN(x0 * ((x V * mask(x)) U^T + b)) + x``.

    As printed, Eq. 8 lost a pair of parentheses that Eq. 2 has: the product with ``x0`` is ``d`` wide, so
    ``U^T`` comes before it. The claimed order ``2^(l+1) - 1`` needs a mask that reads the layer's own input
    and a branch that is multiplied by ``x0``. The bias is inside that product, as in Eq. 2, because without
    its mask the layer must be the low-rank layer of DCN V2. Other readings are options.

    Args:
        features: width d.
        rank: width r of the low-rank space.
        hidden: width k of the mask's inner layer.
        mask: the mask's parts that are there (Table 4).
        mask_input: ``x`` the layer's input, ``projected`` its projection ``x V``, ``x0`` the network's input.
        mask_start: see :class:`InstanceMask`.
        norm: ``branch`` normalises before the residual is added (Eq. 8), ``post`` after it, ``batch`` is
            BatchNorm on the branch, ``none`` no norm.
        norm_gain: value at which the norm's gain starts. At 0 a fresh layer is the identity.
        norm_eps: added to the norm's variance.
        bias: ``inside`` or ``outside`` of the product with ``x0``.
        activation: of the mask.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        hidden: int,
        *,
        mask: Mask = "full",
        mask_input: MaskInput = "x",
        mask_start: MaskStart = "identity",
        norm: Norm = "branch",
        norm_gain: float = 0.0,
        norm_eps: float = 1e-5,
        bias: Bias = "inside",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, features)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.xavier_uniform_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.mask: InstanceMask | None = None
        if mask != "none":
            reads = rank if mask_input == "projected" else features
            self.mask = InstanceMask(reads, rank, hidden, mask, mask_start, activation)
        self.mask_input = mask_input
        self.bias_inside = bias == "inside"
        self.norm_after_residual = norm == "post"
        self.norm: nn.Module = nn.Identity()
        if norm == "batch":
            self.norm = nn.BatchNorm1d(features, eps=norm_eps)
        elif norm != "none":
            self.norm = nn.LayerNorm(features, eps=norm_eps)
        if isinstance(self.norm, nn.BatchNorm1d | nn.LayerNorm):
            nn.init.constant_(self.norm.weight, norm_gain)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """``x0 (B, d)``, the network's input, and ``x (B, d)``, the layer's, to ``(B, d)``."""
        return self.crossed(x0, x, self.masked(x0, x))

    def masked(self, x0: Tensor, x: Tensor) -> Tensor:
        """The layer's input in the low-rank space, masked: ``(B, r)``."""
        low: Tensor = self.down(x)
        if self.mask is not None:
            reads = {"x": x, "projected": low, "x0": x0}[self.mask_input]
            low = low * self.mask(reads)
        return low

    def crossed(self, x0: Tensor, x: Tensor, low: Tensor) -> Tensor:
        """The layer's output from there."""
        branch = x0 * F.linear(low, self.up.weight, self.up.bias if self.bias_inside else None)  # (B, d)
        if not self.bias_inside:
            branch = branch + self.up.bias
        out: Tensor = self.norm(branch + x) if self.norm_after_residual else self.norm(branch) + x
        return out

    def flops(self) -> int:
        """GEMM FLOPs per example."""
        cross = 2 * self.down.in_features * self.down.out_features
        return 2 * (cross + (self.mask.macs if self.mask is not None else 0))


@register(
    "mldcn",
    title="ML-DCN",
    paper=PAPER,
    year=2026,
    order="2^(L+1) - 1",
    cost="2L (2dr + dk + kr)",
    knob="rank",
)
@register(
    "mldcn_plain",
    title="ML-DCN, Eq. 8 taken plainly",
    paper=PAPER,
    year=2026,
    order="2^(L+1) - 1",
    cost="2L (2dr + dk + kr)",
    knob="rank",
    norm_gain=1.0,
    mask_start="xavier",
    dropout=0.0,
    input_norm="none",
)
class MLDCN(Interaction):
    """Masked Low-Rank Deep & Cross Network: ``x_{l+1} = LN(x0 * ((x_l V_l * m_l) U_l^T + b_l)) + x_l``.

    ``m_l = ReLU(x_l W1 + b1) W2 + b2`` is a mask made from the layer's input (Eq. 5 and 8). Without norm and
    ReLU, l layers reach polynomial order ``2^(l+1) - 1``; a cross network reaches ``l + 1``.

    The paper gives no initialisation. Taken plainly (``mldcn_plain`` in the registry) the layers lift small
    embeddings to unit scale at the first step and over-fit; the defaults start every mask at one and every
    norm's gain at zero, so that a fresh stack is the identity and learns how much of each cross to add.

    Keep the rank well below :meth:`break_even_rank` (0.37 d at a mask ratio of 0.5): above it a layer costs
    more than a full cross layer.

    Per layer, with ``k = round(mask_ratio * rank)``: ``2dr + dk + kr + k + r + 3d`` parameters (the last 3d
    being b and the norm), ``2 (2dr + dk + kr)`` FLOPs.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: cross layers; order and cost grow with it.
        rank: r, the width of the low-rank space.
        mask_ratio: t = k / r, the width of the mask's inner layer over that of the mask. Eq. 5, where the
            mask is d wide, has t = k / d; for that reading of Eq. 8 give t d / r.
        mask: parts of the mask (Table 4): ``full``, ``linear`` (one layer), ``relu`` (one layer and ReLU) or
            ``none``.
        mask_input: what the mask reads: ``x`` the layer's input, ``projected`` its projection, ``x0``.
        mask_start: ``identity`` masks start at one; ``xavier`` at random around zero.
        norm: ``branch`` before the residual is added (Eq. 8), ``post`` after it, ``batch`` BatchNorm on the
            branch, ``none``.
        norm_gain: start of the norm's gain; 0 makes a fresh layer the identity, 1 is a plain LayerNorm.
        norm_eps: added to the norm's variance.
        bias: ``inside`` or ``outside`` of the product with ``x0``.
        activation: of the mask; ``identity`` serves tests of the polynomial order.
        dropout: on ``x0`` at the entry, so that every layer sees the same dropped columns.
        input_norm: of ``x0`` at the entry: ``layer`` one LayerNorm, ``field_l2`` each field to L2 norm 1.

    Raises:
        ValueError: an option is out of range, or ``norm_gain`` is 0 with ``norm: post``.

    Example:
        >>> import torch
        >>> from mldcn.interactions import MLDCN
        >>> cross = MLDCN(128, num_layers=4, rank=32, mask_ratio=0.5)
        >>> x0 = torch.randn(8, 128)
        >>> cross(x0).shape
        torch.Size([8, 128])
        >>> cross.flops() == 4 * 2 * (2 * 128 * 32 + 128 * 16 + 16 * 32)
        True
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 4,
        rank: Count = 64,
        mask_ratio: Ratio = 0.5,
        mask: Mask = "full",
        mask_input: MaskInput = "x",
        mask_start: MaskStart = "identity",
        norm: Norm = "branch",
        norm_gain: NonNegative = 0.0,
        norm_eps: Ratio = 1e-5,
        bias: Bias = "inside",
        activation: Activation = "relu",
        dropout: DropRate = 0.0,
        input_norm: Literal["none", "layer", "field_l2"] = "none",
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, layout.width)
        if norm == "post" and norm_gain == 0:
            raise ValueError("norm_gain 0 with norm post makes every layer's output zero; use norm_gain 1")
        hidden = max(1, round(mask_ratio * rank))
        entry: list[nn.Module] = []
        if input_norm == "layer":
            entry.append(nn.LayerNorm(layout.width))
        elif input_norm == "field_l2":
            entry.append(FieldL2Norm(layout))
        if dropout:
            entry.append(nn.Dropout(dropout))
        self.entry = nn.Sequential(*entry)
        self.layers = nn.ModuleList(
            MLDCNLayer(
                layout.width,
                rank,
                hidden,
                mask=mask,
                mask_input=mask_input,
                mask_start=mask_start,
                norm=norm,
                norm_gain=norm_gain,
                norm_eps=norm_eps,
                bias=bias,
                activation=activation,
            )
            for _ in range(num_layers)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        x0 = self.entry(x0)
        x = x0
        for layer in self.layers:
            x = layer(x0, x)
        return x

    def flops(self) -> int:
        """``num_layers * 2 (2dr + dk + kr)``."""
        return sum(layer.flops() for layer in self.layers if isinstance(layer, MLDCNLayer))

    @staticmethod
    def break_even_rank(features: int, mask_ratio: float = 0.5) -> float:
        """The rank at which a layer costs as many FLOPs as a full-rank cross layer, ``2 d^2``.

        Example:
            >>> round(MLDCN.break_even_rank(1000, mask_ratio=0.5))
            372
        """
        slope = 2 + mask_ratio
        return features * (math.sqrt(slope**2 + 4 * mask_ratio) - slope) / (2 * mask_ratio)
