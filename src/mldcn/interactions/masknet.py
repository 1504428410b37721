"""MaskNet: instance-guided masks on the embedding and on hidden layers, in series and in parallel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, Ratio, register
from mldcn.interactions.fields import FieldLayerNorm
from mldcn.layout import FieldLayout, as_layout

PAPER = (
    "Wang et al., MaskNet: Introducing Feature-Wise Multiplication to CTR Ranking Models by "
    "Instance-Guided Mask"
)


class MaskBlock(nn.Module):
    """``ReLU(LN(W (m * x)))`` with the mask ``m = W2 ReLU(W1 guide + b1) + b2``.

    The input is masked, mapped (no bias: the LayerNorm has one) and normalised. W1 is called the aggregation
    layer, W2 the projection layer; the reduction ratio is the width of W1 over that of W2. Xavier-uniform
    weights, zero biases. With input n, guide g, aggregation k and output q wide:
    ``gk + k + kn + n + nq + 2q`` parameters, ``2 (gk + kn + nq)`` FLOPs.

    Args:
        guide_features: width g of what the mask is made from.
        in_features: width n of the input, and of the mask.
        out_features: width q of the output.
        aggregation_ratio: k / n.
    """

    def __init__(
        self, guide_features: int, in_features: int, out_features: int, aggregation_ratio: float
    ) -> None:
        super().__init__()
        aggregation = max(1, round(aggregation_ratio * in_features))
        self.mask = nn.Sequential(
            nn.Linear(guide_features, aggregation), nn.ReLU(), nn.Linear(aggregation, in_features)
        )
        self.hidden = nn.Linear(in_features, out_features, bias=False)
        self.norm = nn.LayerNorm(out_features)
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self._flops = sum(2 * linear.in_features * linear.out_features for linear in linears)

    def forward(self, guide: Tensor, x: Tensor) -> Tensor:
        """``guide (B, g)`` and ``x (B, n)`` to ``(B, q)``."""
        out: Tensor = self.norm(self.hidden(self.mask(guide) * x)).relu()
        return out

    def flops(self) -> int:
        """``2 (gk + kn + nq)``."""
        return self._flops


@register(
    "masknet",
    title="MaskNet",
    paper=PAPER,
    year=2021,
    order="2^L",
    cost="2L (2t + 1) d²",
    knob="width",
)
class MaskNet(Interaction):
    """MaskNet as the ML-DCN paper restates it (Eq. 5 to 7), in series.

    ``x_{l+1} = ReLU(LN((m_l * LN(x_l)) W_l))`` with ``m_l = ReLU(x_l W1 + b1) W2 + b2``: here the mask
    reads the layer's own input, so the order is ``2^L``. As printed every layer is d wide; then
    ``L ((2t+1) d^2 + (t+1) d + 4d)`` parameters, ``2 L (2t+1) d^2`` FLOPs.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        mask_ratio: t = k / n, the width of the mask's inner layer over that of the layer's input.
        width: of each layer's output; d by default, as printed.

    Example:
        >>> import torch
        >>> from mldcn.interactions import MaskNet
        >>> net = MaskNet(64, num_layers=2, mask_ratio=0.5)
        >>> net(torch.randn(8, 64)).shape, net.flops()
        (torch.Size([8, 64]), 32768)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 3,
        mask_ratio: Ratio = 2.0,
        width: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        out = width or layout.width
        super().__init__(layout.width, out)
        widths = [layout.width] + [out] * (num_layers - 1)
        self.norms = nn.ModuleList(nn.LayerNorm(n) for n in widths)
        self.blocks = nn.ModuleList(MaskBlock(n, n, out, mask_ratio) for n in widths)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, width)``."""
        x = x0
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = block(x, norm(x))
        return x

    def flops(self) -> int:
        """The sum over the blocks of ``2 (2nk + nq)``."""
        return _flops(self.blocks)


@register(
    "masknet_serial",
    title="MaskNet, serial",
    paper=PAPER,
    year=2021,
    order="L + 1",
    cost="Σ 2 (dk + kn + nq)",
    knob="width",
)
class SerialMaskNet(Interaction):
    """Serial MaskNet: a mask block on the embedding, then mask blocks on mask blocks.

    Every mask is made from ``x0``. The first block masks ``LN_EMB(x0)``, the LayerNorm of each field on its
    own (the layout says where fields lie; a field of one column is only scaled and shifted).
    The blocks' parameters and FLOPs are :class:`MaskBlock`'s; ``LN_EMB`` has 2d parameters.

    Args:
        features: width d of ``x0``, or its layout.
        num_blocks: blocks in series.
        width: of every block's output.
        reduction_ratio: width of the mask's aggregation layer over that of its projection layer, which is d
            in the first block and ``width`` in the others.

    Example:
        >>> import torch
        >>> from mldcn.interactions import SerialMaskNet
        >>> from mldcn.layout import FieldLayout
        >>> SerialMaskNet(FieldLayout.uniform(8, 16), width=32)(torch.randn(4, 128)).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_blocks: Count = 3,
        width: Count = 64,
        reduction_ratio: Ratio = 2.0,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, width)
        self.field_norm = FieldLayerNorm(layout)
        widths = [layout.width] + [width] * (num_blocks - 1)
        self.blocks = nn.ModuleList(MaskBlock(layout.width, n, width, reduction_ratio) for n in widths)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, width)``."""
        x: Tensor = self.field_norm(x0)
        for block in self.blocks:
            x = block(x0, x)
        return x

    def flops(self) -> int:
        """The sum over the blocks of ``2 (dk + kn + n width)``."""
        return _flops(self.blocks)


@register(
    "masknet_parallel",
    title="MaskNet, parallel",
    paper=PAPER,
    year=2021,
    order="2",
    cost="2u (2dk + dq)",
    knob="width",
)
class ParallelMaskNet(Interaction):
    """Parallel MaskNet: mask blocks side by side on the embedding, concatenated.

    Every mask is made from ``x0`` and every block masks ``LN_EMB(x0)``, the LayerNorm of each field on its
    own (a field of one column is only scaled and shifted). With u blocks of width q and k = ratio * d:
    ``u (2dk + k + d + dq + 2q) + 2d`` parameters, ``2u (2dk + dq)`` FLOPs.

    Args:
        features: width d of ``x0``, or its layout.
        num_blocks: u.
        width: q, of every block's output.
        reduction_ratio: k / d, width of the mask's aggregation layer over that of its projection layer.

    Example:
        >>> import torch
        >>> from mldcn.interactions import ParallelMaskNet
        >>> net = ParallelMaskNet(128, num_blocks=3, width=32, reduction_ratio=0.5)
        >>> net(torch.randn(4, 128)).shape, net.flops()
        (torch.Size([4, 96]), 122880)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_blocks: Count = 3,
        width: Count = 64,
        reduction_ratio: Ratio = 2.0,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, num_blocks * width)
        self.field_norm = FieldLayerNorm(layout)
        self.blocks = nn.ModuleList(
            MaskBlock(layout.width, layout.width, width, reduction_ratio) for _ in range(num_blocks)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, num_blocks * width)``."""
        embedding = self.field_norm(x0)
        return torch.cat([block(x0, embedding) for block in self.blocks], dim=1)

    def flops(self) -> int:
        """``2u (2dk + dq)``."""
        return _flops(self.blocks)


def _flops(blocks: nn.ModuleList) -> int:
    return sum(block.flops() for block in blocks if isinstance(block, MaskBlock))
