"""The models of the polynomial studies: an interaction, or cross layers taken apart, and a linear head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mldcn.interactions.base import build
from mldcn.layout import FieldLayout
from mldcn.schema import Strict
from mldcn.study.polynomial_targets import TargetName


class Rival(Strict):
    """A model: an interaction and a head ``w^T x`` without a bias, as the paper's sizes have it."""

    interaction: dict[str, Any]
    title: str = Field(..., min_length=1)
    cross: Literal["bare", "bias", "rank_one"] | None = Field(
        None, description="in place of the interaction, cross layers taken apart, see VariedCross"
    )
    depth: str | None = Field(
        "num_layers", description="option that is the number of layers; a list is repeated"
    )
    match: str | None = Field(None, description="width that is turned until the size is the reference's")
    paper: dict[TargetName, tuple[float, ...]] = Field({}, description="the paper's RMSE by layers")


class VariedCross(nn.Module):
    """Cross layers of DCN V2 taken apart (Figure 4).

    ``bare``: ``x0 * (W x)``. ``bias``: ``x0 * (W x + b)``. ``rank_one``: ``x0 * (1 w^T x + b) + x``, the
    DCN that Section 6 compares with: Eq. 1 with ``W = 1 w^T``.
    """

    def __init__(self, features: int, num_layers: int, kind: Literal["bare", "bias", "rank_one"]) -> None:
        super().__init__()
        self.out_features = features
        rows = 1 if kind == "rank_one" else features
        self.linears = nn.ModuleList(nn.Linear(features, rows, bias=False) for _ in range(num_layers))
        for linear in self.linears:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")  # type: ignore[arg-type]
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(features), requires_grad=kind != "bare") for _ in range(num_layers)
        )
        self.residual = kind == "rank_one"

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        x = x0
        for linear, bias in zip(self.linears, self.biases, strict=True):
            crossed = x0 * (linear(x) + bias)
            x = crossed + x if self.residual else crossed
        return x


class Predictor(nn.Module):
    """An interaction on fields one column wide, and a head that starts at ``head`` or its negative."""

    def __init__(self, rival: Rival, features: int, layers: int, head: float = 1.0) -> None:
        super().__init__()
        self.interaction: nn.Module
        if rival.cross:
            self.interaction = VariedCross(features, layers, rival.cross)
            out = features
        else:
            options = dict(rival.interaction)
            if rival.depth:
                option = options.get(rival.depth)
                options[rival.depth] = option * layers if isinstance(option, list) else layers
            interaction = build(options, FieldLayout.uniform(features, 1))
            self.interaction, out = interaction, interaction.out_features
        self.head = nn.Linear(out, 1, bias=False)
        # Signs, as a head of ones leaves a DNN's ReLUs nothing to subtract.
        with torch.no_grad():
            self.head.weight.copy_(head * (torch.randint(2, self.head.weight.shape) * 2.0 - 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, d) -> (B,)``."""
        out: Tensor = self.head(self.interaction(x))
        return out[:, 0]

    @property
    def size(self) -> int:
        """Learned parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
