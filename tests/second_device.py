"""A device that is not there, for tests of code that must also be right on a GPU.

Its tensors compute on the CPU, but an operation that takes tensors of it and of the CPU together fails as it does
on a GPU, and NumPy cannot read them. Kernels, streams and random numbers of a real device are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    """What ``torch.away`` must say."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        pass


_setup_privateuseone_for_python_backend("away", _Module())
_autocast = torch.library.Library("_", "IMPL")  # autocast chooses no types there
_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
AWAY = torch.device("away", 0)
CPU = torch.device("cpu")
ATEN = torch.ops.aten
MOVES = (ATEN._to_copy.default, ATEN.copy_.default)  # take a tensor of either device
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default)  # take indices of the CPU


class MixedDevicesError(RuntimeError):
    """An operation took tensors of two devices."""


class AwayTensor(Tensor):
    """A tensor of the device; ``held`` are its values."""

    held: Tensor
    made = 0  # tensors since the beginning: what computes elsewhere makes none

    @staticmethod
    def __new__(cls, held: Tensor) -> AwayTensor:
        dense = held.layout == torch.strided
        lies = (
            {"strides": held.stride(), "storage_offset": held.storage_offset()}
            if dense
            else {"layout": held.layout}
        )
        made: AwayTensor = Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=AWAY, **lies
        )
        made.held = held
        cls.made += 1
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"{AWAY}: {self.held}"


class _Device(TorchDispatchMode):
    """Lets functions that make tensors know the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """``torch.tensor`` goes to the device without passing the dispatcher: here it takes the way over the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if (
            func in (torch.tensor, torch.as_tensor)
            and torch.device(options.get("device") or CPU).type == AWAY.type
        ):
            return func(*args, **{**options, "device": CPU}).to(AWAY)
        return func(*args, **options)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """The device, inside of which tensors can be made on it and moved to and from it."""
    with _FromData(), _Device():
        yield AWAY


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.is_inference_mode_enabled():  # which sends on whole what autograd takes apart
        with _Device():
            if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    away = [each for each in given if isinstance(each, AwayTensor)]
    asked = kwargs.get("device")
    if away and func not in MOVES:
        must = given[:1] if func in INDEXING else given
        if func in INDEXING and not isinstance(args[0], AwayTensor):
            raise MixedDevicesError(f"{func}: indices of {AWAY} into a tensor of the CPU")
        strangers = [each for each in must if not isinstance(each, AwayTensor) and each.dim()]
        if strangers:
            raise MixedDevicesError(
                f"{func}: tensors of {AWAY} and of the CPU, {[each.shape for each in strangers]}"
            )
    inner = {**kwargs, "device": CPU} if asked is not None else kwargs
    held: Callable[[Any], Any] = lambda tree: tree_map_only(AwayTensor, lambda each: each.held, tree)  # noqa: E731
    out = func(*held(args), **held(inner))
    lands = torch.device(asked).type == AWAY.type if asked is not None else bool(away)
    if func is ATEN.copy_.default:
        lands = isinstance(args[0], AwayTensor)
    if not lands:
        return out
    with torch.inference_mode(False):  # which has no views of such tensors
        wrapped = tree_map_only(Tensor, AwayTensor, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)
