"""FiBiNET: field importance by squeeze and excitation, pairs of fields by bilinear products, a DNN on both."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.fm import FirstOrderKind, LinearTerm
from mldcn.interactions.pairs import pair_indices
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, as_layout

Bilinear = Literal["all", "each", "interaction"]


class SqueezeExcitation(nn.Module):
    """``v'_f = a_f v_f`` with ``a = s(W2 ReLU(W1 z))`` and ``z_f = mean(v_f)`` (SENet over fields).

    No biases; Xavier-normal weights. With ``m = max(1, floor(F / reduction_ratio))``: ``2 F m`` parameters,
    ``4 F m`` FLOPs.

    Args:
        num_fields: F.
        reduction_ratio: F / m.
        activation: s. Under ``relu``, a field whose weight goes negative for all rows is lost for good;
            ``sigmoid`` keeps all.
    """

    def __init__(self, num_fields: int, reduction_ratio: int, activation: Literal["relu", "sigmoid"]) -> None:
        super().__init__()
        reduced = max(1, num_fields // reduction_ratio)
        self.squeeze = nn.Linear(num_fields, reduced, bias=False)
        self.excite = nn.Linear(reduced, num_fields, bias=False)
        for linear in (self.squeeze, self.excite):
            nn.init.xavier_normal_(linear.weight)
        self.activation = nn.ReLU() if activation == "relu" else nn.Sigmoid()

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, F, e) -> (B, F, e)``."""
        weights: Tensor = self.activation(self.excite(self.squeeze(tokens.mean(dim=2)).relu()))
        return tokens * weights.unsqueeze(2)

    def flops(self) -> int:
        """``4 F m``."""
        return 4 * self.squeeze.in_features * self.squeeze.out_features


class BilinearInteraction(nn.Module):
    """``p_ij = (v_i W) * v_j`` for all pairs i < j of fields, side by side.

    W is one matrix (``all``), one a left field (``each``) or one a pair (``interaction``). The last field is
    never on the left and has no matrix, so that ``each`` has F - 1. A lone field is paired with itself.
    Xavier-normal by the fans of one matrix. ``e^2`` parameters (``all``), ``(F - 1) e^2`` (``each``) or
    ``P e^2``, with ``P = F (F - 1) / 2``; ``2 (F - 1) e^2`` FLOPs (``all`` and ``each``) or ``2 P e^2``.

    Args:
        num_fields: F.
        width: e.
        kind: what has a matrix of its own.
    """

    left: Tensor
    right: Tensor

    def __init__(self, num_fields: int, width: int, kind: Bilinear) -> None:
        super().__init__()
        left, right = pair_indices(num_fields, with_self=num_fields == 1)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.num_pairs = len(left)
        self.num_left = max(1, num_fields - 1)
        self.kind = kind
        count = {"all": 1, "each": self.num_left, "interaction": self.num_pairs}[kind]
        self.weight = nn.Parameter(torch.empty(count, width, width).normal_(std=math.sqrt(1 / width)))

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, F, e) -> (B, P e)``."""
        by_field = tokens.transpose(0, 1)  # (F, B, e)
        if self.kind == "interaction":
            left = torch.bmm(by_field.index_select(0, self.left), self.weight)
        else:
            each = torch.matmul(by_field[: self.num_left], self.weight)
            left = each.index_select(0, self.left)
        products = left * by_field.index_select(0, self.right)  # (P, B, e)
        return products.transpose(0, 1).flatten(1)

    def flops(self) -> int:
        """``2 (F - 1) e^2``, or ``2 P e^2`` with ``interaction``."""
        products = self.num_pairs if self.kind == "interaction" else self.num_left
        return 2 * products * self.weight[0].numel()


@register(
    "fibinet",
    title="FiBiNET",
    paper=(
        "Huang et al., FiBiNET: Combining Feature Importance and Bilinear feature Interaction for "
        "Click-Through Rate Prediction"
    ),
    year=2019,
    order="2",
    cost="4Fm + 4Pe² + Σ 2ab",
    knob="hidden",
    secondary="token_width",
)
class FiBiNET(Interaction):
    """``[sum(w_i x_i); DNN([p; q])]``: p are bilinear products of the fields, q of the fields weighed by SENet.

    Under a linear head whose weight on the first number is 1 this is the paper's logit. p and q have bilinear
    matrices of their own (:class:`BilinearInteraction`); the DNN reads ``2 P e = F (F - 1) e`` numbers.

    With e the width of the embeddings, P pairs, a, b neighbouring widths of ``(2 P e, *hidden)`` and
    ``m = max(1, floor(F / reduction_ratio))``: ``2 F m + 2 n e^2 + sum(a b + b)`` parameters, n being 1, F - 1
    or P, and ``4 F m + 4 k e^2 + sum(2 a b)`` FLOPs, k being F - 1, F - 1 or P; and those of
    :class:`~mldcn.interactions.fm.LinearTerm` and :class:`~mldcn.interactions.tokens.FieldTokens`.

    Args:
        features: width d of ``x0``, or its layout.
        bilinear: what has a matrix of its own: nothing (``all``), each field on the left (``each``) or each
            pair (``interaction``).
        reduction_ratio: F / m, fields over the width of SENet's inner layer.
        excitation: activation of the fields' weights. The paper's is ``relu``, under which fields can be lost
            for good; ``sigmoid`` keeps all.
        hidden: width of each layer of the DNN; none gives the products themselves.
        dropout: after every layer of the DNN.
        batch_norm: in every layer of the DNN.
        token_width: e, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.
        first_order: ``ids``, as in the paper: a learned weight an id or a number (a side input).
            ``embedding``: ``<x0, w>``, a learned vector a field. ``none``.

    Example:
        >>> import torch
        >>> from mldcn.interactions import FiBiNET
        >>> from mldcn.layout import FieldLayout
        >>> net = FiBiNET(FieldLayout.uniform(6, 8), hidden=(32, 16))
        >>> net(torch.randn(4, 48), torch.randn(4, 6)).shape, net.bilinear.weight.shape
        (torch.Size([4, 17]), torch.Size([15, 8, 8]))
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        bilinear: Bilinear = "interaction",
        reduction_ratio: Count = 3,
        excitation: Literal["relu", "sigmoid"] = "relu",
        hidden: tuple[Count, ...] = (400, 400, 400),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
        token_width: Count | None = None,
        first_order: FirstOrderKind = "ids",
    ) -> None:
        layout = as_layout(features)
        tokens = FieldTokens(layout, token_width)
        count, width = tokens.num_tokens, tokens.width
        products = BilinearInteraction(count, width, bilinear)
        mlp = MLP(2 * products.num_pairs * width, hidden, dropout=dropout, batch_norm=batch_norm)
        super().__init__(layout.width, 1 + mlp.out_features)
        self.linear = LinearTerm(layout.width, first_order)
        self.sides = self.linear.sides
        self.tokens = tokens
        self.senet = SqueezeExcitation(count, reduction_ratio, excitation)
        self.bilinear = products
        self.bilinear_senet = BilinearInteraction(count, width, bilinear)
        self.mlp = mlp

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the first-order terms ``(B, F)``, to ``(B, 1 + hidden[-1])``."""
        tokens = self.tokens(x0)
        products = torch.cat([self.bilinear(tokens), self.bilinear_senet(self.senet(tokens))], dim=1)
        return torch.cat([self.linear(x0, *first), self.mlp(products)], dim=1)

    def flops(self) -> int:
        """``4 F m + 4 k e^2 + sum(2 a b)``, 2d with ``embedding``, and the projections'."""
        products = self.senet.flops() + self.bilinear.flops() + self.bilinear_senet.flops()
        return self.linear.flops() + self.tokens.flops() + products + self.mlp.flops()
