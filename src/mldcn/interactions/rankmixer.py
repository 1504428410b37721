"""RankMixer: parameter-free mixing of tokens, feed-forward networks per token, and their sparse mixture."""

from __future__ import annotations

import math
from typing import Annotated

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, Ratio, Regularised, register
from mldcn.interactions.per_token import PerTokenFFN, PerTokenLinear
from mldcn.layout import FieldLayout, as_layout

PAPER = "Zhu et al., RankMixer: Scaling Up Ranking Models in Industrial Recommenders"
SOURCES = ("user", "item", "user_item", "context")
# Of lambda: its start, below which it has no effect, and a bound that keeps it finite if gates never close.
LOG_START, LOG_MOST = math.log(1e-5), math.log(1e4)
Share = Annotated[float, pydantic.Field(gt=0, le=1)]


class SemanticTokens(nn.Module):
    """``x_t = Proj_t(e[s (t - 1) : s t])``: slices of the fields, grouped by meaning, as T tokens of width D.

    The fields of one source (user, item, user-item, context) stand together, each group in the layout's
    order; the whole is cut into T slices of ``s = ceil(d / T)`` columns (zeros fill the last), and each is
    projected by weights of its own: ``T (sD + D)`` parameters, ``2 T s D`` FLOPs.

    Args:
        layout: the fields of ``x0``.
        num_tokens: T.
        width: D.
    """

    def __init__(self, layout: FieldLayout, num_tokens: int, width: int) -> None:
        super().__init__()
        self.widths = layout.widths
        self.order = sorted(range(len(layout)), key=lambda i: SOURCES.index(layout.fields[i].source))
        self.num_tokens = num_tokens
        self.slice = math.ceil(layout.width / num_tokens)
        self.padding = num_tokens * self.slice - layout.width
        self.projection = PerTokenLinear(num_tokens, self.slice, width)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, T, D)``."""
        parts = torch.split(x0, list(self.widths), dim=1)
        grouped = F.pad(torch.cat([parts[i] for i in self.order], dim=1), (0, self.padding))
        tokens: Tensor = self.projection(grouped.reshape(-1, self.num_tokens, self.slice))
        return tokens

    def flops(self) -> int:
        """``2 T s D``."""
        return self.projection.flops()


def mix_tokens(x: Tensor) -> Tensor:
    """Multi-head token mixing with as many heads as tokens: output token h is every token's h-th head.

    ``(B, T, D) -> (B, T, D)`` with D a multiple of T: a permutation, without parameters or FLOPs.

    Example:
        >>> mix_tokens(torch.tensor([[[1, 2, 3, 4], [5, 6, 7, 8]]])).tolist()
        [[[1, 2, 5, 6], [3, 4, 7, 8]]]
    """
    return torch.unflatten(x, 2, (x.shape[1], -1)).transpose(1, 2).flatten(2)


class MixerBlock(nn.Module):
    """``S = LN(Mix(X) + X)``, then ``X = LN(FFN(S) + S)``, over each token's D numbers.

    ``4D`` parameters, and those of the FFN.

    Args:
        width: D.
        ffn: the network per token.
    """

    def __init__(self, width: int, ffn: PerTokenFFN | SparseExperts) -> None:
        super().__init__()
        self.ffn = ffn
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, *routes: Tensor) -> Tensor:
        """``(B, T, D) -> (B, T, D)``; ``routes`` go to the FFN."""
        s = self.norms[0](mix_tokens(x) + x)
        out: Tensor = self.norms[1](self.ffn(s, *routes) + s)
        return out


class SparseExperts(Regularised):
    """A mixture of E experts per token: ``v_t = sum_j G_tj e_tj(s_t)`` with ``G_t = ReLU(h(s_t))``.

    An expert is ``GELU(s W1 + b1) W2 + b2``; every token has E of its own, and its own linear routers h. There
    are two (dense training, sparse inference): ``h_train`` is free, ``h_infer`` is held sparse by the loss
    ``lambda * sum_tj G_tj`` (a mean over rows) and alone is used in inference. In training each row goes by
    one of the two: both learn from the task, h_infer exactly as it is used later, and experts that it closes
    learn under h_train.

    lambda adapts as in ReMoE: a step at which more than ``active_ratio`` of h_infer's gates are open
    multiplies it by ``coefficient_step``, one at which fewer are divides it. It is part of the state. Large
    factors close far too many gates before lambda comes down again.

    All experts are computed whatever the gates are: sparsity here saves no time. Gathering the open ones
    would make shapes depend on the data, which neither export nor whole-graph compilation takes. With f the
    width of an expert: ``T (E (2Df + f + D) + 2 (DE + E))`` parameters and ``T E (4Df + 4D)`` FLOPs in
    inference (router and output bias are products, too); a kernel that skips closed experts would do
    ``active_ratio`` of the experts' part.

    Args:
        num_tokens: T.
        width: D.
        hidden: f, width of each expert's inner layer.
        num_experts: E, experts of each token.
        active_ratio: the share of open gates that lambda holds h_infer to.
        coefficient_step: the factor by which lambda changes at each step.
    """

    log_coefficient: Tensor

    def __init__(
        self,
        num_tokens: int,
        width: int,
        hidden: int,
        num_experts: int,
        active_ratio: float,
        coefficient_step: float,
    ) -> None:
        super().__init__()
        self.num_experts, self.active_ratio = num_experts, active_ratio
        self.log_step = math.log(coefficient_step)
        self.up = PerTokenLinear(num_tokens, width, num_experts * hidden)
        self.down = PerTokenLinear(num_tokens, num_experts * hidden, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_tokens, num_experts, width))
        # Xavier's fans are those of one expert.
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=math.sqrt(2 / (width + hidden)))
        self.train_router = PerTokenLinear(num_tokens, width, num_experts)
        self.infer_router = PerTokenLinear(num_tokens, width, num_experts)
        self.register_buffer("log_coefficient", torch.tensor(LOG_START))

    def forward(self, s: Tensor, sparse: Tensor | None = None) -> Tensor:
        """``(B, T, D) -> (B, T, D)``; in training ``sparse (B)`` says which rows go by h_infer."""
        gates = self.infer_router(s).relu()  # (B, T, E)
        if sparse is not None:
            self._regularise(gates, sparse)
            gates = torch.where(sparse[:, None, None], gates, self.train_router(s).relu())
        inner = torch.unflatten(F.gelu(self.up(s)), 2, (self.num_experts, -1))  # (B, T, E, h)
        mixed = self.down((inner * gates.unsqueeze(3)).flatten(2))
        out: Tensor = mixed + torch.bmm(gates.transpose(0, 1), self.bias).transpose(0, 1)
        return out

    def _regularise(self, gates: Tensor, sparse: Tensor) -> None:
        """Sets ``auxiliary`` and moves lambda, from the rows that go by h_infer."""
        rows = sparse.sum()
        each = sparse[:, None, None] / rows.clamp(min=1)
        self.auxiliary = self.log_coefficient.exp() * (gates.float() * each).sum()
        with torch.no_grad():
            active = ((gates > 0) * each).sum() / (gates.shape[1] * gates.shape[2])
            move = (active - self.active_ratio).sign() * (rows > 0) * self.log_step
            self.log_coefficient.add_(move).clamp_(LOG_START, LOG_MOST)

    def flops(self) -> int:
        """``T E (4Df + 4D)``: one router, all experts, the sum of their output biases."""
        return self.up.flops() + self.down.flops() + self.infer_router.flops() + 2 * self.bias.numel()


class _Mixer(Interaction):
    """Tokens, blocks and the mean over tokens."""

    tokens: SemanticTokens
    blocks: nn.ModuleList

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, D)``."""
        return self._mix(x0)

    def _mix(self, x0: Tensor, *routes: Tensor) -> Tensor:
        x: Tensor = self.tokens(x0)
        for block in self.blocks:
            x = block(x, *routes)
        return x.mean(dim=1)

    def flops(self) -> int:
        """The tokens' and the networks' per token."""
        blocks = [block for block in self.blocks if isinstance(block, MixerBlock)]
        return self.tokens.flops() + sum(block.ffn.flops() for block in blocks)


@register(
    "rankmixer",
    title="RankMixer",
    paper=PAPER,
    year=2025,
    order="none (GELU)",
    cost="4LTDh + 2TsD",
    knob="head_width",
    secondary="hidden",
)
class RankMixer(_Mixer):
    """Blocks of token mixing and feed-forward networks per token on :class:`SemanticTokens`, mean-pooled.

    ``S = LN(Mix(X) + X)``, ``X = LN(PFFN(S) + S)``; Mix regroups the tokens' heads (:func:`mix_tokens`), and
    the residual wants as many heads as tokens, so D is T times the width of a head. With h = kD and slices of
    ``s = ceil(d / T)`` columns: ``L (T (2Dh + h + D) + 4D) + T (sD + D)`` parameters and ``4LTDh + 2TsD``
    FLOPs, which the paper rounds to ``2kLTD^2`` and ``4kLTD^2``.

    The published sizes are T = 16, D = 768, L = 2 ("100M") and T = 32, D = 1536, L = 2 ("1B"); k is not
    published.

    Args:
        features: width d of ``x0``, or its layout (whose sources are the semantic groups).
        num_layers: L.
        num_tokens: T.
        head_width: D / T.
        hidden: h = kD, width of the inner layer of each token's network; 3 D by default.

    Example:
        >>> import torch
        >>> from mldcn.interactions import RankMixer
        >>> net = RankMixer(128, num_layers=2, num_tokens=4, head_width=8, hidden=64)
        >>> net(torch.randn(8, 128)).shape, net.flops()
        (torch.Size([8, 32]), 73728)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 2,
        num_tokens: Count = 8,
        head_width: Count = 8,
        hidden: Count | None = None,
    ) -> None:
        layout, width = as_layout(features), num_tokens * head_width
        super().__init__(layout.width, width)
        self.tokens = SemanticTokens(layout, num_tokens, width)
        self.blocks = nn.ModuleList(
            MixerBlock(width, PerTokenFFN(num_tokens, width, hidden or 3 * width)) for _ in range(num_layers)
        )


@register(
    "rankmixer_moe",
    title="RankMixer, sparse MoE",
    paper=PAPER,
    year=2025,
    order="none (GELU)",
    cost="LTE (4Df + 4D) + 2TsD",
    knob="head_width",
    secondary="hidden",
)
class RankMixerMoE(_Mixer):
    """:class:`RankMixer` with a sparse mixture of experts in place of each token's network.

    See :class:`SparseExperts` for routing, its loss, and why compute stays dense: FLOPs are counted so. With f
    the width of an expert and slices of ``s = ceil(d / T)`` columns:
    ``L (T (E (2Df + f + D) + 2 (DE + E)) + 4D) + T (sD + D)`` parameters, of which inference does not read
    ``L T (DE + E)``, and ``LTE (4Df + 4D) + 2TsD`` FLOPs.

    The paper names two routers that are both trained, and a loss on the second; how the second learns from
    the task is left open. Here each row of a training batch goes through the whole network by one of them, at
    random. A training loop of one's own adds :func:`~mldcn.interactions.auxiliary_loss` to its loss.

    Args:
        features: width d of ``x0``, or its layout (whose sources are the semantic groups).
        num_layers: L.
        num_tokens: T.
        head_width: D / T.
        num_experts: E, experts of each token.
        hidden: f, width of each expert's inner layer; by default 3 D / E, so that all experts together are as
            wide as RankMixer's network.
        active_ratio: the share of open gates that each layer's inference router is held to.
        coefficient_step: the factor by which the coefficient of its loss changes at each training step.

    Raises:
        ValueError: ``coefficient_step`` is not above 1.

    Example:
        >>> import torch
        >>> from mldcn.interactions import RankMixerMoE
        >>> net = RankMixerMoE(128, num_tokens=4, head_width=8, num_experts=4, active_ratio=0.25)
        >>> net(torch.randn(8, 128)).shape, net.flops()
        (torch.Size([8, 32]), 110592)
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 2,
        num_tokens: Count = 8,
        head_width: Count = 8,
        num_experts: Count = 4,
        hidden: Count | None = None,
        active_ratio: Share = 0.25,
        coefficient_step: Ratio = 1.02,
    ) -> None:
        layout, width = as_layout(features), num_tokens * head_width
        super().__init__(layout.width, width)
        if coefficient_step <= 1:
            raise ValueError(f"coefficient_step must be above 1 (found {coefficient_step})")
        each = hidden or max(1, round(3 * width / num_experts))
        self.tokens = SemanticTokens(layout, num_tokens, width)
        self.blocks = nn.ModuleList(
            MixerBlock(
                width,
                SparseExperts(num_tokens, width, each, num_experts, active_ratio, coefficient_step),
            )
            for _ in range(num_layers)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, D)``."""
        if not self.training:
            return self._mix(x0)
        return self._mix(x0, torch.rand(x0.shape[0], device=x0.device) < 0.5)
