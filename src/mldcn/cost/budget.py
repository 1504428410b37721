"""Whole models at one cost: the widths at which a config meets a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from mldcn.config import ModelConfig
from mldcn.cost.flops import meta
from mldcn.cost.solver import TOLERANCE, Dial, Found, option_dials, solve
from mldcn.data.batch import EncodedLayout
from mldcn.embedding import Embedder
from mldcn.errors import UserError
from mldcn.layout import FieldLayout
from mldcn.model import Scorer
from mldcn.schema import Schema


def x0_layout(config: ModelConfig, schema: Schema, encoded: EncodedLayout) -> FieldLayout:
    """The fields of a model's ``x0``; nothing is allocated.

    Args:
        config: the model; only its embedding is read.
        schema: the log's schema.
        encoded: what the columns of its encoded rows are.
    """
    with meta():
        return Embedder(encoded, schema, config.embedding).layout


def scorer_flops(config: ModelConfig, layout: FieldLayout, tasks: Sequence[str]) -> int:
    """GEMM FLOPs per example of everything behind the embeddings; nothing is allocated."""
    with meta():
        return sum(Scorer(config, layout, tasks).flops().values())


def scorer_parameters(config: ModelConfig, layout: FieldLayout, tasks: Sequence[str]) -> int:
    """Parameters of everything behind the embeddings; nothing is allocated."""
    with meta():
        return sum(parameter.numel() for parameter in Scorer(config, layout, tasks).parameters())


def match_flops(config: ModelConfig, layout: FieldLayout, tasks: Sequence[str], budget: float) -> ModelConfig:
    """The config with its widths turned until the model costs nearly ``budget``; see :func:`meet_budget`.

    Args:
        config: the model.
        layout: the fields of ``x0``.
        tasks: the heads' tasks.
        budget: GEMM FLOPs per example of interaction, deep part and heads.

    Raises:
        UserError: none of its widths comes within 1 % of the budget.
    """
    return meet_budget(config, layout, lambda each: scorer_flops(each, layout, tasks), budget).subject


def meet_budget(
    config: ModelConfig,
    layout: FieldLayout,
    cost: Callable[[ModelConfig], float],
    budget: float,
    *,
    tolerance: float = TOLERANCE,
    close: float = 0.0,
    what: str = "FLOPs per example",
) -> Found[ModelConfig]:
    """The config with its widths turned until it meets a budget.

    The interaction's width knob goes first. What its steps leave over is taken up by its secondary knob, then
    by the first layer of the deep part, then by that of the heads.

    Args:
        config: the model.
        layout: the fields of ``x0``.
        cost: of a config; it grows with the widths.
        budget: the cost to meet.
        tolerance: the largest share by which the cost may miss the budget.
        close: a miss at which the search ends, for costs that are measured; 0 looks for the nearest.
        what: the cost's unit, for messages.

    Raises:
        UserError: there is no width to turn, or none comes within the tolerance; the nearest is named.
    """
    name = config.interaction["name"]
    dials = [_interaction_dial(dial) for dial in option_dials(config.interaction, layout.width)]
    dials += [_hidden_dial(config, part) for part in _PARTS if getattr(config, part).hidden]
    try:
        return solve(config, dials, cost, budget, tolerance=tolerance, close=close, what=what)
    except UserError as error:
        text = str(error)
        prefix = "" if text.startswith("interaction") else f"interaction {name}: "
        raise UserError(f"{prefix}{text}. Change its other options") from None


Part = Literal["deep", "heads"]
_PARTS: tuple[Part, ...] = ("deep", "heads")


def _interaction_dial(dial: Dial[dict[str, Any]]) -> Dial[ModelConfig]:
    def turn(subject: ModelConfig, value: int) -> ModelConfig:
        return subject.model_copy(update={"interaction": dial.turn(subject.interaction, value)})

    return Dial(dial.name, dial.start, turn)


def _hidden_dial(config: ModelConfig, part: Part) -> Dial[ModelConfig]:
    first, *rest = getattr(config, part).hidden

    def turn(subject: ModelConfig, value: int) -> ModelConfig:
        changed = getattr(subject, part).model_copy(update={"hidden": (value, *rest)})
        return subject.model_copy(update={part: changed})

    return Dial(f"{part}.hidden", first, turn)
