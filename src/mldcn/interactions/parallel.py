"""Stacks of full-rank cross layers side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, register
from mldcn.interactions.cross import DCNV2, PAPER, entry, entry_flops
from mldcn.layout import FieldLayout, as_layout

HOMEFEED = "Malreddy et al., Improving feature interactions at Pinterest under industry constraints"


@register(
    "dcnv2_parallel",
    title="DCN-V2, parallel stacks",
    paper=HOMEFEED,
    year=2024,
    order="L + 1",
    cost="2uLd²",
    knob="projection",
)
@register(
    "dcnv2_concat",
    title="DCN-V2, concatenated crosses",
    paper=PAPER,
    year=2021,
    order="L + 1",
    cost="2uLd²",
    knob="projection",
    num_stacks=2,
    num_layers=1,
    with_input=False,
)
@register(
    "homefeed_baseline",
    title="Homefeed baseline",
    paper=HOMEFEED,
    year=2024,
    order="L + 1",
    cost="2uLd²",
    knob="projection",
    num_stacks=1,
    num_layers=4,
)
class ParallelDCNV2(Interaction):
    """Stacks of :class:`CrossLayer` that all start from ``x0``, concatenated. Order ``num_layers + 1``.

    Three published networks are this one. Homefeed's "4x DCNv2 parallel" (Table 1) is four stacks of two or
    three layers. Concatenated cross layers (DCN V2, Section 8, which likens them to attention heads) are
    stacks of one layer. Homefeed's baseline (Section 3) is a single stack of four. Homefeed's models
    concatenate ``x0`` to the crosses before their MLP.

    With u stacks: ``u L (d^2 + d)`` parameters, ``2 u L d^2`` FLOPs; a projection of width p adds ``dp`` and
    ``2dp``, and makes d = p in the layers.

    Args:
        features: width d of ``x0``, or its layout.
        num_stacks: u.
        num_layers: L, of each stack.
        with_input: whether ``x0`` is concatenated to the stacks' results.
        projection: width p to which ``x0`` is projected linearly before the stacks (the layers have no width
            of their own to turn); by default there is none. ``with_input`` still gives the whole ``x0``.

    Example:
        >>> import torch
        >>> from mldcn.interactions import ParallelDCNV2
        >>> net = ParallelDCNV2(128, num_stacks=4, num_layers=2)
        >>> net(torch.randn(8, 128)).shape, net.flops()
        (torch.Size([8, 640]), 262144)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_stacks: Count = 4,
        num_layers: Count = 2,
        with_input: bool = True,
        projection: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        width = projection or layout.width
        super().__init__(layout.width, num_stacks * width + (layout.width if with_input else 0))
        self.with_input = with_input
        self.projection = entry(layout.width, projection)
        self.stacks = nn.ModuleList(DCNV2(width, num_layers=num_layers) for _ in range(num_stacks))

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, u d)``, with the input ``(B, u d + d)``."""
        narrow = self.projection(x0)
        parts = [stack(narrow) for stack in self.stacks]
        return torch.cat([*parts, x0] if self.with_input else parts, dim=1)

    def flops(self) -> int:
        """``2 u L d^2``, and ``2dp`` of a projection."""
        stacks = sum(stack.flops() for stack in self.stacks if isinstance(stack, DCNV2))
        return entry_flops(self.projection) + stacks
