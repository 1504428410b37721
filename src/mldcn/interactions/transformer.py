"""The Transformer over field tokens, with the tokenisation of the Homefeed paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, as_layout


def attend(query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
    """``softmax(Q K^T / sqrt(a)) V`` of each head.

    Args:
        query: ``(B, h, T', a)``.
        key: ``(B, h, T, a)``.
        value: ``(B, h, T, c)``.
        width: a. (Read from a tensor's shape it would not be a plain number while tracing.)

    Returns:
        ``(B, T', h c)``, the heads side by side. ``2 h T' T (a + c)`` FLOPs.
    """
    scores = torch.matmul(query, key.mT) / math.sqrt(width)
    out: Tensor = torch.matmul(scores.softmax(dim=-1), value)
    return out.transpose(1, 2).flatten(2)


class HomefeedTokens(nn.Module):
    """Fields as tokens of width D (Homefeed, Section 5.3.1).

    Every sparse and every embedding field is projected to one token, all numeric fields together to C tokens,
    and every sequence field to U tokens. The tokens stand in this order. Projections are linear, Xavier-normal
    and without bias; each token has its own. With w the width of a sparse or embedding field, n all numeric
    columns and s the width of a sequence field: ``D (sum(w) + C n + U sum(s))`` parameters, twice as many
    FLOPs.

    Args:
        layout: the fields of ``x0``.
        width: D.
        dense_tokens: C.
        sequence_tokens: U.
    """

    def __init__(self, layout: FieldLayout, width: int, dense_tokens: int, sequence_tokens: int) -> None:
        super().__init__()
        self.width = width
        self.widths = layout.widths
        # Places of the fields in the layout: those with a token each, the numeric ones, the sequences.
        self.single = [i for i, field in enumerate(layout) if field.kind not in ("numeric", "sequence")]
        self.numeric = [i for i, field in enumerate(layout) if field.kind == "numeric"]
        self.sequences = [i for i, field in enumerate(layout) if field.kind == "sequence"]
        self.num_tokens = len(self.single)
        self.fields: FieldTokens | None = None
        if self.single:
            chosen = [layout.fields[i] for i in self.single]
            self.fields = FieldTokens(
                FieldLayout.build([(field.name, field.kind, field.source, field.width) for field in chosen]),
                width,
            )
        groups = [(sum(self.widths[i] for i in self.numeric), dense_tokens)] if self.numeric else []
        groups += [(self.widths[i], sequence_tokens) for i in self.sequences]
        self.groups = nn.ModuleList(nn.Linear(w, count * width, bias=False) for w, count in groups)
        for linear, (columns, count) in zip(self.groups, groups, strict=True):
            # Xavier's fans are those of one token's projection.
            nn.init.normal_(linear.weight, std=math.sqrt(2 / (columns + width)))  # type: ignore[arg-type]
            self.num_tokens += count

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, T, D)``."""
        parts = torch.split(x0, list(self.widths), dim=1)
        tokens = []
        if self.fields is not None:
            tokens.append(self.fields(torch.cat([parts[i] for i in self.single], dim=1)))
        groups = [torch.cat([parts[i] for i in self.numeric], dim=1)] if self.numeric else []
        groups += [parts[i] for i in self.sequences]
        for linear, group in zip(self.groups, groups, strict=True):
            tokens.append(linear(group).unflatten(1, (-1, self.width)))
        return torch.cat(tokens, dim=1)

    def flops(self) -> int:
        """``2 D (sum(w) + C n + U sum(s))``."""
        return 2 * sum(parameter.numel() for parameter in self.parameters())


class EncoderLayer(nn.Module):
    """One encoder layer, norms behind the residuals (Vaswani et al., Attention Is All You Need).

    ``x = LN(x + MultiHead(x))``, then ``LN(x + W2 ReLU(W1 x + b1) + b2)``, over each token's D numbers.
    Xavier-normal weights, zero biases. ``4 (D^2 + D) + 2 D f + f + D + 4D`` parameters,
    ``8 T D^2 + 4 T^2 D + 4 T D f`` FLOPs on T tokens.

    Args:
        width: D.
        num_heads: each of width D / num_heads.
        feedforward: f.
        dropout: on both branches, before they are added.
    """

    def __init__(self, width: int, num_heads: int, feedforward: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, feedforward)
        self.down = nn.Linear(feedforward, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        # Queries, keys and values are three D x D matrices, not one of D x 3D.
        nn.init.normal_(self.qkv.weight, std=math.sqrt(1 / width))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D) -> (B, T, D)``."""
        heads = self.qkv(x).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)  # (B, 3h, T, a)
        query, key, value = heads.chunk(3, dim=1)
        x = self.norms[0](x + self.dropout(self.out(attend(query, key, value, self.head_width))))
        branch = self.down(self.activation(self.up(x)))
        out: Tensor = self.norms[1](x + self.dropout(branch))
        return out

    def flops(self, num_tokens: int) -> int:
        """``8 T D^2 + 4 T^2 D + 4 T D f``."""
        width, inner = self.up.in_features, self.up.out_features
        return num_tokens * (8 * width**2 + 4 * num_tokens * width + 4 * width * inner)


@register(
    "transformer",
    title="Transformer",
    paper="Improving feature interactions at Pinterest under industry constraints (Section 5.3.1)",
    year=2024,
    order="none (softmax)",
    cost="L (8TD² + 4T²D + 4TDf) + 2D (Σw + Cn + UΣs)",
    knob="head_width",
    secondary="feedforward",
)
class Transformer(Interaction):
    """Transformer encoder layers over field tokens; all output tokens side by side (Homefeed, Section 5.3.1).

    Tokens are those of :class:`HomefeedTokens`: with F sparse and embedding fields and G sequence fields there
    are ``T = F + C + U G`` of width D (no C without numeric fields). Without a code for their position: fields
    differ by their projections.

    ``L (4 (D^2 + D) + 2Df + f + 5D)`` parameters and ``L (8TD^2 + 4T^2 D + 4TDf)`` FLOPs, and those of the
    projections: ``D (sum(w) + Cn + U sum(s))`` and twice as many. The MLP behind the T D outputs often costs
    more than the encoder.

    The paper is silent on the place of the norms (here behind the residuals, as in the original Transformer)
    and does not say whether embedding fields share a token: here each has its own.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L; the paper's memory allowed at most 2.
        num_heads: of each layer.
        head_width: D / num_heads.
        feedforward: f, width of the layers' inner part; 4 D by default.
        dense_tokens: C, tokens of all numeric fields together.
        sequence_tokens: U, tokens of every sequence field.
        dropout: on both branches of every layer.

    Example:
        >>> import torch
        >>> from mldcn.interactions import Transformer
        >>> from mldcn.layout import FieldLayout
        >>> net = Transformer(FieldLayout.uniform(8, 16), num_layers=1, num_heads=2, head_width=8)
        >>> net(torch.randn(4, 128)).shape, net.flops()
        (torch.Size([4, 128]), 57344)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 2,
        num_heads: Count = 2,
        head_width: Count = 16,
        feedforward: Count | None = None,
        dense_tokens: Count = 4,
        sequence_tokens: Count = 4,
        dropout: DropRate = 0.0,
    ) -> None:
        layout = as_layout(features)
        width = num_heads * head_width
        tokens = HomefeedTokens(layout, width, dense_tokens, sequence_tokens)
        super().__init__(layout.width, tokens.num_tokens * width)
        self.tokens = tokens
        self.layers = nn.ModuleList(
            EncoderLayer(width, num_heads, feedforward or 4 * width, dropout) for _ in range(num_layers)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, T D)``."""
        x: Tensor = self.tokens(x0)
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1)

    def flops(self) -> int:
        """``L (8TD^2 + 4T^2 D + 4TDf)`` and the projections' ``2D (sum(w) + Cn + U sum(s))``."""
        layers = [layer for layer in self.layers if isinstance(layer, EncoderLayer)]
        return self.tokens.flops() + sum(layer.flops(self.tokens.num_tokens) for layer in layers)
