"""A study as a YAML file: the log, the base config, the rivals, the shared search, the seeds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mldcn.config import parse, read_yaml
from mldcn.schema import Strict


class Recipe(Strict):
    """One study.

    Every rival is tried with the same grid of settings on the first seed; the trial with the best validation
    metric is then trained with every seed and tested. FLOPs are those of the reference, by turning each
    rival's width.
    """

    title: str
    dataset: str = Field(..., description="a name that 'mldcn data list' knows")
    config: dict[str, Any] = Field({}, description="laid over the dataset's own config")
    reference: str = Field("mldcn", description="the rival that sets the FLOPs and is compared with")
    rivals: dict[str, dict[str, Any]] = Field(
        ..., min_length=1, description="name -> interaction, and other parts of 'model' under their names"
    )
    search: dict[str, tuple[Any, ...]] = Field({}, description="config key -> values: a grid for every rival")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    task: str | None = Field(None, description="the task that is compared; the first by default")
    margin: float = Field(0.001, gt=0, description="an AUC loss below this counts as no worse")

    @model_validator(mode="after")
    def _reference_runs(self) -> Recipe:
        if self.reference not in self.rivals:
            raise ValueError(f"reference {self.reference!r} is none of the rivals")
        return self

    def trials(self) -> list[dict[str, Any]]:
        """The grid's settings, each config key -> value."""
        return [
            dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())
        ]


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        UserError: it says something that no recipe says.
    """
    return parse(Recipe, read_yaml(path), str(path))


def overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged; where both hold something else, the change wins."""
    merged = dict(base)
    for key, value in changes.items():
        here = merged.get(key)
        merged[key] = overlay(here, value) if isinstance(here, dict) and isinstance(value, dict) else value
    return merged


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
