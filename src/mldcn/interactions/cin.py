"""xDeepFM: the compressed interaction network (CIN) beside a DNN and first-order terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.fm import FirstOrderKind, LinearTerm
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, as_layout

# A CIN treats the coordinates of an embedding alike and apart, so that its products, (B, e, H F) numbers,
# need not exist at once: this many parts of the coordinates are computed one after another.
PARTS = 8


class CIN(nn.Module):
    """Compressed interaction network: ``X^k_h = sum_ij W^{k,h}_ij (X^{k-1}_i * X^0_j)``, k = 1 .. L.

    ``X^k`` are ``H_k`` feature maps of width e, products are taken coordinate by coordinate, and the output
    holds each map's sum over its coordinates. Layer k reaches order k + 1. There is no bias.
    Xavier-normal W by the fans of the whole layer (``H_{k-1} F`` to ``H_k``).
    With ``H_0 = F``: ``sum(F H_{k-1} H_k)`` parameters, ``sum(2 e F H_{k-1} H_k)`` FLOPs; split in halves,
    ``H_{k-1}`` counts only the maps that go on.

    In training the products are computed again for the backward pass instead of being kept: they are F times
    as large as the maps.

    Args:
        num_fields: F.
        width: e.
        layers: ``H_k``, the feature maps of each layer.
        split_half: of all layers but the last, the first half of the maps (the larger, of an odd number)
            only goes on to the next layer, and the second only to the output.
        activation: of the maps; the paper's is ``identity``.
    """

    def __init__(
        self,
        num_fields: int,
        width: int,
        layers: Sequence[int],
        split_half: bool = False,
        activation: Literal["identity", "relu"] = "identity",
    ) -> None:
        super().__init__()
        self.onward = [(maps + 1) // 2 if split_half else maps for maps in layers]
        self.split_half = split_half
        self.activation = activation
        self.out_features = sum(layers) - (sum(self.onward[:-1]) if split_half else 0)
        shapes = zip(layers, [num_fields, *self.onward], strict=False)
        self.weights = nn.ParameterList(torch.empty(maps, before * num_fields) for maps, before in shapes)
        for weight in self.weights:
            nn.init.xavier_normal_(weight)
        self.width = width

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, F, e) -> (B, out_features)``."""
        parts = torch.chunk(tokens.transpose(1, 2), PARTS, dim=1)  # (B, some of e, F)
        return torch.stack([self._pooled(part) for part in parts]).sum(dim=0)

    def _pooled(self, x0: Tensor) -> Tensor:
        """The maps' sums over some coordinates: ``(B, n, F) -> (B, out_features)``."""
        x, pooled = x0, []
        for i, (weight, onward) in enumerate(zip(self.weights, self.onward, strict=True)):
            if self.training and torch.is_grad_enabled():
                x = checkpoint(_maps, x, x0, weight, use_reentrant=False, preserve_rng_state=False)
            else:
                x = _maps(x, x0, weight)
            if self.activation == "relu":
                x = x.relu()
            split = self.split_half and i + 1 < len(self.weights)
            pooled.append((x[..., onward:] if split else x).sum(dim=1))
            x = x[..., :onward]
        return torch.cat(pooled, dim=1)

    def flops(self) -> int:
        """``sum(2 e F H_{k-1} H_k)``."""
        weights: int = sum(weight.numel() for weight in self.weights)
        return 2 * self.width * weights


def _maps(x: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """One layer's maps: ``x (B, n, H')``, ``x0 (B, n, F)`` and ``weight (H, H' F)`` to ``(B, n, H)``."""
    products = (x.unsqueeze(3) * x0.unsqueeze(2)).flatten(2)
    return F.linear(products, weight)


@register(
    "xdeepfm",
    title="xDeepFM",
    paper="Lian et al., xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender Systems",
    year=2018,
    order="L + 1",
    cost="Σ 2eF H' H + Σ 2ab",
    knob="cin_layers",
    secondary="hidden",
)
class XDeepFM(Interaction):
    """``[sum(w_i x_i); CIN; DNN(x0)]``: first-order terms, a :class:`CIN` on the fields and a DNN.

    Under a linear head whose weight on the first number is 1 this is the paper's logit,
    ``sum(w_i x_i) + w_cin^T p + w_dnn^T h``. DCN V2 (Table 6) tunes it to two layers of 100 maps, with the
    identity as activation.

    With e the width of the embeddings, ``H_0 = F`` and a, b neighbouring widths of ``(d, *hidden)``:
    ``sum(F H_{k-1} H_k) + sum(a b + b)`` parameters and ``sum(2 e F H_{k-1} H_k) + sum(2 a b)`` FLOPs, and
    those of :class:`~mldcn.interactions.fm.LinearTerm` and :class:`~mldcn.interactions.tokens.FieldTokens`.

    Args:
        features: width d of ``x0``, or its layout.
        cin_layers: ``H_k``, the feature maps of each layer of the CIN.
        split_half: half of each layer's maps goes on, the other half to the output ("indirect"); otherwise
            all go both ways ("direct").
        activation: of the maps; ``identity`` keeps the CIN a polynomial.
        hidden: width of each layer of the DNN; none leaves the DNN out.
        dropout: after every layer of the DNN.
        batch_norm: in every layer of the DNN.
        token_width: e, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.
        first_order: ``ids``, as in the paper: a learned weight an id or a number (a side input).
            ``embedding``: ``<x0, w>``, a learned vector a field. ``none``.

    Example:
        >>> import torch
        >>> from mldcn.interactions import XDeepFM
        >>> from mldcn.layout import FieldLayout
        >>> net = XDeepFM(FieldLayout.uniform(8, 16), cin_layers=(20, 10), hidden=(32,))
        >>> net(torch.randn(4, 128), torch.randn(4, 8)).shape
        torch.Size([4, 63])
        >>> net.flops() == 2 * 16 * 8 * (8 * 20 + 20 * 10) + 2 * 128 * 32
        True
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        cin_layers: Annotated[tuple[Count, ...], pydantic.Field(min_length=1)] = (100, 100),
        split_half: bool = False,
        activation: Literal["identity", "relu"] = "identity",
        hidden: tuple[Count, ...] = (400, 400),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
        token_width: Count | None = None,
        first_order: FirstOrderKind = "ids",
    ) -> None:
        layout = as_layout(features)
        tokens = FieldTokens(layout, token_width)
        cin = CIN(len(layout), tokens.width, cin_layers, split_half, activation)
        super().__init__(layout.width, 1 + cin.out_features + (hidden[-1] if hidden else 0))
        self.linear = LinearTerm(layout.width, first_order)
        self.sides = self.linear.sides
        self.tokens = tokens
        self.cin = cin
        self.mlp = MLP(layout.width, hidden, dropout=dropout, batch_norm=batch_norm) if hidden else None

    def forward(self, x0: Tensor, *first: Tensor) -> Tensor:
        """``x0 (B, d)``, and with ``ids`` the first-order terms ``(B, F)``, to ``(B, 1 + sum H + hidden[-1])``."""
        out = [self.linear(x0, *first), self.cin(self.tokens(x0))]
        if self.mlp is not None:
            out.append(self.mlp(x0))
        return torch.cat(out, dim=1)

    def flops(self) -> int:
        """``sum(2 e F H_{k-1} H_k) + sum(2 a b)``, 2d with ``embedding``, and the projections'."""
        deep = self.mlp.flops() if self.mlp is not None else 0
        return self.linear.flops() + self.tokens.flops() + self.cin.flops() + deep
