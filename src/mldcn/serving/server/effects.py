"""Which features moved each score: what a score loses when a group of features is missing.

The effect of a group on a candidate is its score less the score of the same candidate in which the group's values
are missing, all others kept. Groups act together, so that effects need not add up to the score; and what a feature
that training never saw missing has for a missing value was never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mldcn.serving.engine import Engine, Scores
from mldcn.serving.refused import Reason, Refused, invalid
from mldcn.serving.server import ranking
from mldcn.serving.server.options import Limits
from mldcn.serving.server.ranking import RankAnswer, RankRequest

CANDIDATES = 50  # of a request: its rows are scored once more for each group

By = Literal["feature", "source"]


class EffectsRequest(RankRequest):
    """A ranking request whose scores are to be explained."""

    by: By = Field(
        "feature", description="a group is a feature, or all features of a source (user, item, ...)"
    )


class EffectGroup(ranking.RankForm):
    """Features that are left out together."""

    name: str
    source: str
    columns: list[str]


class EffectsAnswer(RankAnswer):
    """The ranking, and how much each group moved each score."""

    groups: list[EffectGroup]
    effects: list[list[float]] = Field(
        ...,
        description="by candidate in the ranking's order, then by group: the score less that without the group",
    )


@dataclass(frozen=True)
class Effects:
    """A ranking of candidates, and effects ``(k, groups)`` in its order."""

    ranked: ranking.Ranked
    groups: list[EffectGroup]
    effects: NDArray[np.float32]


def groups_of(engine: Engine, by: By) -> list[EffectGroup]:
    """The groups of a model's features. A sequence goes with its times and actions."""
    found: dict[str, EffectGroup] = {}
    for feature in engine.config.log_schema.features:
        name = feature.source if by == "source" else feature.name
        known = found.get(name)
        columns = list(dict.fromkeys([*(known.columns if known else ()), *feature.columns]))
        found[name] = EffectGroup(name=name, source=feature.source, columns=columns)
    return list(found.values())


def without(
    columns: Mapping[str, Sequence[Any]], rows: int, groups: Sequence[EffectGroup]
) -> dict[str, list[Any]]:
    """The rows as they are, and once more for each group without its values."""
    missing = [None] * rows
    return {
        name: [
            *values,
            *(value for group in groups for value in (missing if name in group.columns else values)),
        ]
        for name, values in columns.items()
    }


def rows_of(
    request: EffectsRequest,
    candidates: Mapping[str, Sequence[Any]],
    groups: Sequence[EffectGroup],
    limits: Limits,
) -> tuple[int, dict[str, list[Any]]]:
    """The number of candidates, and the columns of all rows to score.

    Raises:
        Refused: there are too many.
    """
    rows = ranking.check(request, candidates, limits)
    most = min(CANDIDATES, limits.rows // (1 + len(groups)))
    if rows > most:
        raise Refused(
            Reason.TOO_LARGE, f"effects of {rows} candidates: at most {most} are explained at a time"
        )
    constant = ranking.constant_of(request)
    columns = {name: [value] * rows for name, value in constant.items()} | dict(candidates)
    if any(len(values) != rows for values in columns.values()):
        raise invalid("candidates: the columns are of several lengths")
    if twice := sorted(constant.keys() & candidates.keys()):
        raise invalid(f"{twice[0]!r} is given once for the request and again for its candidates")
    return rows, without(columns, rows, groups)


def effects_of(
    request: EffectsRequest, tasks: Sequence[str], groups: list[EffectGroup], scores: Scores, rows: int
) -> Effects:
    """Orders the candidates, and compares.

    Raises:
        Refused: the objective names another task.
    """
    probabilities = scores.probabilities.reshape(1 + len(groups), rows, len(tasks))
    found = ranking.ranked(request, tasks, Scores(probabilities[0]))
    values = probabilities @ ranking.weights_of(request, tasks)
    return Effects(found, groups, (values[0] - values[1:]).T[found.order])


def to_answer(
    request: EffectsRequest, model: str, version: str, tasks: Sequence[str], found: Effects
) -> dict[str, Any]:
    """The answer as JSON knows it."""
    return {
        **ranking.answer_of(request, model, version, tasks, found.ranked),
        "groups": [group.model_dump() for group in found.groups],
        "effects": found.effects.tolist(),
    }
