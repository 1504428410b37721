"""Hiformer: attention over feature tokens whose queries, keys and values differ from feature to feature."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, register
from mldcn.interactions.per_token import PerTokenFFN, PerTokenLinear
from mldcn.interactions.tokens import FieldTokens
from mldcn.interactions.transformer import attend
from mldcn.layout import FieldLayout, as_layout

Projection = Literal["composite", "per_token"]


class FeatureTokens(nn.Module):
    """One token of width D a field, n_D tokens of all numeric columns, and t task tokens, in this order.

    Fields are projected linearly without bias; numeric columns go through an MLP of one hidden layer of width
    D, whose output is cut into n_D tokens; task tokens are parameters, ``N(0, 1 / D)`` at the start. With w
    the width of a field that is not numeric and n all numeric columns:
    ``D sum(w) + (nD + D) + n_D (D^2 + D) + tD`` parameters, ``2D (sum(w) + n + n_D D)`` FLOPs.

    Args:
        layout: the fields of ``x0``.
        width: D.
        dense_tokens: n_D.
        task_tokens: t.
    """

    def __init__(self, layout: FieldLayout, width: int, dense_tokens: int, task_tokens: int) -> None:
        super().__init__()
        self.width = width
        self.widths = layout.widths
        numeric = [field.kind == "numeric" for field in layout]
        self.single = [i for i, dense in enumerate(numeric) if not dense]
        self.numeric = [i for i, dense in enumerate(numeric) if dense]
        self.fields: FieldTokens | None = None
        if self.single:
            chosen = [layout.fields[i] for i in self.single]
            self.fields = FieldTokens(
                FieldLayout.build([(field.name, field.kind, field.source, field.width) for field in chosen]),
                width,
            )
        self.dense: nn.Sequential | None = None
        if self.numeric:
            columns = sum(self.widths[i] for i in self.numeric)
            self.dense = nn.Sequential(
                nn.Linear(columns, width), nn.ReLU(), nn.Linear(width, dense_tokens * width)
            )
            first, last = self.dense[0], self.dense[2]
            nn.init.kaiming_normal_(first.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.normal_(last.weight, std=width**-0.5)  # type: ignore[arg-type]
            nn.init.zeros_(first.bias)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.tasks = nn.Parameter(torch.empty(task_tokens, width).normal_(std=width**-0.5))
        self.num_tokens = len(self.single) + (dense_tokens if self.numeric else 0) + task_tokens

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, T, D)``."""
        parts = torch.split(x0, list(self.widths), dim=1)
        tokens = []
        if self.fields is not None:
            tokens.append(self.fields(torch.cat([parts[i] for i in self.single], dim=1)))
        if self.dense is not None:
            dense = self.dense(torch.cat([parts[i] for i in self.numeric], dim=1))
            tokens.append(dense.unflatten(1, (-1, self.width)))
        tokens.append(self.tasks.expand(x0.shape[0], -1, -1).to(tokens[0].dtype))
        return torch.cat(tokens, dim=1)

    def flops(self) -> int:
        """``2D (sum(w) + n + n_D D)``."""
        fields = self.fields.flops() if self.fields is not None else 0
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return fields + sum(2 * linear.weight.numel() for linear in linears)


class CompositeProjection(nn.Module):
    """``[y_1 .. y_T'] = [x_1 .. x_T] L R^T``: every output token reads every input token, at low rank.

    Xavier-normal factors, no bias: ``r (T D + T' c)`` parameters, twice as many FLOPs.

    Args:
        num_tokens: T.
        width: D.
        out_tokens: T'.
        out_features: c, numbers of an output token.
        rank: r.
    """

    def __init__(self, num_tokens: int, width: int, out_tokens: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.out_tokens = out_tokens
        self.down = nn.Linear(num_tokens * width, rank, bias=False)
        self.up = nn.Linear(rank, out_tokens * out_features, bias=False)
        for linear in (self.down, self.up):
            nn.init.xavier_normal_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D) -> (B, T', c)``."""
        flat: Tensor = self.up(self.down(x.flatten(1)))
        return torch.unflatten(flat, 1, (self.out_tokens, -1))

    def flops(self) -> int:
        """``2 r (T D + T' c)``."""
        return 2 * (self.down.weight.numel() + self.up.weight.numel())


class HiformerLayer(nn.Module):
    """``x = LN(x + Attention(x))``, then ``LN(x + FFN(x))``, for the last T' of T tokens.

    The output projection (h c to D, no bias) and the FFN (:class:`PerTokenFFN`) are each token's own. With
    ``projection`` composite, queries, keys and values are :class:`CompositeProjection` of all tokens:
    ``r_k (2TD + T' h a + T h a) + r_v (TD + T h c) + T' h c D + T' (2Df + f + D) + 4D`` parameters and
    ``2 (r_k (..) + r_v (..) + T' h c D) + 2 T' T h (a + c) + 4 T' D f`` FLOPs. With ``per_token`` each is
    mapped from its own token, which makes the terms of r_k and r_v ``T' D h a + T D h a + T D h c``.

    Args:
        num_tokens: T.
        out_tokens: T'.
        width: D.
        num_heads: h.
        key_width: a, of each head's queries and keys.
        value_width: c, of each head's values.
        key_rank: r_k.
        value_rank: r_v.
        feedforward: f.
        projection: ``composite`` or ``per_token``.
    """

    def __init__(
        self,
        num_tokens: int,
        out_tokens: int,
        width: int,
        num_heads: int,
        key_width: int,
        value_width: int,
        key_rank: int,
        value_rank: int,
        feedforward: int,
        projection: Projection,
    ) -> None:
        super().__init__()
        self.num_tokens, self.out_tokens, self.num_heads = num_tokens, out_tokens, num_heads
        self.key_width, self.value_width = key_width, value_width
        self.projection = projection

        def project(to: int, each: int, rank: int) -> CompositeProjection | PerTokenLinear:
            if projection == "composite":
                return CompositeProjection(num_tokens, width, to, num_heads * each, rank)
            return PerTokenLinear(to, width, num_heads * each, bias=False)

        self.query = project(out_tokens, key_width, key_rank)
        self.key = project(num_tokens, key_width, key_rank)
        self.value = project(num_tokens, value_width, value_rank)
        self.out = PerTokenLinear(out_tokens, num_heads * value_width, width, bias=False)
        self.ffn = PerTokenFFN(out_tokens, width, feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D) -> (B, T', D)``."""
        last = x[:, -self.out_tokens :]
        query = self._heads(self.query(x if self.projection == "composite" else last))
        mixed = attend(query, self._heads(self.key(x)), self._heads(self.value(x)), self.key_width)
        kept = self.norms[0](last + self.out(mixed))
        out: Tensor = self.norms[1](kept + self.ffn(kept))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, T, h a) -> (B, h, T, a)``."""
        return torch.unflatten(x, 2, (self.num_heads, -1)).transpose(1, 2)

    def flops(self) -> int:
        """As in the class's docstring."""
        parts = (self.query, self.key, self.value, self.out, self.ffn)
        attention = 2 * self.out_tokens * self.num_tokens * self.num_heads
        return attention * (self.key_width + self.value_width) + sum(part.flops() for part in parts)


@register(
    "hiformer",
    title="Hiformer",
    paper="Gui et al., Hiformer: Heterogeneous Feature Interactions Learning with Transformers for "
    "Recommender Systems",
    year=2023,
    order="none (softmax)",
    cost="L · 2 (r_k (2TD + 2Tha) + r_v (TD + Thc) + ThcD + T²h (a + c) + 2TDf), less in the last layer",
    knob="token_width",
    secondary="feedforward",
)
class Hiformer(Interaction):
    """Heterogeneous attention over :class:`FeatureTokens`; the result is the task tokens' last state.

    In each layer (:class:`HiformerLayer`) queries, keys and values of all heads are one low-rank map of *all*
    tokens side by side, ``[k_1 .. k_T] = [x_1 .. x_T] L R^T``: composite features attend to composite
    features. With ``projection: per_token`` every token has its own maps instead, ``k_j = x_j K_j`` (the
    paper's heterogeneous attention). The last layer computes queries, and what follows them, of the task
    tokens only: nothing else is read behind it.

    One task token, whose state ``(B, D)`` is the result; in a model of several tasks one a task, and the
    result is ``(B, num_tasks, D)``. Parameters and FLOPs: the sum of :class:`FeatureTokens` and L times
    :class:`HiformerLayer`, with T' = T but in the last layer, where T' is the number of task tokens. As
    published, at D = 128, h = 4, a = 16, c = 64 and f = 4D; of r_k the paper gives two values, 128 and 256,
    r_v is 1024: much for the few fields of a public log, so the defaults here are smaller.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        token_width: D.
        num_heads: h.
        key_width: a, of each head's queries and keys.
        value_width: c, of each head's values.
        key_rank: r_k, of the composite queries' and of the keys' map, shared by the heads.
        value_rank: r_v, of the composite values' map.
        feedforward: f, width of the inner layer of each token's FFN; 4 D by default.
        projection: ``composite`` (Hiformer) or ``per_token`` (heterogeneous attention, without ranks).
        dense_tokens: n_D, tokens of all numeric fields together.
        num_tasks: task tokens; the model's number of tasks.

    Example:
        >>> import torch
        >>> from mldcn.interactions import Hiformer
        >>> from mldcn.layout import FieldLayout
        >>> layout = FieldLayout.uniform(8, 16)
        >>> Hiformer(layout, token_width=32)(torch.randn(4, 128)).shape
        torch.Size([4, 32])
        >>> Hiformer(layout, token_width=32, num_tasks=3)(torch.randn(4, 128)).shape
        torch.Size([4, 3, 32])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 2,
        token_width: Count = 32,
        num_heads: Count = 4,
        key_width: Count = 8,
        value_width: Count = 16,
        key_rank: Count = 32,
        value_rank: Count = 64,
        feedforward: Count | None = None,
        projection: Projection = "composite",
        dense_tokens: Count = 4,
        num_tasks: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        super().__init__(layout.width, token_width)
        self.num_tasks = num_tasks
        self.tokens = FeatureTokens(layout, token_width, dense_tokens, num_tasks or 1)
        total = self.tokens.num_tokens
        self.layers = nn.ModuleList(
            HiformerLayer(
                total,
                kept,
                token_width,
                num_heads,
                key_width,
                value_width,
                key_rank,
                value_rank,
                feedforward or 4 * token_width,
                projection,
            )
            for kept in [total] * (num_layers - 1) + [num_tasks or 1]
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, D)``, or ``(B, num_tasks, D)``."""
        x: Tensor = self.tokens(x0)
        for layer in self.layers:
            x = layer(x)
        return x if self.num_tasks is not None else x[:, 0]

    def flops(self) -> int:
        """The sum of the tokens' and the layers'."""
        layers = [layer for layer in self.layers if isinstance(layer, HiformerLayer)]
        return self.tokens.flops() + sum(layer.flops() for layer in layers)
