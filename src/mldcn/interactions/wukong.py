"""WuKong: stacked factorisation machines whose outputs are embeddings again."""

from __future__ import annotations

import math
from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, register
from mldcn.interactions.dnn import MLP
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, as_layout


class TokenMap(nn.Module):
    """``W X``: each new token is a combination of all tokens.

    Xavier-normal W (m x n): ``m n`` parameters, ``2 m n e`` FLOPs on tokens of width e.

    Args:
        in_tokens: n.
        out_tokens: m.
    """

    def __init__(self, in_tokens: int, out_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_tokens, in_tokens))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n, e) -> (B, m, e)``."""
        return torch.matmul(self.weight, x)


class FactorizationMachineBlock(nn.Module):
    """``reshape(MLP(LN(flatten(X X^T Y))))``: n tokens to n_F new ones, made of their inner products.

    Computed as ``X (X^T Y)``, which never makes the n x n products. Y (n x k) starts at ``N(0, 1/n)``: X^T Y
    then is as wide-spread as X. The MLP has ReLU layers of the given widths and a linear one to ``n_F e``.
    With P and F the parameters and FLOPs of the MLP: ``nk + 2nk + P`` and ``4nek + F``.

    Args:
        num_tokens: n.
        width: e.
        rank: k.
        out_tokens: n_F.
        hidden: widths of the MLP's hidden layers.
    """

    def __init__(
        self, num_tokens: int, width: int, rank: int, out_tokens: int, hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.width = width
        self.projection = nn.Parameter(torch.empty(num_tokens, rank))
        nn.init.normal_(self.projection, std=math.sqrt(1 / num_tokens))
        self.norm = nn.LayerNorm(num_tokens * rank)
        self.mlp = MLP(num_tokens * rank, hidden)
        self.out = nn.Linear(self.mlp.out_features, out_tokens * width)
        nn.init.xavier_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n, e) -> (B, n_F, e)``."""
        products = torch.bmm(x, torch.matmul(x.mT, self.projection))  # (B, n, k)
        flat: Tensor = self.out(self.mlp(self.norm(products.flatten(1))))
        return torch.unflatten(flat, 1, (-1, self.width))

    def flops(self) -> int:
        """``4nek + F``."""
        machine = 4 * self.projection.numel() * self.width
        return machine + self.mlp.flops() + 2 * self.out.weight.numel()


class WukongLayer(nn.Module):
    """``X_{i+1} = LN(concat(FMB(X_i), LCB(X_i)) + X_i)``, the norm over each token's e numbers.

    LCB, the linear compression block, is ``W_L X``. Where the number of tokens changes, the residual is
    ``R X_i`` with an R learnt like W_L. With n tokens of width e: the FMB's and ``n n_L + 2e`` parameters,
    the FMB's and ``2 n n_L e`` FLOPs; R adds ``n (n_F + n_L)`` and ``2 n (n_F + n_L) e``.

    Args:
        num_tokens: n.
        width: e.
        num_fmb: n_F, tokens from the factorisation machine block.
        num_lcb: n_L, tokens from the linear compression block.
        rank: k, of the factorisation machine.
        hidden: widths of the hidden layers of the block's MLP.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int,
        num_fmb: int,
        num_lcb: int,
        rank: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fmb = FactorizationMachineBlock(num_tokens, width, rank, num_fmb, hidden)
        self.lcb = TokenMap(num_tokens, num_lcb)
        changes = num_tokens != num_fmb + num_lcb
        self.residual = TokenMap(num_tokens, num_fmb + num_lcb) if changes else None
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n, e) -> (B, n_F + n_L, e)``."""
        kept = x if self.residual is None else self.residual(x)
        out: Tensor = self.norm(torch.cat([self.fmb(x), self.lcb(x)], dim=1) + kept)
        return out

    def flops(self) -> int:
        """As in the class's docstring."""
        maps = self.lcb.weight.numel() + (self.residual.weight.numel() if self.residual is not None else 0)
        return self.fmb.flops() + 2 * maps * self.fmb.width


@register(
    "wukong",
    title="WuKong",
    paper="Zhang et al., Wukong: Towards a Scaling Law for Large-Scale Recommendation",
    year=2024,
    order="2^L",
    cost="Σ (4nek + F_MLP + 2n n_L e), + 2n (n_F + n_L) e where n changes",
    knob="token_width",
    secondary="hidden",
)
class Wukong(Interaction):
    """Layers of factorisation machines beside linear maps (:class:`WukongLayer`), on one token a field.

    A layer's tokens are inner products of its input's, so L layers reach order ``2^L`` (norms and the MLP's
    ReLU apart). The result is all ``n_F + n_L`` tokens side by side.

    Per layer on n tokens of width e, P and F being parameters and FLOPs of an MLP with the widths
    ``(nk, hidden, .., hidden, n_F e)``: ``3nk + P + n n_L + 2e`` parameters and ``4nek + F + 2n n_L e``
    FLOPs; where n is not ``n_F + n_L``, ``n (n_F + n_L)`` and ``2n (n_F + n_L) e`` more. The first layer has
    a token a field, the others ``n_F + n_L``. Fields of other widths than e are projected (``w e`` and
    ``2we`` each).

    The paper also makes Y from the input ("attentive"); here Y is a parameter.

    Args:
        features: width d of ``x0``, or its layout.
        num_layers: L.
        token_width: e, to which every field is projected; by default the fields' commonest width, to which
            only fields of other widths are projected.
        num_fmb: n_F, tokens a layer makes by its factorisation machine block.
        num_lcb: n_L, tokens a layer makes by its linear compression block.
        rank: k, of the factorisation machine.
        hidden: width of every hidden layer of the MLP in the factorisation machine block; by default that of
            its output, n_F e.
        num_hidden: hidden layers of this MLP; with none it is one linear map.

    Example:
        >>> import torch
        >>> from mldcn.interactions import Wukong
        >>> from mldcn.layout import FieldLayout
        >>> net = Wukong(FieldLayout.uniform(8, 16), num_layers=2, num_fmb=4, num_lcb=4)
        >>> net(torch.randn(4, 128)).shape
        torch.Size([4, 128])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_layers: Count = 3,
        token_width: Count | None = None,
        num_fmb: Count = 16,
        num_lcb: Count = 16,
        rank: Count = 16,
        hidden: Count | None = None,
        num_hidden: Annotated[int, pydantic.Field(ge=0)] = 1,
    ) -> None:
        layout = as_layout(features)
        tokens = FieldTokens(layout, token_width)
        super().__init__(layout.width, (num_fmb + num_lcb) * tokens.width)
        self.tokens = tokens
        widths = (hidden or num_fmb * tokens.width,) * num_hidden
        counts = [len(layout)] + [num_fmb + num_lcb] * (num_layers - 1)
        self.layers = nn.ModuleList(
            WukongLayer(n, tokens.width, num_fmb, num_lcb, rank, widths) for n in counts
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, (n_F + n_L) e)``."""
        x: Tensor = self.tokens(x0)
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1)

    def flops(self) -> int:
        """The sum of the projections' and the layers'."""
        layers = [layer for layer in self.layers if isinstance(layer, WukongLayer)]
        return self.tokens.flops() + sum(layer.flops() for layer in layers)
