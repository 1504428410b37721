"""Mixtures of experts, each expert any architecture: one gate (MoE), or one a task (MMoE)."""

from __future__ import annotations

import math
from typing import Annotated

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, Regularised, register
from mldcn.interactions.nested import Spec, build_nested, turned
from mldcn.layout import FieldLayout, Side, as_layout

ExpertSpec = Annotated[Spec, pydantic.Field(validate_default=True)]
# The one gate left by k = 1 is always 1: nothing of the task's loss would reach the gates.
TopK = Annotated[int, pydantic.Field(ge=2)]
Coefficient = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class SoftmaxGates(nn.Module):
    """``softmax(W_t x)`` over n experts, for T gates at once. ``T d n`` parameters, ``2 T d n`` FLOPs.

    Xavier-normal by the fans of one gate, no bias.

    Args:
        features: width d.
        num_gates: T.
        num_experts: n.
    """

    def __init__(self, features: int, num_gates: int, num_experts: int) -> None:
        super().__init__()
        self.shape = (num_gates, num_experts)
        self.linear = nn.Linear(features, num_gates * num_experts, bias=False)
        nn.init.normal_(self.linear.weight, std=math.sqrt(2 / (features + num_experts)))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, d) -> (B, T, n)``, rows that sum to 1."""
        scores: Tensor = self.linear(x)
        return scores.reshape(-1, *self.shape).softmax(dim=2)

    def flops(self) -> int:
        """``2 T d n``."""
        return 2 * self.linear.weight.numel()


class NoisyTopKGates(Regularised):
    """Gates of which k are not zero (Shazeer et al.): ``softmax(keep_k(W x + noise * softplus(W_n x)))``.

    There is noise, normal and drawn anew for every number, in training only. So that all experts are used,
    training adds ``balance`` times the squared coefficients of variation, over the experts, of their
    importance (the batch's sum of gates) and of their load (the expected number of rows that an expert gets,
    a smooth estimate). Weights start at zero. ``2 T d n`` parameters; ``2 T d n`` FLOPs outside training.

    Args:
        features: width d.
        num_gates: T.
        num_experts: n.
        top_k: k, from 2 to n - 1.
        balance: coefficient of the two losses, averaged over the gates.
    """

    def __init__(self, features: int, num_gates: int, num_experts: int, top_k: int, balance: float) -> None:
        super().__init__()
        if top_k >= num_experts:
            raise ValueError(f"top_k {top_k} leaves out none of {num_experts} experts; leave top_k out")
        self.shape, self.top_k, self.balance = (num_gates, num_experts), top_k, balance
        self.linear = nn.Linear(features, num_gates * num_experts, bias=False)
        self.noise = nn.Linear(features, num_gates * num_experts, bias=False)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, d) -> (B, T, n)``, rows that sum to 1 with k numbers above 0."""
        # A load is a ratio of small differences: float32 at least.
        dtype = torch.promote_types(x.dtype, torch.float32)
        clean: Tensor = self.linear(x).to(dtype).reshape(-1, *self.shape)
        scores, spread = clean, None
        if self.training:
            spread = F.softplus(self.noise(x).to(dtype).reshape(-1, *self.shape))
            scores = clean + torch.randn_like(clean) * spread
        best, index = scores.topk(self.top_k + 1, dim=2)
        kept = torch.full_like(scores, -math.inf).scatter(
            2, index[..., : self.top_k], best[..., : self.top_k]
        )
        gates = kept.softmax(dim=2)
        if spread is not None:
            # What an expert's score has to beat: the k-th best of the others.
            rival = torch.where(kept > -math.inf, best[..., -1:], best[..., -2:-1])
            load = torch.special.ndtr((clean - rival) / spread)
            uneven = _squared_variation(gates.sum(dim=0)) + _squared_variation(load.sum(dim=0))
            self.auxiliary = self.balance * uneven.mean()
        return gates.to(x.dtype)

    def flops(self) -> int:
        """``2 T d n``: serving draws no noise."""
        return 2 * self.linear.weight.numel()


def _squared_variation(totals: Tensor) -> Tensor:
    """Variance over squared mean of the last dimension."""
    return totals.var(dim=-1, unbiased=False) / (totals.mean(dim=-1).square() + 1e-10)


class Mixture(nn.Module):
    """``y_t = sum_i g_ti(x0) f_i(x0)``: n experts, each with weights of its own, and T gates, which read x0.

    One expert needs no gate: it is the plain architecture. All experts are computed for all rows, also where
    ``top_k`` makes most gates zero.

    Args:
        layout: the fields of ``x0``, d columns in all.
        expert: spec of the experts.
        num_experts: n.
        num_gates: T.
        top_k: gates that are not zero; all by default.
        balance: see :class:`NoisyTopKGates`.
    """

    def __init__(
        self,
        layout: FieldLayout,
        expert: str | dict[str, object],
        num_experts: int,
        num_gates: int,
        top_k: int | None,
        balance: float,
    ) -> None:
        super().__init__()
        experts = [build_nested(expert, layout) for _ in range(num_experts)]
        self.sides: tuple[Side, ...] = experts[0].sides
        self.out_features = experts[0].out_features
        self.num_gates = num_gates
        self.experts = nn.ModuleList(experts)
        self.gates: SoftmaxGates | NoisyTopKGates | None = None
        if top_k is not None:
            self.gates = NoisyTopKGates(layout.width, num_gates, num_experts, top_k, balance)
        elif num_experts > 1:
            self.gates = SoftmaxGates(layout.width, num_gates, num_experts)

    def forward(self, x0: Tensor, *sides: Tensor) -> Tensor:
        """``(B, d)`` and the experts' side inputs to ``(B, T, d')``."""
        found = [expert(x0, *sides).unsqueeze(1) for expert in self.experts]
        if self.gates is None:
            alone: Tensor = found[0]
            return alone.expand(-1, self.num_gates, -1)
        gates = self.gates(x0).unbind(2)  # n of (B, T)
        mixed: Tensor = gates[0].unsqueeze(2) * found[0]
        for gate, each in zip(gates[1:], found[1:], strict=True):
            mixed = mixed + gate.unsqueeze(2) * each
        return mixed

    def flops(self) -> int:
        """``n F + 2 T d n`` with F those of an expert; one expert has no gate."""
        experts = sum(expert.flops() for expert in self.experts)  # type: ignore[operator]
        return experts + (self.gates.flops() if self.gates is not None else 0)


@register(
    "moe",
    title="MoE",
    paper="Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    year=2017,
    order="none (gates)",
    cost="n F + 2dn",
    knob="width",
)
class MoE(Interaction):
    """Mixture of n experts of one architecture: ``y = sum_i g_i(x0) f_i(x0)``, ``g = softmax(W_g x0)``.

    With P parameters and F FLOPs an expert: ``n P + d n`` parameters, ``n F + 2 d n`` FLOPs; one expert has
    no gate and is the plain architecture. ``top_k`` adds ``d n`` parameters and saves no FLOPs (all experts
    run).

    Args:
        features: width d of ``x0``, or its layout.
        expert: any architecture: its name, or a mapping of its name and options.
        num_experts: n.
        width: for the option that is the expert's own width knob (the rank of ``mldcn``), in place of the
            value in ``expert``.
        top_k: noisy gates of which only so many, two at least, are not zero (:class:`NoisyTopKGates`).
        balance: coefficient of the losses that go with ``top_k``.

    Raises:
        ValueError: the expert's options do not fit ``x0``, it has no width knob to turn, or ``top_k`` is not
            below ``num_experts``.

    Example:
        >>> import torch
        >>> from mldcn.interactions import MoE
        >>> expert = {"name": "mldcn", "rank": 4, "num_layers": 2}
        >>> MoE(16, expert=expert, num_experts=3)(torch.randn(8, 16)).shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        expert: ExpertSpec = "mldcn",
        num_experts: Count = 3,
        width: Count | None = None,
        top_k: TopK | None = None,
        balance: Coefficient = 0.1,
    ) -> None:
        layout = as_layout(features)
        spec = expert if width is None else turned(expert, width)
        mixture = Mixture(layout, spec, num_experts, 1, top_k, balance)
        super().__init__(layout.width, mixture.out_features)
        self.mixture, self.sides = mixture, mixture.sides

    def forward(self, x0: Tensor, *sides: Tensor) -> Tensor:
        """``(B, d)`` and the expert's side inputs to ``(B, d')``."""
        out: Tensor = self.mixture(x0, *sides)[:, 0]
        return out

    def flops(self) -> int:
        """``n F + 2 d n``."""
        return self.mixture.flops()


@register(
    "mmoe",
    title="MMoE",
    paper="Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts",
    year=2018,
    order="none (gates)",
    cost="n F + 2Tdn",
    knob="width",
)
class MMoE(Interaction):
    """Multi-gate mixture: ``y_t = sum_i g_ti(x0) f_i(x0)``, ``g_t = softmax(W_t x0)``, the experts shared.

    Experts of ML-DCN, one to three of them, are the ML-DCN paper's Table 5. With P parameters and F FLOPs an
    expert: ``n P + T d n`` parameters, ``n F + 2 T d n`` FLOPs; one expert has no gates.

    Args:
        features: width d of ``x0``, or its layout.
        expert: any architecture: its name, or a mapping of its name and options.
        num_experts: n.
        width: for the option that is the expert's own width knob (the rank of ``mldcn``), in place of the
            value in ``expert``.
        top_k: noisy gates of which only so many, two at least, are not zero (:class:`NoisyTopKGates`).
        balance: coefficient of the losses that go with ``top_k``.
        num_tasks: T; models fill it in. Without it there is one gate, and the result is ``(B, d')``.

    Raises:
        ValueError: as in :class:`MoE`.

    Example:
        >>> import torch
        >>> from mldcn.interactions import MMoE
        >>> MMoE(16, expert="dnn", num_experts=2, num_tasks=3)(torch.randn(8, 16)).shape
        torch.Size([8, 3, 128])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        expert: ExpertSpec = "mldcn",
        num_experts: Count = 3,
        width: Count | None = None,
        top_k: TopK | None = None,
        balance: Coefficient = 0.1,
        num_tasks: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        spec = expert if width is None else turned(expert, width)
        mixture = Mixture(layout, spec, num_experts, num_tasks or 1, top_k, balance)
        super().__init__(layout.width, mixture.out_features)
        self.mixture, self.sides, self.num_tasks = mixture, mixture.sides, num_tasks

    def forward(self, x0: Tensor, *sides: Tensor) -> Tensor:
        """``(B, d)`` and the expert's side inputs to ``(B, T, d')``, or ``(B, d')`` without tasks."""
        out: Tensor = self.mixture(x0, *sides)
        return out if self.num_tasks is not None else out[:, 0]

    def flops(self) -> int:
        """``n F + 2 T d n``."""
        return self.mixture.flops()
