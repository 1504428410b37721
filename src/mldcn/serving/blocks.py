"""Linear maps of one input as one product, cut in blocks where only some of its columns are a candidate's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from mldcn.serving.parts import Normed, Value


class Weights(nn.Module):
    """The weights of an exported program, and what is made of them.

    Args:
        program: the program.
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


class Blocks:
    """The weights of linear maps of one input, below one another, and cut in the columns of its parts.

    Args:
        program: whose maps they are.
        nodes: the maps.
        request: ``(N,)``, the candidates' requests, where anything is shared.
    """

    def __init__(self, program: Weights, nodes: Sequence[fx.Node], request: Tensor | None) -> None:
        self.program = program
        self.nodes = nodes
        self.request = request
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
        repeated = first.index_select(0, cast(Tensor, self.request))
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
        repeated = torch.cat([first, variance, mean], dim=1).index_select(0, cast(Tensor, self.request))
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
        return self.program.constant(f"{self.nodes[0].name}_{name}", make)

    def _columns(self, value: Value, *, shared: bool) -> list[int]:
        return [i for columns in value.columns(shared=shared) for i in range(columns.start, columns.stop)]

    def _weight(self) -> Tensor:
        return torch.cat([self.program.weight(cast(fx.Node, node.args[1])) for node in self.nodes])

    def _biases(self) -> list[Tensor | None]:
        given = [node.args[2] if len(node.args) > 2 else None for node in self.nodes]
        return [None if bias is None else self.program.weight(cast(fx.Node, bias)) for bias in given]

    def _bias(self) -> Tensor:
        zeros = [self._weight().new_zeros(width) for width in self.widths]
        return torch.cat(
            [zero if bias is None else bias for bias, zero in zip(self._biases(), zeros, strict=True)]
        )

    def _gained(self, norm: fx.Node) -> Tensor:
        """The weights times the norm's gain."""
        gain = norm.args[2] if len(norm.args) > 2 else None
        weight = self._weight()
        return weight if gain is None else weight * self.program.weight(cast(fx.Node, gain))

    def _shifted(self, norm: fx.Node) -> Tensor:
        """The biases, with what the norm's bias becomes."""
        shift = norm.args[3] if len(norm.args) > 3 else None
        bias = self._bias()
        return bias if shift is None else bias + self._weight() @ self.program.weight(cast(fx.Node, shift))


def _centred(weight: Tensor) -> Tensor:
    return weight - weight.mean(1, keepdim=True)
