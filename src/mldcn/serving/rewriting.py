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
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx

from mldcn.serving.blocks import Blocks, Weights
from mldcn.serving.parts import Normed, Part, Size, Value, Weight, runs

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


class Rewritten(Weights):
    """A program whose linear maps of one input are one product, their weights laid out for it.

    Args:
        program: takes ids ``(B, C)``, dense ``(B, D)`` and a list of rows ``(B, n, e)``, gives ``(B, T)``.
    """

    def forward(self, ids: Tensor, dense: Tensor, rows: list[Tensor]) -> Tensor:
        """What the program gives, ``(B, T)``."""
        walk = _Walk(self, None, Size(ids.shape[0], ids.shape[0]))
        for node, each in zip(self.inputs, (ids, dense, *rows), strict=True):
            walk.found[node] = Value((Part(each, False),), node)
        return walk.result()


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
            walk.found[node] = Value(runs(flags, head, each, whole=True), node)
        waiting = {True: iter(first_rows), False: iter(own_rows)}
        for node, flags in zip(self.inputs[2:], self.shared[2:], strict=True):
            a, b = (next(waiting[side]) if side in flags else None for side in (True, False))
            walk.found[node] = Value(runs(flags, a, b, whole=False), node)
        return walk.result()


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
            alike = [each for each in alike if self._has_weights(each)]
            blocks = Blocks(self.program, alike, self.request)
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


def _is_shared(found: object) -> bool:
    return isinstance(found, Value) and found.shared
