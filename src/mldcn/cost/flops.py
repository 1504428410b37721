"""Counting the work of a forward pass: matrix products, element-wise arithmetic, rows looked up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

REST = "rest"  # what belongs to no part

aten = torch.ops.aten
# Arithmetic for each number of the first input, of operations that are no map of element to element.
# A LayerNorm: mean 1, deviation from it 1, its square and sum 2, scaling 2, gain and bias 2.
_PER_INPUT: dict[Any, int] = {
    aten.sum: 1,
    aten.mean: 1,
    aten.prod: 1,
    aten.cumsum: 1,
    aten.amax: 1,
    aten.amin: 1,
    aten.max: 1,
    aten.min: 1,
    aten.linalg_vector_norm: 2,
    aten.logsumexp: 3,
    aten.var: 4,
    aten.std: 4,
    aten.var_mean: 4,
    aten._softmax: 4,
    aten._log_softmax: 4,
    aten.native_layer_norm: 8,
    aten.native_group_norm: 8,
    # In serving the statistics are constants: a scale and a shift.
    aten.native_batch_norm: 2,
    aten._native_batch_norm_legit_no_training: 2,
}


def _mv(matrix: Sequence[int], vector: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _addmv(added: Sequence[int], matrix: Sequence[int], vector: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _dot(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * a[0]


# Products with a vector, as of a cross network whose weight is one: PyTorch counts only those of matrices.
_WITH_VECTORS = {aten.mv: _mv, aten.addmv: _addmv, aten.dot: _dot, aten.vdot: _dot}
# The added term, one number of the output each.
_WITH_SUM = {aten.addmm, aten.baddbmm, aten.addbmm, aten.addmv}
# Copies, which PyTorch too calls maps of elements.
_COPIES = {aten.clone, aten.positive}


def module_flops(module: nn.Module, *inputs: Tensor) -> int:
    """GEMM FLOPs per example (2 x multiply-adds), counted by torch while the module runs.

    Slower than the closed formula ``flops()`` of our modules, and right for every module.

    Args:
        module: any module.
        inputs: its inputs; the first has the batch in front.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_WITH_VECTORS) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // inputs[0].shape[0]


@dataclass(frozen=True)
class Work:
    """What a forward pass does.

    gemm: FLOPs of matrix products, 2 x the multiply-adds. elementwise: all other arithmetic on floating-point
    numbers: one for each number that a map of elements gives (whatever the function costs) and that a
    reduction reads, 4 for one of a softmax, 8 for one of a LayerNorm. row_bytes: of table rows looked up.
    Copies, casts and arithmetic on ids are not counted.
    """

    gemm: int = 0
    elementwise: int = 0
    row_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.gemm + other.gemm, self.elementwise + other.elementwise, self.row_bytes + other.row_bytes
        )

    def __mul__(self, times: int) -> Work:
        return Work(self.gemm * times, self.elementwise * times, self.row_bytes * times)


class _Unfilled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random initialisers do nothing: PyTorch's take a millisecond each on ``meta``, to the same effect."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.normal_, aten.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def meta() -> Iterator[None]:
    """Modules that are built within have sizes and no memory."""
    with torch.device("meta"), _Unfilled():  # type: ignore[no-untyped-call]
        yield


class ValueGuess(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets code that reads a value off a tensor run on tensors without values (meta, fake).

    Such code asks whether something is wrong, and is told that nothing is: ``any`` is False, ``all`` is True.
    A number that it reads is 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._last = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._last if args[0].dtype == torch.bool else 1
        packet = func.overloadpacket
        if packet in (aten.any, aten.all):
            self._last = packet is aten.all
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation, and looks at what it does."""
        return func(*args, **kwargs)


class WorkCounter(ValueGuess):  # type: ignore[no-untyped-call]
    """Adds up the work of everything that runs within it, by part; it runs on any device, best on ``meta``.

    Args:
        parts: name -> modules; what runs in none of them is :data:`REST`.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]] | None = None) -> None:
        super().__init__()
        self.parts = parts or {}
        self.work = {name: Work() for name in (*self.parts, REST)}
        self._now = REST
        self._formulas = FlopCounterMode(display=False, custom_mapping=_WITH_VECTORS).flop_registry

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Counts an operation."""
        packet = func.overloadpacket
        if packet not in self._formulas:
            # In inference mode PyTorch leaves it to us to take composite operations apart.
            with self:
                whole = func.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        out = func(*args, **kwargs)
        formula = self._formulas.get(packet)
        gemm = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        rows = out.numel() * out.element_size() if packet is aten.embedding else 0
        self.work[self._now] += Work(gemm, _elementwise(func, args, out), rows)
        return out

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Counts, and knows which part runs."""
        hooks: list[Any] = []

        def entered(name: str) -> Callable[..., None]:
            def enter(*_: Any) -> None:
                self._now = name

            return enter

        for name, modules in self.parts.items():
            for module in modules:
                hooks.append(module.register_forward_pre_hook(entered(name)))
                hooks.append(module.register_forward_hook(entered(REST)))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


def per_example(
    run: Callable[[int], object], parts: Mapping[str, Sequence[nn.Module]] | None = None
) -> tuple[dict[str, Work], dict[str, Work]]:
    """The work of each part per example, and per pass whatever the batch (products of weights, for example).

    Args:
        run: a forward pass of so many examples.
        parts: name -> modules.
    """
    small, large = (_count(run, parts, size) for size in (2, 4))
    example, call = {}, {}
    for name in small:
        twice = large[name] + small[name] * -1
        example[name] = Work(twice.gemm // 2, twice.elementwise // 2, twice.row_bytes // 2)
        call[name] = small[name] + example[name] * -2
    return example, call


def _count(
    run: Callable[[int], object], parts: Mapping[str, Sequence[nn.Module]] | None, size: int
) -> dict[str, Work]:
    counter = WorkCounter(parts)
    with torch.no_grad(), counter.watching():
        run(size)
    return counter.work


def _elementwise(func: Any, args: Any, out: Any) -> int:
    packet = func.overloadpacket
    first = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
    if first is None or not first.is_floating_point():
        return 0
    if packet in _PER_INPUT:
        return _PER_INPUT[packet] * int(args[0].numel())
    if packet in _WITH_SUM:
        return first.numel()
    return first.numel() if torch.Tag.pointwise in func.tags and packet not in _COPIES else 0
