"""An exported program computed over requests: what depends on user and context alone, once a request.

The program of a model says what becomes of a batch of rows, operation by operation. :class:`PerRequest` walks
through it with two batches at a time, one of R requests and one of their N candidates, and holds each value as
*parts*: neighbouring columns that are the same for all candidates of a request (computed on R rows), and columns
of the candidates' own (computed on N rows). An operation on shared parts alone stays shared, whatever it is. Of
others,

- those that move columns about (slices, concatenations, changes of shape) or treat each alone (ReLU, products with
  weights, norms and products within a field) are done part by part;
- a linear map is cut in blocks, ``W x = W_s x_s + W_o x_o``, so that the request's share is computed once;
- a LayerNorm before a linear map is put off until behind it, where it is a correction of rank one;
- all else gets whole rows, the shared columns repeated for each candidate.

So the result is exact up to rounding for any model whose rows do not depend on one another, and what a model
shares follows from its operations, not from its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten


def _named(names: str) -> set[Any]:
    return {getattr(aten, name) for name in names.split()}


_CHECKS = _named("_assert_tensor_metadata _assert_scalar")
# Each number of the result depends only on those at its place.
_ELEMENTWISE = _named(
    "abs add bitwise_and bitwise_not bitwise_or clamp clamp_max clamp_min clone contiguous div elu exp expand_as "
    "ge gelu gt hardtanh le leaky_relu log log1p logical_and logical_not lt masked_fill maximum minimum mul ne "
    "neg pow reciprocal relu rsqrt sigmoid sign silu softplus sqrt square sub tanh to where"
)
# Those that work over dimensions, and which of their arguments names them.
_OVER = dict.fromkeys(_named("amax any mean select softmax squeeze sum unsqueeze"), 1) | {
    aten.linalg_vector_norm: 2
}
_END = 2**63 - 1  # of a slice that goes to the end
_RESHAPES = {aten.flatten, aten.reshape, aten.unflatten, aten.view}


@dataclass(frozen=True)
class Part:
    """Columns of a value: ``(R, ...)``, the same for all candidates of a request, or ``(N, ...)``."""

    tensor: Tensor
    shared: bool

    @property
    def width(self) -> int:
        """Its columns."""
        return int(self.tensor.shape[1])

    def cut(self, start: int, stop: int) -> Part:
        """Some of the columns."""
        return replace(self, tensor=self.tensor[:, start:stop])


@dataclass(frozen=True)
class Value:
    """What ``node`` gives: parts side by side along dimension 1, or a single one of any shape."""

    parts: tuple[Part, ...]
    node: fx.Node

    @property
    def shared(self) -> bool:
        """Whether all of it is the same for all candidates of a request."""
        return all(part.shared for part in self.parts)

    @property
    def mixed(self) -> bool:
        """Whether only some of it is."""
        return not self.shared and any(part.shared for part in self.parts)

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return self.parts[0].tensor.dim()

    def cut(self, start: int, stop: int) -> tuple[Part, ...]:
        """The parts of some columns."""
        found, at = [], 0
        for part in self.parts:
            low, high = max(start - at, 0), min(stop - at, part.width)
            if low < high:
                found.append(part if high - low == part.width else part.cut(low, high))
            at += part.width
        return tuple(found)

    def joined(self, *, shared: bool) -> Tensor:
        """Its shared columns, or the others, side by side."""
        found = [part.tensor for part in self.parts if part.shared is shared]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def columns(self, *, shared: bool) -> list[slice]:
        """Where these lie."""
        found, at = [], 0
        for part in self.parts:
            if part.shared is shared:
                found.append(slice(at, at + part.width))
            at += part.width
        return found


@dataclass(frozen=True)
class Normed:
    """What ``node`` gives: a LayerNorm over all columns of ``source``, put off."""

    source: Value
    node: fx.Node


@dataclass(frozen=True)
class Weight:
    """What ``node`` gives depends on no input."""

    node: fx.Node


@dataclass(frozen=True)
class Size:
    """A whole number that grows with the batch: for R requests, and for N candidates."""

    requests: Any
    rows: Any


class Rewritten(nn.Module):
    """A program whose linear maps of one input are one product, their weights laid out for it.

    Args:
        program: takes ids ``(B, C)``, dense ``(B, D)`` and a list of rows ``(B, n, e)``, gives ``(B, T)``.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.graph = program.graph_module.graph
        signature = program.graph_signature
        held = dict(program.state_dict) | dict(program.constants)
        names = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
        names |= dict(signature.inputs_to_lifted_tensor_constants)
        self._held = {place: cast(Tensor, held[name]).detach() for place, name in names.items()}
        self.weights = {node for node in self.graph.nodes if node.name in self._held}
        self.inputs = [
            node for node in self.graph.nodes if node.op == "placeholder" and node not in self.weights
        ]

    def forward(self, ids: Tensor, dense: Tensor, rows: list[Tensor]) -> Tensor:
        """What the program gives, ``(B, T)``."""
        walk = _Walk(self, None, Size(ids.shape[0], ids.shape[0]))
        for node, each in zip(self.inputs, (ids, dense, *rows), strict=True):
            walk.found[node] = Value((Part(each, False),), node)
        return walk.result()

    def weight(self, node: fx.Node) -> Tensor:
        """A weight of the program, or what it computes from weights alone."""
        if node in self.weights:
            return self._held[node.name]
        assert callable(node.target)
        with torch.no_grad():
            found: Tensor = node.target(*fx.map_arg(node.args, self.weight), **node.kwargs)
        return found

    def constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends on no input; made once and kept among the buffers."""
        if name not in self._buffers:
            self.register_buffer(name, make().contiguous())
        found: Tensor = getattr(self, name)
        return found


class PerRequest(Rewritten):
    """A program over requests and their candidates.

    Args:
        program: as that of :class:`Rewritten`.
        shared: for each of its inputs, which columns are the same for all candidates of a request.
    """

    def __init__(self, program: torch.export.ExportedProgram, shared: Sequence[Sequence[bool]]) -> None:
        super().__init__(program)
        self.shared = shared

    def forward(  # type: ignore[override]
        self,
        first: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        first_rows: list[Tensor],
        own_rows: list[Tensor],
        request: Tensor,
    ) -> Tensor:
        """Logits ``(N, T)``.

        Args:
            first: ids ``(R, C)`` and dense ``(R, D)`` of a candidate of each request.
            own: ids ``(N, C)`` and dense ``(N, D)`` of all.
            first_rows: ``(R, n_s, e)`` of each input of rows that has shared columns, these only.
            own_rows: ``(N, n_o, e)`` of each that has others, these only.
            request: ``(N,)`` int64, in which of the R requests each candidate is.
        """
        walk = _Walk(self, request, Size(first[0].shape[0], request.shape[0]))
        for node, flags, head, each in zip(self.inputs[:2], self.shared[:2], first, own, strict=True):
            walk.found[node] = Value(_runs(flags, head, each, whole=True), node)
        waiting = {True: iter(first_rows), False: iter(own_rows)}
        for node, flags in zip(self.inputs[2:], self.shared[2:], strict=True):
            a, b = (next(waiting[side]) if side in flags else None for side in (True, False))
            walk.found[node] = Value(_runs(flags, a, b, whole=False), node)
        return walk.result()


def _runs(
    flags: Sequence[bool], first: Tensor | None, own: Tensor | None, *, whole: bool
) -> tuple[Part, ...]:
    """An input in parts. ``whole``: both tensors have all columns; else each has its own only."""
    found: list[Part] = []
    start, taken = 0, {True: 0, False: 0}
    for shared, run in groupby(flags):
        width = len(list(run))
        begin = start if whole else taken[shared]
        tensor = cast(Tensor, first if shared else own)
        found.append(Part(tensor[:, begin : begin + width], shared))
        taken[shared] += width
        start += width
    return tuple(found) or (Part(cast(Tensor, first), True),)


class _Walk:
    """One call of a :class:`Rewritten`; without ``request`` nothing is shared."""

    def __init__(self, program: Rewritten, request: Tensor | None, batch: Size) -> None:
        self.program = program
        self.request = request
        self.batch = batch
        self.symbol = program.inputs[0].meta["val"].shape[0].node.expr
        self.found: dict[fx.Node, Any] = {}
        self._rows: dict[fx.Node, Any] = {}
        self._products: dict[fx.Node, Tensor] = {}
        self._rules: dict[Any, Callable[[fx.Node], Any]] = {
            aten.batch_norm: self._elementwise,
            aten.cat: self._cat,
            aten.layer_norm: self._layer_norm,
            aten.linear: self._linear,
            aten.matmul: self._matmul,
            aten.narrow: self._slice,
            aten.slice: self._slice,
            aten.split_with_sizes: self._split,
            aten.stack: self._cat,
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(_OVER, self._over),
            **dict.fromkeys(_RESHAPES, self._reshape),
        }

    def result(self) -> Tensor:
        """The program's only output."""
        *nodes, output = self.program.graph.nodes
        for node in nodes:
            if node in self.program.weights:
                self.found[node] = Weight(node)
            elif node.op == "call_function":
                self.found[node] = self._computed(node)
        (result,) = output.args[0]
        return cast(Tensor, self.rows(result))

    def rows(self, node: fx.Node) -> Any:
        """What a node gives for the N candidates."""
        found = self.found.get(node)
        if isinstance(found, Weight):
            return self._weight(node)
        if isinstance(found, Size) and found.rows is not None:
            return found.rows
        if isinstance(found, int):
            return found
        if isinstance(found, Value | Normed) and found.node is not node:
            return self.rows(found.node)
        if node not in self._rows:
            if isinstance(found, Value) and self._by_rows(found):
                parts = [self._repeated(part) for part in found.parts]
                self._rows[node] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            else:
                self._rows[node] = self._called(node, self.rows)
        return self._rows[node]

    def _computed(self, node: fx.Node) -> Any:
        target = getattr(node.target, "overloadpacket", node.target)
        if target in _CHECKS:
            return None
        if target is aten.sym_size:
            return self._size(node)
        if target is aten.dropout or (target is aten.slice and node.args[1:] == (0, 0, _END)):
            return self.found[node.all_input_nodes[0]]
        inputs = [self.found[each] for each in node.all_input_nodes]
        if inputs and all(isinstance(each, Weight) for each in inputs):
            return Weight(node)
        if target is operator.getitem and isinstance(inputs[0], list):
            return replace(inputs[0][cast(int, node.args[1])], node=node)
        if self.request is not None and all(
            isinstance(each, Weight | Size) or _is_shared(each) for each in inputs
        ):
            return self._wrapped(node, self._called(node, self._first), shared=True)
        made = self._rules[target](node) if target in self._rules else None
        return made if made is not None else self._wrapped(node, self.rows(node), shared=False)

    def _called(self, node: fx.Node, each: Callable[[fx.Node], Any]) -> Any:
        assert callable(node.target)
        return node.target(*fx.map_arg(node.args, each), **fx.map_arg(node.kwargs, each))

    def _wrapped(self, node: fx.Node, result: Any, *, shared: bool) -> Any:
        if isinstance(result, list | tuple):
            return [self._wrapped(node, each, shared=shared) for each in result]
        if isinstance(result, Tensor):
            return Value((Part(result, shared),), node)
        return Size(result, None)

    def _size(self, node: fx.Node) -> Any:
        size = node.meta["val"]
        if isinstance(size, int):
            return size
        if size.node.expr != self.symbol:
            raise NotImplementedError(f"a size of {size}")
        return self.batch

    def _first(self, node: fx.Node) -> Any:
        """What a node gives for the R requests."""
        found = self.found[node]
        if isinstance(found, Weight):
            return self._weight(node)
        return found.requests if isinstance(found, Size) else found.joined(shared=True)

    def _weight(self, node: fx.Node) -> Tensor:
        return self.program.constant(f"w_{node.name}", lambda: self.program.weight(node))

    def _repeated(self, part: Part) -> Tensor:
        return part.tensor.index_select(0, cast(Tensor, self.request)) if part.shared else part.tensor

    def _by_rows(self, value: Value) -> bool:
        """Whether the first dimension of a value's parts is the batch, and no other depends on it."""
        if len(value.parts) > 1 or not value.parts[0].shared:
            return True
        first, *others = value.node.meta["val"].shape or (1,)
        batch = isinstance(first, torch.SymInt) and first.node.expr == self.symbol
        return batch and all(isinstance(each, int) for each in others)

    def _mixed(self, node: fx.Node) -> Value | None:
        """The value that an operation reads first, where only some of its columns are shared."""
        found = self.found.get(node.all_input_nodes[0])
        return found if isinstance(found, Value) and found.mixed else None

    def _each(self, node: fx.Node, value: Value) -> Value:
        """The operation on each part of its first input; all else that it reads are weights and numbers."""
        source = node.all_input_nodes[0]

        def made(part: Part) -> Tensor:
            result = self._called(node, lambda each: part.tensor if each is source else self._first(each))
            return cast(Tensor, result)

        return Value(tuple(Part(made(part), part.shared) for part in value.parts), node)

    def _cat(self, node: fx.Node) -> Value | None:
        tensors, dim = cast(Sequence[fx.Node], node.args[0]), node.args[1] if len(node.args) > 1 else 0
        values = [self.found[each] for each in tensors]
        rank = node.meta["val"].dim()
        if dim not in (1, 1 - rank) or not all(isinstance(v, Value) and self._by_rows(v) for v in values):
            return None
        parts = [part for value in values for part in value.parts]
        if node.target is aten.stack.default:
            parts = [replace(part, tensor=part.tensor.unsqueeze(1)) for part in parts]
        return Value(tuple(parts), node)

    def _slice(self, node: fx.Node) -> Value | None:
        value = self._mixed(node)
        _, dim, start, end = (*node.args, *(None,) * 4)[:4]
        if value is None or dim != 1 or len(node.args) > 4 or not isinstance(start, int | None):
            return None
        width = sum(part.width for part in value.parts)
        if node.target is aten.narrow.default:
            end = cast(int, start) + cast(int, end)
        low, high, _ = slice(start, cast(int, end)).indices(width)
        return Value(value.cut(low, high), node) if low < high else None

    def _split(self, node: fx.Node) -> list[Value] | None:
        value = self._mixed(node)
        if value is None or node.args[2:] != (1,):
            return None
        found, at = [], 0
        for size in cast(list[int], node.args[1]):
            found.append(Value(value.cut(at, at + size), node))
            at += size
        return found

    def _reshape(self, node: fx.Node) -> Value | None:
        value = self._mixed(node)
        first, *shape = node.meta["val"].shape
        if (
            value is None
            or not shape
            or not isinstance(first, torch.SymInt)
            or first.node.expr != self.symbol
        ):
            return None
        inner = shape[1:]
        parts = []
        for part in value.parts:
            columns, rest = divmod(prod(part.tensor.shape[1:]), prod(inner))
            if rest:
                return None
            parts.append(Part(part.tensor.reshape(part.tensor.shape[0], columns, *inner), part.shared))
        return Value(tuple(parts), node)

    def _over(self, node: fx.Node) -> Value | None:
        """An operation over dimensions: those behind the columns are free; a sum over the columns adds up."""
        value = self._mixed(node)
        target = getattr(node.target, "overloadpacket", None)
        place = _OVER[target]
        if value is None or len(node.args) <= place:
            return None
        named = node.args[place]
        dims = [named] if isinstance(named, int) else list(cast(Sequence[int], named or [0]))
        rank = value.rank + (target is aten.unsqueeze)
        dims = [dim % rank for dim in dims]
        if min(dims) > 1:
            return self._each(node, value)
        if target is not aten.sum or dims != [1]:
            return None
        sums = [self._repeated(part) for part in self._each(node, value).parts]
        return Value((Part(torch.stack(sums).sum(0), False),), node)

    def _elementwise(self, node: fx.Node) -> Value | None:
        values = {each: self.found[each] for each in node.all_input_nodes}
        rank = node.meta["val"].dim()
        if rank < 2 or (node.target is aten.batch_norm.default and rank > 2):
            return None
        ends = {0}
        for each in values.values():
            if isinstance(each, Weight):
                continue
            if not isinstance(each, Value) or each.rank != rank or not self._by_rows(each):
                return None
            if not (each.shared or each.mixed or each.parts[0].width < node.meta["val"].shape[1]):
                return None
            for part in each.columns(shared=True) + each.columns(shared=False):
                ends.add(part.stop)
        bounds = sorted(ends)
        parts = []
        for start, stop in pairwise(bounds):
            cut = {each: self._columns(value, start, stop, rank) for each, value in values.items()}
            shared = all(isinstance(part, Tensor) or part.shared for part in cut.values())
            given = {
                each: part if isinstance(part, Tensor) else part.tensor if shared else self._repeated(part)
                for each, part in cut.items()
            }
            parts.append(Part(self._called(node, given.__getitem__), shared))
        return Value(tuple(parts), node)

    def _columns(self, found: Value | Weight, start: int, stop: int, rank: int) -> Part | Tensor:
        """Some columns of what an element-wise operation of a rank reads, or all where there is one."""
        if isinstance(found, Value):
            return (
                found.cut(start, stop)[0] if sum(part.width for part in found.parts) > 1 else found.parts[0]
            )
        weight = self._weight(found.node)
        axis = weight.dim() - rank + 1
        return weight if axis < 0 or weight.shape[axis] == 1 else weight.narrow(axis, start, stop - start)

    def _layer_norm(self, node: fx.Node) -> Value | Normed | None:
        value = self._mixed(node)
        if value is None:
            return None
        if value.rank - len(cast(Sequence[int], node.args[1])) > 1:
            return self._each(node, value)
        single = value.rank == 2 and value.parts[0].tensor.dtype == torch.float32
        return Normed(value, node) if single else None

    def _matmul(self, node: fx.Node) -> Value | None:
        value = self._mixed(node)
        weight = self.found[cast(fx.Node, node.args[1])]
        if value is None or value.rank < 3 or not isinstance(weight, Weight):
            return None
        return self._each(node, value) if self._weight(weight.node).dim() == 2 else None

    def _linear(self, node: fx.Node) -> Value | None:
        """A linear map by blocks, one product for all those of the same input."""
        source = node.all_input_nodes[0]
        found = self.found[source]
        if not isinstance(found, Value | Normed) or not self._has_weights(node):
            return None
        if isinstance(found, Value) and found.rank != 2:
            return self._each(node, found) if found.mixed else None
        if node not in self._products:
            alike = [each for each in source.users if each.target is node.target and each.args[0] is source]
            blocks = _Blocks(self, [each for each in alike if self._has_weights(each)])
            if isinstance(found, Normed):
                products = blocks.normed(found)
            elif found.mixed:
                products = blocks.plain(found)
            else:
                products = blocks.whole(self.rows(source))
            self._products |= zip(blocks.nodes, products, strict=True)
        return Value((Part(self._products[node], False),), node)

    def _has_weights(self, node: fx.Node) -> bool:
        return all(each in self.program.weights for each in node.all_input_nodes[1:])


class _Blocks:
    """The weights of linear maps of one input, below one another, and cut in the columns of its parts.

    Args:
        walk: where they are met.
        nodes: the maps.
    """

    def __init__(self, walk: _Walk, nodes: Sequence[fx.Node]) -> None:
        self.walk = walk
        self.nodes = nodes
        self.widths = [int(node.meta["val"].shape[1]) for node in nodes]

    def whole(self, x: Tensor) -> list[Tensor]:
        """``W x + b`` of rows of which nothing is shared."""
        products = self._cut(torch.mm(x, self._constant("whole", lambda: self._weight().t())))
        return [
            product if bias is None else product + self._constant(f"bias_{i}", lambda: bias)  # noqa: B023
            for i, (product, bias) in enumerate(zip(products, self._biases(), strict=True))
        ]

    def plain(self, value: Value) -> list[Tensor]:
        """``W x + b`` for the candidates."""
        shared, own = (self._columns(value, shared=side) for side in (True, False))
        first = torch.addmm(
            self._constant("bias", self._bias),
            value.joined(shared=True),
            self._constant("shared", lambda: self._weight()[:, shared].t()),
        )
        repeated = first.index_select(0, cast(Tensor, self.walk.request))
        weight = self._constant("own", lambda: self._weight()[:, own].t())
        return self._cut(torch.mm(value.joined(shared=False), weight) + repeated)

    def normed(self, found: Normed) -> list[Tensor]:
        """``W LN(x) + b`` for the candidates.

        Each side's numbers are centred by weights of mean zero, ``W_s (x_s - m_s) = (W_s - mean(W_s)) x_s``; the
        distance of the two means from the mean of all is a correction of rank one.
        """
        value, node = found.source, found.node
        shared, own = (self._columns(value, shared=side) for side in (True, False))
        n, m = len(shared), len(own)
        x, y = value.joined(shared=True), value.joined(shared=False)
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        first = torch.mm(x, self._constant("shared", lambda: _centred(self._gained(node)[:, shared]).t()))
        repeated = torch.cat([first, variance, mean], dim=1).index_select(0, cast(Tensor, self.walk.request))
        first, variance, mean = torch.split(repeated, [first.shape[1], 1, 1], dim=1)
        own_variance, own_mean = torch.var_mean(y, dim=1, correction=0, keepdim=True)
        apart = mean - own_mean
        variance = (n * variance + m * own_variance) / (n + m) + apart.square() * (n * m / (n + m) ** 2)
        weight = self._constant("own", lambda: _centred(self._gained(node)[:, own]).t())

        def slope() -> Tensor:
            gained = self._gained(node)
            return (m * gained[:, shared].sum(1) - n * gained[:, own].sum(1)) / (n + m)

        product = torch.mm(y, weight) + first + apart * self._constant("slope", slope)
        eps = cast(float, node.args[4]) if len(node.args) > 4 else 1e-5
        bias = self._constant("bias", lambda: self._shifted(node))
        return self._cut(product * torch.rsqrt(variance + eps) + bias)

    def _cut(self, product: Tensor) -> list[Tensor]:
        return list(torch.split(product, self.widths, dim=1)) if len(self.widths) > 1 else [product]

    def _constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        return self.walk.program.constant(f"{self.nodes[0].name}_{name}", make)

    def _columns(self, value: Value, *, shared: bool) -> list[int]:
        return [i for columns in value.columns(shared=shared) for i in range(columns.start, columns.stop)]

    def _weight(self) -> Tensor:
        return torch.cat([self.walk.program.weight(cast(fx.Node, node.args[1])) for node in self.nodes])

    def _biases(self) -> list[Tensor | None]:
        given = [node.args[2] if len(node.args) > 2 else None for node in self.nodes]
        return [None if bias is None else self.walk.program.weight(cast(fx.Node, bias)) for bias in given]

    def _bias(self) -> Tensor:
        zeros = [self._weight().new_zeros(width) for width in self.widths]
        return torch.cat(
            [zero if bias is None else bias for bias, zero in zip(self._biases(), zeros, strict=True)]
        )

    def _gained(self, norm: fx.Node) -> Tensor:
        """The weights times the norm's gain."""
        gain = norm.args[2] if len(norm.args) > 2 else None
        weight = self._weight()
        return weight if gain is None else weight * self.walk.program.weight(cast(fx.Node, gain))

    def _shifted(self, norm: fx.Node) -> Tensor:
        """The biases, with what the norm's bias becomes."""
        shift = norm.args[3] if len(norm.args) > 3 else None
        bias = self._bias()
        return (
            bias if shift is None else bias + self._weight() @ self.walk.program.weight(cast(fx.Node, shift))
        )


def _centred(weight: Tensor) -> Tensor:
    return weight - weight.mean(1, keepdim=True)


def _is_shared(found: object) -> bool:
    return isinstance(found, Value) and found.shared
