"""Whole models at one cost: the widths at which a config meets a FLOPs budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from mldcn.config import ModelConfig
from mldcn.cost.flops import solve_width
from mldcn.data.batch import EncodedLayout
from mldcn.embedding import Embedder
from mldcn.errors import UserError
from mldcn.layout import FieldLayout
from mldcn.model import Scorer
from mldcn.schema import Schema

CLOSE_ENOUGH = 0.005  # by the interaction's own knob
TOLERANCE = 0.02  # of models that are called equal


def x0_layout(config: ModelConfig, schema: Schema, encoded: EncodedLayout) -> FieldLayout:
    """The fields of a model's ``x0``; nothing is allocated.

    Args:
        config: the model; only its embedding is read.
        schema: the log's schema.
        encoded: what the columns of its encoded rows are.
    """
    with torch.device("meta"):
        return Embedder(encoded, schema, config.embedding).layout


def scorer_flops(config: ModelConfig, layout: FieldLayout, tasks: Sequence[str]) -> int:
    """GEMM FLOPs per example of everything behind the embeddings; nothing is allocated."""
    with torch.device("meta"):
        return sum(Scorer(config, layout, tasks).flops().values())


def match_flops(config: ModelConfig, layout: FieldLayout, tasks: Sequence[str], budget: int) -> ModelConfig:
    """The config with its interaction's width knob turned until the model costs nearly ``budget``.

    Where the knob's steps are coarse, the width of the first deep layer takes up what they leave over.

    Args:
        config: the model; its interaction must have a width knob.
        layout: the fields of ``x0``.
        tasks: the heads' tasks.
        budget: GEMM FLOPs per example of interaction, deep part and heads.

    Raises:
        UserError: the architecture has no width knob, or none of its widths comes within 2 % of the budget.
    """
    spec = config.interaction
    solution = solve_width(
        spec["name"],
        layout,
        budget,
        spec,
        tolerance=0.2,
        extra_flops=lambda width: _behind(config, layout, tasks, width),
    )
    turned = config.model_copy(update={"interaction": solution.options})
    candidates = {solution.flops: turned}
    if abs(solution.residual) > CLOSE_ENOUGH and config.deep.hidden:
        for width in range(max(1, config.deep.hidden[0] // 2), 2 * config.deep.hidden[0] + 1):
            deep = config.deep.model_copy(update={"hidden": (width, *config.deep.hidden[1:])})
            candidate = turned.model_copy(update={"deep": deep})
            candidates[scorer_flops(candidate, layout, tasks)] = candidate
    nearest = min(candidates, key=lambda flops: abs(flops - budget))
    if abs(nearest / budget - 1) > TOLERANCE:
        raise UserError(
            f"interaction {spec['name']}: no {solution.knob} comes within {TOLERANCE:.0%} of {budget:,} FLOPs "
            f"per example; the nearest costs {nearest:,}. Change its other options"
        )
    return candidates[nearest]


def _behind(config: ModelConfig, layout: FieldLayout, tasks: Sequence[str], crossed: int) -> int:
    """FLOPs of the deep part and the heads behind (or beside) an interaction ``crossed`` wide."""
    parallel = config.deep.structure == "parallel"
    deep = (layout.width if parallel else crossed, *config.deep.hidden)
    head = (deep[-1] + (crossed if parallel else 0), *config.heads.hidden, 1)
    return sum(2 * a * b for a, b in pairwise(deep)) + len(tasks) * sum(2 * a * b for a, b in pairwise(head))
