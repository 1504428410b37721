"""The final interaction stack of the Homefeed paper: parallel mask blocks, then cross layers."""

from __future__ import annotations

from torch import Tensor

from mldcn.interactions.base import Count, Interaction, Ratio, register
from mldcn.interactions.cross import DCNV2
from mldcn.interactions.masknet import ParallelMaskNet
from mldcn.interactions.parallel import HOMEFEED
from mldcn.layout import FieldLayout, as_layout


@register(
    "homefeed",
    title="Homefeed stack",
    paper=HOMEFEED,
    year=2024,
    order="2 (L + 1)",
    cost="2u (2dk + dq) + 2L (uq)²",
    knob="width",
)
class Homefeed(Interaction):
    """Three parallel mask blocks on ``x0``, concatenated, then four full-rank cross layers (Figure 2b).

    The result is not concatenated with ``x0`` (Section 5.4). With u blocks of width q:
    ``u (2dk + k + d + dq + 2q) + 2d + L ((uq)^2 + uq)`` parameters, ``2u (2dk + dq) + 2L (uq)^2`` FLOPs.

    The paper gives a "projection ratio" of 2.0 without saying of what: by MaskNet's definition it is
    k / d = 2, but only k / d = 0.5 comes near the claim of no more parameters than four cross layers on x0.

    Args:
        features: width d of ``x0``, or its layout.
        num_blocks: u.
        width: q, of every mask block's output.
        aggregation_ratio: k / d, width of each mask's aggregation layer over its output's.
        num_layers: L, cross layers of width ``num_blocks * width``.

    Example:
        >>> import torch
        >>> from mldcn.interactions import Homefeed
        >>> Homefeed(128, width=32, aggregation_ratio=0.5)(torch.randn(4, 128)).shape
        torch.Size([4, 96])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_blocks: Count = 3,
        width: Count = 512,
        aggregation_ratio: Ratio = 2.0,
        num_layers: Count = 4,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, num_blocks * width)
        self.masks = ParallelMaskNet(
            layout, num_blocks=num_blocks, width=width, reduction_ratio=aggregation_ratio
        )
        self.crosses = DCNV2(self.masks.out_features, num_layers=num_layers)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, num_blocks * width)``."""
        out: Tensor = self.crosses(self.masks(x0))
        return out

    def flops(self) -> int:
        """``2u (2dk + dq) + 2L (uq)^2``."""
        return self.masks.flops() + self.crosses.flops()
