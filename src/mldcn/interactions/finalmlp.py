"""FinalMLP: two MLP streams, each on features of its own choice, and their bilinear fusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import get_args

import torch
from torch import Tensor, nn

from mldcn.config import suggest
from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.layout import Field, FieldLayout, Source, as_layout

_GROUP = "source:"


class FeatureGate(nn.Module):
    """``2 sigmoid(MLP(c)) * x0``: a weight a column of ``x0``, made from the columns c of context fields.

    Without context the weights are ``2 sigmoid(a)`` with a learned a: an MLP of a learned vector, as the
    paper has it, is a constant, too. a starts at 0, so that all weights are 1. With a context of width c,
    hidden widths h and output d: ``sum(a b + b)`` parameters and ``sum(2 a b)`` FLOPs over neighbouring
    widths of ``(c, *h, d)``; without one d and 0.

    Args:
        layout: the fields of ``x0``, d columns in all.
        context: the fields that the gate reads.
        hidden: widths of the MLP's hidden layers.
    """

    def __init__(self, layout: FieldLayout, context: Sequence[Field], hidden: Sequence[int]) -> None:
        super().__init__()
        self.columns = [field.columns for field in context]
        self.bias: nn.Parameter | None = None
        self.mlp: MLP | None = None
        self.out: nn.Linear | None = None
        if context:
            self.mlp = MLP(sum(field.width for field in context), hidden)
            self.out = nn.Linear(self.mlp.out_features, layout.width)
            nn.init.xavier_normal_(self.out.weight)
            nn.init.zeros_(self.out.bias)
        else:
            self.bias = nn.Parameter(torch.zeros(layout.width))

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        if self.mlp is None or self.out is None:
            assert self.bias is not None
            return x0 * (2 * self.bias.sigmoid())
        context = torch.cat([x0[:, columns] for columns in self.columns], dim=1)
        weights: Tensor = 2 * self.out(self.mlp(context)).sigmoid()
        return x0 * weights

    def flops(self) -> int:
        """``sum(2 a b)``, or 0."""
        if self.mlp is None or self.out is None:
            return 0
        flops: int = self.mlp.flops() + 2 * self.out.weight.numel()
        return flops


class BilinearFusion(nn.Module):
    """``y = b + W1 o1 + W2 o2 + sum_h o1_h^T W_h o2_h`` over k heads, each a slice of either stream.

    Where a stream's width is no multiple of k its first slices are one wider, as in ``torch.tensor_split``.
    With streams of widths n1, n2 and output q: ``q (n1 n2 / k + n1 + n2 + 1)`` parameters,
    ``2q (n1 n2 / k + n1 + n2)`` FLOPs (the products with o2 are element-wise). Xavier-normal weights; those
    of the heads have as many inputs as there are products, so that a fresh sum over heads is of the streams'
    scale.

    Args:
        first: n1.
        second: n2.
        out_features: q; 1 in the paper.
        num_heads: k.
    """

    def __init__(self, first: int, second: int, out_features: int, num_heads: int) -> None:
        super().__init__()
        if num_heads > min(first, second):
            raise ValueError(
                f"num_heads {num_heads} is more than the {min(first, second)} columns of a stream"
            )
        self.out_features = out_features
        self.linear1 = nn.Linear(first, out_features)
        self.linear2 = nn.Linear(second, out_features, bias=False)
        heads = list(zip(_split(first, num_heads), _split(second, num_heads), strict=True))
        # Neighbouring heads of one shape go in one batched product.
        self.runs = [(shape, len(list(run))) for shape, run in groupby(heads)]
        self.weights = nn.ParameterList(
            torch.empty(count, one, out_features * two) for (one, two), count in self.runs
        )
        nn.init.xavier_normal_(self.linear1.weight)
        nn.init.xavier_normal_(self.linear2.weight)
        nn.init.zeros_(self.linear1.bias)
        products = sum(one * two for one, two in heads)
        for weight in self.weights:
            nn.init.normal_(weight, std=math.sqrt(2 / (products + out_features)))

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """``(B, n1), (B, n2) -> (B, q)``."""
        out: Tensor = self.linear1(one) + self.linear2(two)
        ones = torch.split(one, [shape[0] * count for shape, count in self.runs], dim=1)
        twos = torch.split(two, [shape[1] * count for shape, count in self.runs], dim=1)
        for (shape, count), left, right, weight in zip(self.runs, ones, twos, self.weights, strict=True):
            left = left.reshape(-1, count, shape[0]).transpose(0, 1)  # (k, B, n1 / k)
            mapped = torch.bmm(left, weight).reshape(count, -1, self.out_features, shape[1])
            right = right.reshape(-1, count, 1, shape[1]).transpose(0, 1)  # (k, B, 1, n2 / k)
            out = out + (mapped * right).sum(dim=(0, 3))
        return out

    def flops(self) -> int:
        """``2q (n1 n2 / k + n1 + n2)``."""
        weights = [self.linear1.weight, self.linear2.weight, *self.weights]
        products: int = sum(weight.numel() for weight in weights)
        return 2 * products


@register(
    "finalmlp",
    title="FinalMLP",
    paper="Mao et al., FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction",
    year=2023,
    order="none (ReLU)",
    cost="Σ 2ab + 2q (n₁n₂/k + n₁ + n₂)",
    knob="hidden1",
    secondary="hidden2",
)
class FinalMLP(Interaction):
    """Two MLP streams with feature-selection gates, and their multi-head bilinear fusion.

    ``o_i = MLP_i(2 sigmoid(gate_i(c_i)) * x0)`` and ``y = b + W1 o1 + W2 o2 + sum_h o1_h^T W_h o2_h``. The
    gates read context fields, say the user's in one stream and the item's in the other, or none at all. As
    published y is one number, the logit; for several tasks, or with an MLP behind, a wider y loses less.

    Parameters and FLOPs are those of the parts: with ``sum`` over neighbouring widths a, b of
    ``(d, *hidden_i)``, ``sum(a b + b)`` and ``sum(2 a b)`` a stream, and those of :class:`FeatureGate` and
    :class:`BilinearFusion`.

    Args:
        features: width d of ``x0``, or its layout.
        hidden1: width of each layer of the first stream, the last being n1.
        hidden2: width of each layer of the second stream, the last being n2.
        num_heads: k of the fusion; more heads are cheaper, by a factor of k.
        width: q of the result; 1 in the paper.
        selection: whether the streams have gates.
        context1: what the first stream's gate reads: names of fields, or of all fields of a source group, as
            ``source:user``; nothing makes it a learned constant.
        context2: the same for the second stream.
        gate_hidden: width of each hidden layer of a gate.
        dropout: after every layer of the streams.
        batch_norm: between every layer's linear map and its ReLU in the streams.

    Raises:
        ValueError: a stream has no layer or fewer columns than there are heads, or a context names no field.

    Example:
        >>> import torch
        >>> from mldcn.interactions import FinalMLP
        >>> from mldcn.layout import FieldLayout
        >>> fields = [("user", "categorical", "user", 8), ("ad", "categorical", "item", 8)]
        >>> layout = FieldLayout.build(fields)
        >>> net = FinalMLP(layout, hidden1=(8,), hidden2=(4,), num_heads=2, context1=("source:user",))
        >>> net(torch.randn(4, 16)).shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        hidden1: tuple[Count, ...] = (256, 128),
        hidden2: tuple[Count, ...] = (256, 128),
        num_heads: Count = 1,
        width: Count = 1,
        selection: bool = True,
        context1: tuple[str, ...] = (),
        context2: tuple[str, ...] = (),
        gate_hidden: tuple[Count, ...] = (64,),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, width)
        if not hidden1 or not hidden2:
            raise ValueError("hidden1 and hidden2 need a layer at least")
        if not selection and (context1 or context2):
            raise ValueError("context1 and context2 are read by gates; selection: false has none")
        self.gates = nn.ModuleList(
            FeatureGate(layout, _chosen(layout, context, name), gate_hidden)
            for name, context in (("context1", context1), ("context2", context2))
            if selection
        )
        self.mlps = nn.ModuleList(
            MLP(layout.width, hidden, dropout=dropout, batch_norm=batch_norm) for hidden in (hidden1, hidden2)
        )
        self.fusion = BilinearFusion(hidden1[-1], hidden2[-1], width, num_heads)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, width)``."""
        inputs = [gate(x0) for gate in self.gates] or [x0, x0]
        one, two = (stream(each) for stream, each in zip(self.mlps, inputs, strict=True))
        out: Tensor = self.fusion(one, two)
        return out

    def flops(self) -> int:
        """The sum over gates, streams and fusion."""
        return sum(part.flops() for part in (*self.gates, *self.mlps, self.fusion))


def _split(width: int, parts: int) -> list[int]:
    """The widths of ``torch.tensor_split``."""
    return [width // parts + (i < width % parts) for i in range(parts)]


def _chosen(layout: FieldLayout, names: Sequence[str], option: str) -> list[Field]:
    """The fields that names and source groups stand for, in the layout's order.

    Raises:
        ValueError: one stands for nothing.
    """
    known = {field.name for field in layout}
    wanted: set[str] = set()
    for name in names:
        group = name.removeprefix(_GROUP)
        if name in known:
            wanted.add(name)
        elif name.startswith(_GROUP) and group in get_args(Source):
            found = {field.name for field in layout if field.source == group}
            if not found:
                raise ValueError(f"{option}: no field is of the source {group!r}")
            wanted |= found
        else:
            groups = [f"{_GROUP}{each}" for each in get_args(Source)]
            raise ValueError(f"{option}: there is no field {name!r}{suggest(name, [*known, *groups])}")
    return [field for field in layout if field.name in wanted]
