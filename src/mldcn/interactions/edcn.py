"""EDCN: a cross network and a DNN in parallel that share what they find after every layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, Ratio, register
from mldcn.interactions.dcn import VectorCrossLayer
from mldcn.interactions.tokens import ResizedFields
from mldcn.layout import FieldLayout, as_layout

PAPER = (
    "Chen et al., Enhancing Explicit and Implicit Feature Interactions via Information Sharing for "
    "Parallel Deep CTR Models"
)
Fusion = Literal["hadamard", "add", "concat", "attention"]


class Regulation(nn.Module):
    """One input for two towers: ``softmax(g / tau)_f x_f`` for each field f, with gates g of either tower.

    The gates sum to 1 over the fields, so that the columns come out about F times smaller; BatchNorm
    undoes that. Gates start at 1. ``2F`` parameters, and ``4d`` of the two BatchNorms.

    Args:
        layout: the F fields of the input.
        temperature: tau; the smaller, the more a few fields take all.
        batch_norm: whether each tower's input is normalised.
    """

    columns: Tensor

    def __init__(self, layout: FieldLayout, temperature: float, batch_norm: bool) -> None:
        super().__init__()
        self.temperature = temperature
        self.gates = nn.Parameter(torch.ones(2, len(layout)))
        fields = torch.arange(len(layout)).repeat_interleave(
            torch.tensor(layout.widths), output_size=layout.width
        )
        self.register_buffer("columns", fields, persistent=False)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(layout.width) if batch_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, d)`` to ``(B, d)`` for the cross tower and ``(B, d)`` for the deep one."""
        scales = (self.gates / self.temperature).softmax(dim=1).index_select(1, self.columns)  # (2, d)
        return self.norms[0](x * scales[0]), self.norms[1](x * scales[1])


class Bridge(nn.Module):
    """What both towers found, as one: ``f(x, h)`` of the cross tower's x and the deep tower's h.

    ``hadamard`` is ``x * h``, ``add`` is ``x + h``, ``concat`` is ``ReLU(W [x; h] + b)``, and ``attention``
    is ``a_x x + a_h h`` with ``(a_x, a_h)`` the softmax of two scores ``p^T ReLU(W z + b)``, the cross
    tower's and the deep tower's, each with a p, W and b of its own. Xavier-normal weights, zero biases.
    Parameters and FLOPs: none; concat ``2d^2 + d`` and ``4d^2``; attention ``2 (d^2 + 2d)`` and
    ``4 (d^2 + d)``.

    Args:
        features: width d.
        fusion: f.
    """

    def __init__(self, features: int, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion
        parts: list[nn.Module] = []
        if fusion == "concat":
            parts = [nn.Sequential(nn.Linear(2 * features, features), nn.ReLU())]
        elif fusion == "attention":
            parts = [
                nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 1, bias=False))
                for _ in range(2)
            ]
        self.parts = nn.ModuleList(parts)
        self._flops = 0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                self._flops += 2 * module.weight.numel()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """``x (B, d)`` and ``h (B, d)`` to ``(B, d)``."""
        out: Tensor
        if self.fusion == "hadamard":
            out = x * h
        elif self.fusion == "add":
            out = x + h
        elif self.fusion == "concat":
            out = self.parts[0](torch.cat([x, h], dim=1))
        else:
            scores = torch.cat([self.parts[0](x), self.parts[1](h)], dim=1)  # (B, 2)
            weights = scores.softmax(dim=1)
            out = weights[:, :1] * x + weights[:, 1:] * h
        return out

    def flops(self) -> int:
        """GEMM FLOPs per example."""
        return self._flops


class EDCNLayer(nn.Module):
    """Regulation, a cross layer beside a dense layer, and the bridge between them.

    ``(c, s) = regulate(f)``, ``x = c0 (c . w) + b + c``, ``h = ReLU(W s + b')``, next ``f = bridge(x, h)``.
    The cross keeps its residual, as DCN's does. Xavier-normal weights, zero biases. ``d^2 + 3d``
    parameters and ``2d^2 + 2d`` FLOPs beside the regulation's and the bridge's.

    Args:
        layout: the fields of ``f``, d columns in all.
        fusion: of the bridge.
        temperature: of the regulation.
        batch_norm: of the regulation.
    """

    def __init__(self, layout: FieldLayout, fusion: Fusion, temperature: float, batch_norm: bool) -> None:
        super().__init__()
        self.regulation = Regulation(layout, temperature, batch_norm)
        self.cross = VectorCrossLayer(layout.width)
        self.dense = nn.Linear(layout.width, layout.width)
        nn.init.xavier_normal_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)
        self.bridge = Bridge(layout.width, fusion)

    def forward(self, c0: Tensor | None, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``f (B, d)``, and ``c0 (B, d)`` but in the first layer, to ``(c0, x, h, f)``, each ``(B, d)``."""
        crossed, deep = self.regulation(f)
        c0 = crossed if c0 is None else c0
        x = self.cross(c0, crossed)
        h = self.dense(deep).relu()
        return c0, x, h, self.bridge(x, h)

    def flops(self) -> int:
        """``2d^2 + 2d`` and the bridge's."""
        return self.cross.flops() + 2 * self.dense.weight.numel() + self.bridge.flops()


@register(
    "edcn",
    title="EDCN",
    paper=PAPER,
    year=2021,
    order="2^(L+1) - 1",
    cost="L (2d² + 2d)",
    knob="projection",
)
class EDCN(Interaction):
    """Enhanced DCN: layers of :class:`EDCNLayer`, a cross and a deep tower that share after every layer.

    The result is ``[x_L; h_L; f_L]``, of the cross tower, the deep tower and their last bridge. ``c0``, the
    cross tower's base, is the regulated ``x0``. A Hadamard bridge multiplies what both towers have, so that
    without norms and ReLU l layers reach order ``2^(l+1) - 1``; with the other bridges ``l + 1``.

    ``L (d^2 + 3d + 2F)`` parameters (with BatchNorm ``+ 4Ld``), ``L (2d^2 + 2d)`` FLOPs, and those of the
    :class:`Bridge` in every layer and of :class:`ResizedFields`, which makes d = projection.

    Args:
        features: the layout of ``x0`` (F fields, d columns), or its width (one field: no regulation).
        num_layers: L.
        bridge: ``hadamard``, ``add``, ``concat`` or ``attention``, see :class:`Bridge`.
        temperature: of the softmax over the fields' gates.
        batch_norm: of the towers' inputs; without it the signal shrinks by F in every layer.
        projection: columns in all to which the fields are projected first, each by itself; by default fields
            stay as they are.

    Example:
        >>> import torch
        >>> from mldcn.interactions import EDCN
        >>> from mldcn.layout import FieldLayout
        >>> net = EDCN(FieldLayout.uniform(8, 16), num_layers=2)
        >>> net(torch.randn(4, 128)).shape, net.flops()
        (torch.Size([4, 384]), 66048)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 3,
        bridge: Fusion = "hadamard",
        temperature: Ratio = 1.0,
        batch_norm: bool = True,
        projection: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        resized = ResizedFields(layout, projection) if projection else None
        fields = resized.layout if resized else layout
        super().__init__(layout.width, 3 * fields.width)
        self.projection = resized
        self.layers = nn.ModuleList(
            EDCNLayer(fields, bridge, temperature, batch_norm) for _ in range(num_layers)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, 3d)``, or ``(B, 3p)`` behind a projection to p columns."""
        x = h = f = x0 if self.projection is None else self.projection(x0)
        c0: Tensor | None = None
        for layer in self.layers:
            c0, x, h, f = layer(c0, f)
        return torch.cat([x, h, f], dim=1)

    def flops(self) -> int:
        """``L (2d^2 + 2d)``, and those of the bridges and of the projection of fields."""
        layers = sum(layer.flops() for layer in self.layers if isinstance(layer, EDCNLayer))
        return layers + (self.projection.flops() if self.projection is not None else 0)
