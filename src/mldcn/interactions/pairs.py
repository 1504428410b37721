"""Products of every pair of field tokens."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Kernel = Literal["mat", "vec", "num"]


def pair_indices(num_tokens: int, with_self: bool = False) -> tuple[Tensor, Tensor]:
    """All pairs i < j (or i <= j), in the order (0, 1), (0, 2), ..., (1, 2), ...: i and j, ``(P,)`` each."""
    i, j = torch.triu_indices(num_tokens, num_tokens, offset=0 if with_self else 1).unbind()
    return i, j


class InnerProducts(nn.Module):
    """``p_ij = <v_i, v_j>`` of all pairs, in the order of :func:`pair_indices`, by one Gram matrix.

    No parameters, ``2 F^2 e`` FLOPs.

    Args:
        num_tokens: F.
        width: e.
        with_self: pairs i = j as well.
    """

    pairs: Tensor

    def __init__(self, num_tokens: int, width: int, with_self: bool = False) -> None:
        super().__init__()
        self.num_tokens, self.width = num_tokens, width
        i, j = pair_indices(num_tokens, with_self)
        self.num_pairs = len(i)
        self.register_buffer("pairs", i * num_tokens + j, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, F, e) -> (B, P)``."""
        return torch.bmm(tokens, tokens.mT).flatten(1).index_select(1, self.pairs)

    def flops(self) -> int:
        """``2 F^2 e``."""
        return 2 * self.num_tokens**2 * self.width


class KernelProducts(nn.Module):
    """Each pair's outer product ``v_i v_j^T``, weighed by a kernel of its own and summed to a number.

    ``mat``: ``v_i^T W_ij v_j``, ``P e^2`` parameters and ``2 P e^2`` FLOPs. ``vec``: ``sum(w_ij v_i v_j)``,
    ``P e`` and ``2 P e``. ``num``: ``w_ij <v_i, v_j>``, P and ``2 F^2 e``. The outer products themselves are
    never made. Xavier-normal, by the fans of one pair's kernel.

    Args:
        num_tokens: F.
        width: e.
        kernel: its kind.
        with_self: pairs i = j as well.
    """

    left: Tensor
    right: Tensor

    def __init__(self, num_tokens: int, width: int, kernel: Kernel, with_self: bool = False) -> None:
        super().__init__()
        self.inner = InnerProducts(num_tokens, width, with_self) if kernel == "num" else None
        i, j = pair_indices(num_tokens, with_self)
        self.num_pairs = len(i)
        self.register_buffer("left", i, persistent=False)
        self.register_buffer("right", j, persistent=False)
        shape, fans = {
            "mat": ((width, width), width + width),
            "vec": ((width, 1), width + 1),
            "num": ((), 2),
        }[kernel]
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(len(i), *shape).normal_(std=math.sqrt(2 / fans)))

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, F, e) -> (B, P)``."""
        if self.inner is not None:
            weighed: Tensor = self.inner(tokens) * self.weight
            return weighed
        by_field = tokens.transpose(0, 1)
        left, right = by_field.index_select(0, self.left), by_field.index_select(0, self.right)  # (P, B, e)
        if self.kernel == "mat":
            products = (torch.bmm(left, self.weight) * right).sum(2)
        else:
            products = torch.bmm(left * right, self.weight).squeeze(2)
        return products.T

    def flops(self) -> int:
        """``2 P e^2``, ``2 P e`` or ``2 F^2 e``."""
        return self.inner.flops() if self.inner is not None else 2 * self.weight.numel()
