"""How many hyper-parameters an architecture brings: what someone has to choose again when the data changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mldcn.study.recipe import Recipe
from mldcn.study.rows import RunRow


@dataclass(frozen=True)
class HyperParameters:
    """Of a rival, by their config keys below ``model``.

    chosen: those that the recipe sets for it, tunes for it alone, varies, or turns to meet a budget. exposed: all
    options of its architecture, those of parts inside it (experts) included. What is tuned for all rivals alike
    (the learning rate, say) is in neither, since it tells none from another.
    """

    chosen: tuple[str, ...]
    exposed: tuple[str, ...]


def hyperparameters(recipe: Recipe, row: RunRow) -> HyperParameters:
    """Those of a rival.

    Args:
        recipe: the study.
        row: a run of it.
    """
    keys = list(_leaves(recipe.rivals[row.rival]))
    keys += recipe.tuning.own.get(row.rival, {}) if recipe.tuning is not None else {}
    keys += [point.key for point in recipe.points(row.rival) if point.key is not None]
    if row.knob is not None and "=" in row.knob:
        keys += [f"interaction.{part.partition('=')[0].strip()}" for part in row.knob.split(", ")]
    chosen = dict.fromkeys(key.removeprefix("model.") for key in keys)
    exposed = _leaves({"interaction": row.interaction})
    return HyperParameters(tuple(chosen), tuple(exposed))


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterable[str]:
    """The dotted keys of a tree that hold no mapping; which architecture it is, is no option of it."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(part, Mapping | list) for part in value):
            yield from _leaves({str(i): part for i, part in enumerate(value)}, f"{path}{key}.")
        elif key != "name":
            yield f"{path}{key}"
