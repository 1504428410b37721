"""Counting GEMM FLOPs, and turning an architecture's width knob until it meets a FLOPs budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mldcn import interactions
from mldcn.errors import UserError
from mldcn.layout import FieldLayout

# No model here is wider; beyond it a budget cannot be met by this knob.
MAX_WIDTH = 1 << 20


def module_flops(module: nn.Module, *inputs: Tensor) -> int:
    """GEMM FLOPs per example (2 x multiply-adds), counted by torch while the module runs.

    Slower than the closed formula ``flops()`` of our modules, and right for every module.

    Args:
        module: any module.
        inputs: its inputs; the first has the batch in front.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // inputs[0].shape[0]


@dataclass(frozen=True)
class Solution:
    """An architecture whose FLOPs are nearest to a budget.

    options: its config as a mapping, ``name`` included. residual: ``flops / budget - 1``.
    """

    options: dict[str, Any]
    knob: str
    flops: int
    residual: float


def solve_width(
    name: str,
    features: int | FieldLayout,
    budget_flops: float,
    options: Mapping[str, Any] | None = None,
    knob: str | None = None,
    *,
    tolerance: float = 0.05,
    extra_flops: Callable[[int], int] | None = None,
) -> Solution:
    """The value of an architecture's width knob whose FLOPs per example are nearest to a budget.

    FLOPs grow with the knob, so a binary search finds it. A knob that holds several widths (the DNN's
    ``hidden``) keeps their proportions.

    Args:
        name: the architecture.
        features: width of ``x0``, or its layout.
        budget_flops: GEMM FLOPs per example.
        options: the architecture's other options.
        knob: the option to turn; the architecture's own by default.
        tolerance: the largest share by which the FLOPs may miss the budget.
        extra_flops: what follows the interaction, from its output width (a head whose input it is).

    Raises:
        UserError: there is no such option, it is no width, or no value comes within the tolerance.
    """
    knob = knob or interactions.info(name).knob
    base = {**(options or {}), "name": name}
    if knob is None or knob not in interactions.config_of(name).model_fields:
        raise UserError(f"interaction {name}: there is no width to turn called {knob!r}")
    shape = getattr(interactions.parse(base), knob)
    if shape == () or isinstance(shape, bool | str | float):
        raise UserError(f"interaction {name}: {knob} is no width to turn (it is {shape!r})")

    def spec(value: int) -> dict[str, Any]:
        if isinstance(shape, tuple):
            first = shape[0]
            return {**base, knob: tuple(max(1, round(width * value / first)) for width in shape)}
        return {**base, knob: value}

    def flops(value: int) -> int:
        with torch.device("meta"):
            module = interactions.build(spec(value), features)
        return module.flops() + (extra_flops(module.out_features) if extra_flops else 0)

    low, high = 1, 2
    while high < MAX_WIDTH and flops(high) < budget_flops:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if flops(middle) < budget_flops else (low, middle)
    best = min((low, high), key=lambda value: abs(flops(value) - budget_flops))
    solution = Solution(spec(best), knob, flops(best), flops(best) / budget_flops - 1)
    if abs(solution.residual) > tolerance:
        raise UserError(
            f"interaction {name}: no {knob} comes within {tolerance:.1%} of {budget_flops:,.0f} FLOPs per "
            f"example; the nearest, {best}, has {solution.flops:,} ({solution.residual:+.1%})"
        )
    return solution
