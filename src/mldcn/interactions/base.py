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
from mldcn.layout import FieldLayout, Side
from mldcn.schema import Strict

Count = Annotated[int, pydantic.Field(ge=1)]
Ratio = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
DropRate = Annotated[float, pydantic.Field(ge=0, lt=1)]


class Interaction(nn.Module, ABC):
    """An architecture: ``forward(x0: (B, in_features), *sides) -> (B, out_features)``.

    A subclass takes ``features: int | FieldLayout`` and keyword-only options with defaults. Options are
    checked against their annotations before the constructor runs; rules between options are its own.

    Four extras are declared by instances that ask for them, and are off in all others:

    - ``sides``: what they read beside ``x0``, in the order of ``forward``'s further arguments.
    - ``num_tasks``: the result is ``(B, num_tasks, out_features)``, one representation a task. The class then
      has an option of this name, which a model fills in.
    - ``streams``: columns of the result that can predict alone. In training each one's own loss joins the
      whole's by :meth:`stream_loss`.
    - parts that are :class:`Regularised` add terms to the training loss.

    Args:
        in_features: width of ``x0``.
        out_features: width of the result.
    """

    Options: ClassVar[type[Strict]]
    sides: tuple[Side, ...] = ()
    num_tasks: int | None = None
    streams: tuple[slice, ...] = ()

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
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``x0 (B, in_features)`` and the side inputs, in order, to ``(B, out_features)``."""

    @abstractmethod
    def flops(self) -> int:
        """GEMM FLOPs per example: 2 x the multiply-adds of every matrix product, nothing else."""

    def stream_loss(self, loss: Tensor, streams: Tensor) -> Tensor:
        """The training loss ``(T,)`` of each task from the whole's ``(T,)`` and the streams' own ``(S, T)``."""
        return loss + streams.sum(dim=0)


class Regularised(nn.Module):
    """A part that adds a term to the training loss.

    In training mode its ``forward`` sets ``auxiliary`` to a scalar with its coefficient in it. It may look at
    the whole batch: models that hold one are never computed part by part.
    """

    auxiliary: Tensor | None = None


def auxiliary_loss(module: nn.Module) -> Tensor | None:
    """The sum of all terms that the parts of a module added in its last forward pass; takes them away."""
    total: Tensor | None = None
    for part in module.modules():
        if isinstance(part, Regularised) and part.auxiliary is not None:
            total = part.auxiliary if total is None else total + part.auxiliary
            part.auxiliary = None
    return total


Class = TypeVar("Class", bound=type[Interaction])


@dataclass(frozen=True)
class Info:
    """What the registry knows of an architecture.

    ``knob`` names the option that a study turns to meet a FLOPs budget, ``secondary`` the one that takes up
    what its steps leave over; None where there is none. ``order`` is the interaction order that L layers
    reach (the polynomial degree in x0 without norms and activations), ``cost`` the GEMM FLOPs per example,
    both in the symbols of the class's docstring.
    """

    name: str
    title: str
    paper: str
    year: int
    order: str
    cost: str
    knob: str | None
    secondary: str | None
    cls: type[Interaction]
    config: type[Strict]


_REGISTRY: dict[str, Info] = {}


def register(
    name: str,
    *,
    title: str,
    paper: str,
    year: int,
    order: str,
    cost: str,
    knob: str | None,
    secondary: str | None = None,
    **defaults: Any,
) -> Callable[[Class], Class]:
    """Class decorator: makes an architecture known by ``name``.

    A class may have several names; ``defaults`` are the options in which a name departs from the signature.
    """

    def decorate(cls: Class) -> Class:
        if name in _REGISTRY:
            raise ValueError(f"interaction {name!r} is registered twice")
        known = cls.Options.model_fields
        if unknown := ({knob, secondary} - {None} | set(defaults)) - set(known):
            raise ValueError(f"interaction {name!r} has no option {', '.join(map(str, unknown))}")
        hints = typing.get_type_hints(cls.Options, include_extras=True)
        changed = {option: (hints[option], value) for option, value in defaults.items()}
        fields: dict[str, Any] = {"name": (Literal[name], name), **changed}
        config = _model(f"{cls.__name__}Config", cls.Options, fields)
        _REGISTRY[name] = Info(name, title, paper, year, order, cost, knob, secondary, cls, config)
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


def build(
    spec: Mapping[str, Any] | Strict, features: int | FieldLayout, num_tasks: int | None = None
) -> Interaction:
    """An architecture from its config (or the plain mapping of one) for an ``x0`` of these features.

    Args:
        spec: the config.
        features: width of ``x0``, or its layout.
        num_tasks: of the model; told to architectures that have a representation a task.

    Raises:
        UserError: the config is wrong, or cannot be built for these features.
    """
    config = parse(spec) if isinstance(spec, Mapping) else spec
    options = {key: getattr(config, key) for key in type(config).model_fields}
    name = options.pop("name")
    if num_tasks is not None and "num_tasks" in options:
        options["num_tasks"] = num_tasks
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
