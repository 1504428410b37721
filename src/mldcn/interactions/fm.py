"""Linear and factorisation models without a deep part: LR, FM, FwFM."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, register
from mldcn.interactions.pairs import InnerProducts
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, FirstOrder, Side, as_layout

FirstOrderKind = Literal["ids", "embedding", "none"]


class LinearTerm(nn.Module):
    """The first-order term ``(B, 1)`` of FM-like models, without a bias (the heads have one).

    ``ids``: ``sum(w_i x_i)`` with a learned weight an id or a number, the side input ``FirstOrder``.
    ``embedding``: ``sum(<v_f, w_f>) = <x0, w>`` with a learned vector a field; d parameters, 2d FLOPs.
    ``none``: 0.

    Args:
        in_features: width d of ``x0``.
        kind: one of the three.
    """

    def __init__(self, in_features: int, kind: FirstOrderKind) -> None:
        super().__init__()
        self.sides: tuple[Side, ...] = (FirstOrder(),) if kind == "ids" else ()
        self.linear: nn.Linear | None = None
        if kind == "embedding":
            self.linear = nn.Linear(in_features, 1, bias=False)
            nn.init.xavier_normal_(self.linear.weight)

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the terms ``(B, F)``, to ``(B, 1)``."""
        if len(first) != len(self.sides):
            raise ValueError(
                f"expected {len(self.sides)} side inputs beside x0, found {len(first)}: first-order terms "
                "(B, F) with first_order ids, else none"
            )
        if first:
            return first[0].sum(dim=1, keepdim=True)
        if self.linear is not None:
            term: Tensor = self.linear(x0)
            return term
        return x0.new_zeros((x0.shape[0], 1))

    def flops(self) -> int:
        """2d with ``embedding``, else 0."""
        return 2 * self.linear.in_features if self.linear is not None else 0


def bi_interaction(tokens: Tensor) -> Tensor:
    """``sum_{i<j} v_i * v_j = ((sum v)^2 - sum v^2) / 2``: ``(B, F, e) -> (B, e)``, in O(F e).

    The difference of two large numbers is taken in float32 at least.
    """
    if tokens.dtype in (torch.float16, torch.bfloat16):
        tokens = tokens.float()
    return 0.5 * (tokens.sum(dim=1).square() - tokens.square().sum(dim=1))


@register(
    "lr",
    title="Logistic regression",
    paper="Richardson et al., Predicting Clicks: Estimating the Click-Through Rate for New Ads",
    year=2007,
    order="1",
    cost="0",
    knob=None,
)
class LR(Interaction):
    """``sum(w_i x_i)`` over ids and numbers: logistic regression, with the bias of the head behind it.

    The paper's linear model with ``deep.hidden`` empty. No parameters and no FLOPs of its own; with
    ``embedding`` d and 2d.

    Args:
        features: width d of ``x0``, or its layout.
        first_order: ``ids`` reads a learned weight an id or a number, and not ``x0``; ``embedding`` is a linear
            map of ``x0``, of the same class of functions (an id's weight is its vector's product with its
            field's), without tables of its own.

    Example:
        >>> import torch
        >>> from mldcn.interactions import LR
        >>> LR(8)(torch.randn(3, 8), torch.ones(3, 4)).tolist()
        [[4.0], [4.0], [4.0]]
    """

    def __init__(
        self, features: int | FieldLayout, *, first_order: Literal["ids", "embedding"] = "ids"
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, 1)
        self.linear = LinearTerm(layout.width, first_order)
        self.sides = self.linear.sides

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)`` and the first-order terms ``(B, F)`` to ``(B, 1)``."""
        out: Tensor = self.linear(x0, *first)
        return out

    def flops(self) -> int:
        """0, or 2d."""
        return self.linear.flops()


@register(
    "fm",
    title="FM",
    paper="Rendle, Factorization Machines",
    year=2010,
    order="2",
    cost="Σ 2wk (projected fields; the pairs are element-wise)",
    knob="token_width",
)
class FM(Interaction):
    """``sum(w_i x_i) + sum_{i<j} <v_i, v_j>``, a factorisation machine over the fields of ``x0``.

    The pairs' sum is that of :func:`bi_interaction`. The bias w_0 is the head's. No parameters and no GEMM
    FLOPs where all fields are equally wide and the first-order weights are the ids'; ``embedding`` adds d and
    2d, projections ``sum(w k)`` and ``sum(2 w k)`` over the projected fields of width w.

    Args:
        features: width d of ``x0``, or its layout.
        first_order: ``ids``, as in the paper: a learned weight an id or a number (a side input).
            ``embedding``: ``<x0, w>``, a learned vector a field, as in FwFM. ``none``.
        token_width: k, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.

    Example:
        >>> import torch
        >>> from mldcn.interactions import FM
        >>> from mldcn.layout import FieldLayout
        >>> fm = FM(FieldLayout.uniform(3, 2), first_order="none")
        >>> fm(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])).item()  # 11 + 17 + 39
        67.0
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        first_order: FirstOrderKind = "ids",
        token_width: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, 1)
        self.linear = LinearTerm(layout.width, first_order)
        self.sides = self.linear.sides
        self.tokens = FieldTokens(layout, token_width)

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the first-order terms ``(B, F)``, to ``(B, 1)``."""
        pairs = bi_interaction(self.tokens(x0)).sum(dim=1, keepdim=True)
        out: Tensor = self.linear(x0, *first) + pairs
        return out

    def flops(self) -> int:
        """``sum(2 w k)`` over the projected fields, and 2d with ``embedding``."""
        return self.linear.flops() + self.tokens.flops()


@register(
    "fwfm",
    title="FwFM",
    paper=(
        "Pan et al., Field-weighted Factorization Machines for Click-Through Rate Prediction in Display "
        "Advertising"
    ),
    year=2018,
    order="2",
    cost="2F²e + 2d",
    knob="token_width",
)
class FwFM(Interaction):
    """``sum(<v_f, w_f>) + sum_{i<j} r_ij <v_i, v_j>``: a factorisation machine with a weight a pair of fields.

    As in DeepLight, the linear term has a vector a field by default. It equals one full-rank cross layer
    without its residual, under a head of ones, whose matrix has blocks ``r_ij I`` above the diagonal and whose
    bias is w (DCN V2, Section 4.2). r is Xavier-normal by the fans of the symmetric matrix, F and F.
    With P = F (F - 1) / 2: P + d parameters, ``2 F^2 e + 2d`` FLOPs (d and 2d with ``embedding`` only), and
    those of :class:`~mldcn.interactions.tokens.FieldTokens` where fields are projected.

    Args:
        features: width d of ``x0``, or its layout.
        first_order: ``embedding``: ``<x0, w>``, a learned vector a field. ``ids``: a learned weight an id or a
            number, as in FM (a side input). ``none``.
        token_width: e, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.

    Example:
        >>> import torch
        >>> from mldcn.interactions import FwFM
        >>> from mldcn.layout import FieldLayout
        >>> fwfm = FwFM(FieldLayout.uniform(8, 16))
        >>> fwfm(torch.randn(4, 128)).shape, fwfm.flops()
        (torch.Size([4, 1]), 2304)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        first_order: FirstOrderKind = "embedding",
        token_width: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, 1)
        self.linear = LinearTerm(layout.width, first_order)
        self.sides = self.linear.sides
        self.tokens = FieldTokens(layout, token_width)
        count = self.tokens.num_tokens
        self.products = InnerProducts(count, self.tokens.width)
        # r_ij for i < j, in the order of the products.
        self.weight = nn.Parameter(torch.empty(self.products.num_pairs).normal_(std=count**-0.5))

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the first-order terms ``(B, F)``, to ``(B, 1)``."""
        pairs = (self.products(self.tokens(x0)) * self.weight).sum(dim=1, keepdim=True)
        out: Tensor = self.linear(x0, *first) + pairs
        return out

    def flops(self) -> int:
        """``2 F^2 e``, 2d with ``embedding``, and the projections'."""
        return self.linear.flops() + self.tokens.flops() + self.products.flops()
