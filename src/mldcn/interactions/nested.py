"""Architectures inside architectures: how an option names one, how it is checked and built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from mldcn.errors import UserError
from mldcn.interactions.base import Interaction, build, info, parse
from mldcn.layout import FieldLayout


def _spelled_out(spec: object) -> dict[str, Any]:
    """The whole config of a name, or of a mapping of a name and options."""
    raw = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(raw, Mapping):
        raise ValueError("expected an architecture's name, or a mapping of its name and options")
    try:
        return parse(raw).model_dump(mode="json")
    except UserError as error:
        raise ValueError(_plain(error)) from None


# An option's type. A field that has it (or a tuple of it) wants `validate_default`, so that its default is
# spelled out too.
Spec = Annotated[str | dict[str, Any], pydantic.BeforeValidator(_spelled_out)]


def build_nested(spec: str | Mapping[str, Any], features: int | FieldLayout) -> Interaction:
    """An architecture for use inside another one.

    It has one representation for all tasks, and no streams: their own losses need a model's heads. Side inputs
    are its user's to hand on.

    Args:
        spec: its name, or a mapping of its name and options.
        features: width or layout of what it reads.

    Raises:
        ValueError: the spec is wrong, does not fit the features or asks for tasks or streams.
    """
    config = _spelled_out(spec)
    try:
        module = build(config, features)
    except UserError as error:
        raise ValueError(_plain(error)) from None
    if module.num_tasks is not None:
        raise ValueError(f"{config['name']}: only the outermost architecture has num_tasks; leave it out")
    if module.streams:
        raise ValueError(
            f"{config['name']}: only the outermost architecture's streams have losses of their own; choose a "
            "loss without them in its options"
        )
    return module


def turned(spec: str | Mapping[str, Any], width: int) -> dict[str, Any]:
    """A spec with its own width knob turned: to this width the first, where it has several, in proportion.

    Raises:
        ValueError: the architecture has no such knob.
    """
    config = _spelled_out(spec)
    knob = info(config["name"]).knob
    if knob is None or config[knob] == []:
        raise ValueError(f"{config['name']} has no width to turn")
    start = config[knob]
    if isinstance(start, list):
        return {**config, knob: [max(1, round(each * width / start[0])) for each in start]}
    return {**config, knob: width}


def _plain(error: UserError) -> str:
    text = str(error).removeprefix("interaction.name: ").removeprefix("interaction ")
    return "; ".join(text.splitlines())
