"""AutoInt: multi-head self-attention between fields; AutoInt+ with a DNN beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, as_layout

PAPER = "Song et al., AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks"


class InteractingLayer(nn.Module):
    """``ReLU([head_1; ..; head_h] + W_res v_i)``, ``head = sum_j softmax_j(<W_q v_i, W_k v_j>) W_v v_j``.

    The scores are not divided by the root of the width, and there are no biases. Xavier-normal weights, the
    heads of a projection being one matrix. With i the tokens' width and h heads of width a: ``4 i h a``
    parameters and ``8 F i h a + 4 F^2 h a`` FLOPs; without the residual ``3 i h a`` and
    ``6 F i h a + 4 F^2 h a``.

    Args:
        num_tokens: F.
        in_width: i.
        num_heads: h.
        attention_width: a, of each head.
        residual: whether ``W_res v_i`` is added.
    """

    def __init__(
        self, num_tokens: int, in_width: int, num_heads: int, attention_width: int, residual: bool
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.num_heads = num_heads
        self.attention_width = attention_width
        self.out_width = num_heads * attention_width
        self.query = nn.Linear(in_width, self.out_width, bias=False)
        self.key = nn.Linear(in_width, self.out_width, bias=False)
        self.value = nn.Linear(in_width, self.out_width, bias=False)
        self.residual = nn.Linear(in_width, self.out_width, bias=False) if residual else None
        for linear in self.children():
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_normal_(linear.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, F, i) -> (B, F, h a)``."""
        query, key, value = (self._heads(linear(tokens)) for linear in (self.query, self.key, self.value))
        weights = torch.matmul(query, key.mT).softmax(dim=-1)  # (B, h, F, F)
        out = torch.matmul(weights, value).transpose(1, 2).flatten(2)
        if self.residual is not None:
            out = out + self.residual(tokens)
        return out.relu()

    def _heads(self, tokens: Tensor) -> Tensor:
        """``(B, F, h a) -> (B, h, F, a)``."""
        shape = (-1, self.num_tokens, self.num_heads, self.attention_width)
        return tokens.reshape(shape).transpose(1, 2)

    def flops(self) -> int:
        """``8 F i h a + 4 F^2 h a``, or ``6 F i h a + 4 F^2 h a``."""
        projections = 3 if self.residual is None else 4
        return (
            self.num_tokens
            * self.out_width
            * (2 * projections * self.query.in_features + 4 * self.num_tokens)
        )


@register(
    "autoint",
    title="AutoInt",
    paper=PAPER,
    year=2019,
    order="none (softmax)",
    cost="L (8Feha + 4F²ha)",
    knob="attention_width",
    secondary="token_width",
)
@register(
    "autoint_plus",
    title="AutoInt+",
    paper=PAPER,
    year=2019,
    order="none (softmax)",
    cost="L (8Feha + 4F²ha) + Σ 2ab",
    knob="attention_width",
    secondary="hidden",
    hidden=(400, 400),
)
class AutoInt(Interaction):
    """Layers of self-attention between the fields' embeddings, flattened: ``(B, F h a)``.

    AutoInt+ is ``[AutoInt; DNN(x0)]``, whose logits a linear head adds. Of L layers (:class:`InteractingLayer`)
    the first reads tokens of the embeddings' width e, the others of width ``h a``. Each has ``4 i h a``
    parameters and ``8 F i h a + 4 F^2 h a`` FLOPs for its i; the DNN ``sum(a b + b)`` and ``sum(2 a b)`` over
    neighbouring widths of ``(d, *hidden)``; and there are those of
    :class:`~mldcn.interactions.tokens.FieldTokens`.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        num_heads: h.
        attention_width: a, the width of each head. (Some libraries' option is the width of all heads.)
        residual: whether every layer adds a projection of its input.
        hidden: width of each layer of the DNN (AutoInt+); none leaves the DNN out.
        dropout: after every layer of the DNN.
        batch_norm: in every layer of the DNN.
        token_width: e, to which each field is projected linearly; by default the commonest width, and only
            fields of other widths are projected.

    Example:
        >>> import torch
        >>> from mldcn.interactions import AutoInt
        >>> from mldcn.layout import FieldLayout
        >>> net = AutoInt(FieldLayout.uniform(6, 8), num_layers=1, num_heads=2, attention_width=5)
        >>> net(torch.randn(4, 48)).shape, net.flops() == 8 * 6 * 8 * 10 + 4 * 36 * 10
        (torch.Size([4, 60]), True)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 3,
        num_heads: Count = 2,
        attention_width: Count = 32,
        residual: bool = True,
        hidden: tuple[Count, ...] = (),
        dropout: DropRate = 0.0,
        batch_norm: bool = False,
        token_width: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        tokens = FieldTokens(layout, token_width)
        attended = num_heads * attention_width
        super().__init__(layout.width, len(layout) * attended + (hidden[-1] if hidden else 0))
        self.tokens = tokens
        self.layers = nn.ModuleList(
            InteractingLayer(len(layout), width, num_heads, attention_width, residual)
            for width in [tokens.width] + [attended] * (num_layers - 1)
        )
        self.mlp = MLP(layout.width, hidden, dropout=dropout, batch_norm=batch_norm) if hidden else None

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, F h a + hidden[-1])``."""
        tokens = self.tokens(x0)
        for layer in self.layers:
            tokens = layer(tokens)
        out: Tensor = tokens.flatten(1)
        return out if self.mlp is None else torch.cat([out, self.mlp(x0)], dim=1)

    def flops(self) -> int:
        """The sum over the layers of ``8 F i h a + 4 F^2 h a``, the DNN's and the projections'."""
        attention = sum(layer.flops() for layer in self.layers if isinstance(layer, InteractingLayer))
        deep = self.mlp.flops() if self.mlp is not None else 0
        return self.tokens.flops() + attention + deep
