"""The contract that every architecture keeps, and the registry that knows them by name.

An architecture is a class: ``cls(features, *, option=default, ...)``. The keyword-only parameters *are* its
config: a strict, frozen pydantic model is derived from the signature, so that an option is written once, and
a wrong value is refused in Python as in YAML.
"""

from __future__ import annotations

import functools
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from torch import Tensor, nn

from mldcn.config import parse as parse_config
from mldcn.config import suggest
from mldcn.errors import UserError
from mldcn.layout import FieldLayout
from mldcn.schema import Strict

Count = Annotated[int, pydantic.Field(ge=1)]
Ratio = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
DropRate = Annotated[float, pydantic.Field(ge=0, lt=1)]


class Interaction(nn.Module, ABC):
    """An architecture: ``forward(x0: (B, in_features)) -> (B, out_features)``.

    A subclass takes ``features: int | FieldLayout`` and keyword-only options with defaults. Options are
    checked against their annotations before the constructor runs; rules between options are its own.

    Args:
        in_features: width of ``x0``.
        out_features: width of the result.
    """

    Options: ClassVar[type[Strict]]

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.Options = _options_of(cls)
            cls.__init__ = _checked(cls.__init__, cls.Options)  # type: ignore[method-assign]

    @abstractmethod
    def forward(self, x0: Tensor) -> Tensor:
        """``(B, in_features) -> (B, out_features)``."""

    @abstractmethod
    def flops(self) -> int:
        """GEMM FLOPs per example: 2 x the multiply-adds of every matrix product, nothing else."""


Class = TypeVar("Class", bound=type[Interaction])


@dataclass(frozen=True)
class Info:
    """What the registry knows of an architecture.

    ``knob`` names the option that a study turns to meet a FLOPs budget; None where there is none.
    """

    name: str
    title: str
    paper: str
    year: int
    knob: str | None
    cls: type[Interaction]
    config: type[Strict]


_REGISTRY: dict[str, Info] = {}


def register(
    name: str, *, title: str, paper: str, year: int, knob: str | None, **defaults: Any
) -> Callable[[Class], Class]:
    """Class decorator: makes an architecture known by ``name``.

    A class may have several names; ``defaults`` are the options in which a name departs from the signature.
    """

    def decorate(cls: Class) -> Class:
        if name in _REGISTRY:
            raise ValueError(f"interaction {name!r} is registered twice")
        known = cls.Options.model_fields
        if unknown := ({knob} - {None} | set(defaults)) - set(known):
            raise ValueError(f"interaction {name!r} has no option {', '.join(map(str, unknown))}")
        hints = typing.get_type_hints(cls.Options, include_extras=True)
        changed = {option: (hints[option], value) for option, value in defaults.items()}
        fields: dict[str, Any] = {"name": (Literal[name], name), **changed}
        config = _model(f"{cls.__name__}Config", cls.Options, fields)
        _REGISTRY[name] = Info(name, title, paper, year, knob, cls, config)
        return cls

    return decorate


def names() -> tuple[str, ...]:
    """The names of all architectures, sorted."""
    return tuple(sorted(_REGISTRY))


def info(name: str) -> Info:
    """What is known of an architecture.

    Raises:
        UserError: no architecture has this name.
    """
    if name not in _REGISTRY:
        raise UserError(f"interaction.name: no architecture is called {name!r}{suggest(name, _REGISTRY)}")
    return _REGISTRY[name]


def config_of(name: str) -> type[Strict]:
    """The config model of an architecture: ``name`` and its constructor's options."""
    return info(name).config


def parse(spec: Mapping[str, Any], where: str = "interaction") -> Strict:
    """The frozen config, defaults filled in, of ``{"name": ..., option: value, ...}``.

    Raises:
        UserError: unknown name or option (the nearest known one is named), wrong type, value out of range.
    """
    name = spec.get("name")
    if not isinstance(name, str):
        raise UserError(f"{where}: a name is needed; known: {', '.join(names())}")
    return parse_config(config_of(name), dict(spec), f"{where} {name}")


def build(spec: Mapping[str, Any] | Strict, features: int | FieldLayout) -> Interaction:
    """An architecture from its config (or the plain mapping of one) for an ``x0`` of these features.

    Raises:
        UserError: the config is wrong, or cannot be built for these features.
    """
    config = parse(spec) if isinstance(spec, Mapping) else spec
    options = {key: getattr(config, key) for key in type(config).model_fields}
    name = options.pop("name")
    constructor: Callable[..., Interaction] = info(name).cls
    try:
        return constructor(features, **options)
    except ValueError as error:
        raise UserError(f"interaction {name}: {error}") from None


def _options_of(cls: type[Interaction]) -> type[Strict]:
    """The strict model whose fields are the constructor's keyword-only parameters."""
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    fields: dict[str, Any] = {
        parameter.name: (hints[parameter.name], parameter.default)
        for parameter in inspect.signature(cls.__init__).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return _model(f"{cls.__name__}Options", Strict, fields)


def _model(name: str, base: type[Strict], fields: dict[str, Any]) -> type[Strict]:
    return pydantic.create_model(name, __base__=base, **fields)


def _checked(init: Callable[..., None], options: type[Strict]) -> Callable[..., None]:
    """The constructor behind a check of its options, which turns every bad one into a ValueError."""

    @functools.wraps(init)
    def checked(self: Interaction, features: int | FieldLayout, **given: Any) -> None:
        try:
            valid = parse_config(options, given, type(self).__name__)
        except UserError as error:
            raise ValueError(str(error)) from None
        init(self, features, **{key: getattr(valid, key) for key in options.model_fields})

    return checked
