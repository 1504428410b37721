"""Adaptive Factorization Network: products of learned powers of the fields, by way of logarithms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, Ratio, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, SecondEmbedding, as_layout

PAPER = "Cheng et al., Adaptive Factorization Network: Learning Adaptive-Order Feature Interactions"


class LogarithmicLayer(nn.Module):
    """``y_j = exp(sum_f w_jf ln|v_f|) = prod_f |v_f|^w_jf``, coordinate by coordinate, for N neurons j.

    ``|v|`` is at least ``min_value``, and below it has no gradient. BatchNorm of the logarithms (a field a
    channel) and of the products (a neuron a channel), as in the authors' code. The signs of the embeddings
    are lost. In float32 even under autocast: a power is an exponential of a sum, whose rounding error it
    multiplies. ``w ~ N(0, 0.01)`` as in the authors' code. ``N F + 2 F + 2 N`` parameters, ``2 e F N`` FLOPs.

    Args:
        num_fields: F.
        width: e.
        num_neurons: N.
        min_value: least absolute value of an embedding's coordinate.
    """

    def __init__(self, num_fields: int, width: int, num_neurons: int, min_value: float) -> None:
        super().__init__()
        self.log_norm = nn.BatchNorm1d(num_fields)
        self.weight = nn.Parameter(torch.empty(num_neurons, num_fields).normal_(std=0.1))
        self.exp_norm = nn.BatchNorm1d(num_neurons)
        self.width = width
        self.min_value = min_value

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, F, e) -> (B, N e)``."""
        # On meta there is no autocast, nor anything to round.
        device = "cpu" if tokens.is_meta else tokens.device.type
        if not torch.is_autocast_enabled(device):
            return self._powers(tokens)  # an exported program would keep the empty region
        with torch.autocast(device, enabled=False):
            return self._powers(tokens)

    def _powers(self, tokens: Tensor) -> Tensor:
        if tokens.dtype in (torch.float16, torch.bfloat16):
            tokens = tokens.float()
        logs = self.log_norm(tokens.abs().clamp(min=self.min_value).log())
        powers = torch.matmul(logs.transpose(1, 2), self.weight.T).transpose(1, 2).exp()  # (B, N, e)
        out: Tensor = self.exp_norm(powers)
        return out.flatten(1)

    def flops(self) -> int:
        """``2 e F N``."""
        return 2 * self.width * self.weight.numel()


@register(
    "afn",
    title="AFN",
    paper=PAPER,
    year=2020,
    order="none (learned exponents)",
    cost="2eFN + Σ 2ab",
    knob="num_neurons",
    secondary="hidden",
)
@register(
    "afn_plus",
    title="AFN+",
    paper=PAPER,
    year=2020,
    order="none (learned exponents)",
    cost="2eFN + Σ 2ab",
    knob="num_neurons",
    secondary="hidden",
    deep_hidden=(400, 400, 400),
)
class AFN(Interaction):
    """``DNN([y_1; ..; y_N])``, ``y_j = exp(sum_f w_jf ln|v_f|)``: crosses of any, also fractional, order.

    AFN+ is ``[AFN; DNN(x0')]`` with a DNN of its own on ``x0'``, a second embedding of the same fields (a side
    input); a linear head makes both into one logit. They are trained by one loss; the authors' code trains
    each by its own and only their weights by that of the sum.

    Embeddings should not start small: those near ``min_value`` have no gradient. BatchNorm in training makes
    rows see each other.

    With e the width of the embeddings, N neurons and a, b neighbouring widths of ``(N e, *hidden)``, and for
    AFN+ of ``(d, *deep_hidden)`` as well: ``N F + 2 F + 2 N + sum(a b + b)`` parameters, and 2b a layer for its
    BatchNorm; ``2 e F N + sum(2 a b)`` FLOPs; and those of :class:`~mldcn.interactions.tokens.FieldTokens`.

    Args:
        features: width d of ``x0``, or its layout.
        num_neurons: N.
        min_value: least absolute value of an embedding's coordinate, before the logarithm.
        hidden: width of each layer of the DNN on the neurons; none gives the neurons themselves.
        deep_hidden: width of each layer of the DNN on the second embedding (AFN+); none leaves it out.
        dropout: after every layer of the DNNs.
        batch_norm: in every layer of the DNNs, as in the authors' code.
        token_width: e, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.

    Example:
        >>> import torch
        >>> from mldcn.interactions import AFN
        >>> from mldcn.layout import FieldLayout
        >>> net = AFN(FieldLayout.uniform(6, 8), num_neurons=20, hidden=(32,), deep_hidden=(16,))
        >>> net(torch.randn(4, 48), torch.randn(4, 48)).shape
        torch.Size([4, 48])
        >>> net.flops() == 2 * 8 * 6 * 20 + 2 * 160 * 32 + 2 * 48 * 16
        True
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_neurons: Count = 600,
        min_value: Ratio = 1e-5,
        hidden: tuple[Count, ...] = (400, 400, 400),
        deep_hidden: tuple[Count, ...] = (),
        dropout: DropRate = 0.0,
        batch_norm: bool = True,
        token_width: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        tokens = FieldTokens(layout, token_width)
        mlp = MLP(num_neurons * tokens.width, hidden, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, mlp.out_features + (deep_hidden[-1] if deep_hidden else 0))
        self.tokens = tokens
        self.logarithmic = LogarithmicLayer(tokens.num_tokens, tokens.width, num_neurons, min_value)
        self.mlp = mlp
        self.deep: MLP | None = None
        if deep_hidden:
            self.sides = (SecondEmbedding(),)
            self.deep = MLP(layout.width, deep_hidden, dropout=dropout, batch_norm=batch_norm)

    def forward(self, x0: Tensor, *second: Tensor) -> Tensor:
        """``x0 (B, d)``, and for AFN+ the second embedding ``(B, d)``, to ``(B, out_features)``."""
        if len(second) != len(self.sides):
            raise ValueError(
                f"expected {len(self.sides)} side inputs beside x0, found {len(second)}: a second embedding "
                "(B, d) with deep_hidden (AFN+), else none"
            )
        out: Tensor = self.mlp(self.logarithmic(self.tokens(x0)))
        return out if self.deep is None else torch.cat([out, self.deep(second[0])], dim=1)

    def flops(self) -> int:
        """``2 e F N + sum(2 a b)``, and the projections'."""
        deep = self.deep.flops() if self.deep is not None else 0
        return self.tokens.flops() + self.logarithmic.flops() + self.mlp.flops() + deep
