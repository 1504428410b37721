"""Linear maps and feed-forward networks with weights of their own for every token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerTokenLinear(nn.Module):
    """``y_t = x_t W_t + b_t``: one batched product over the T tokens.

    Xavier-normal W by the fans of *one* token's matrix (torch's own initialisers misread those of a stack),
    zero b. ``T (a b + b)`` parameters, without bias ``T a b``; ``2 T a b`` FLOPs, for widths a and b.

    Args:
        num_tokens: T.
        in_features: a.
        out_features: b.
        bias: whether there is a b_t.
    """

    def __init__(self, num_tokens: int, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, in_features, out_features))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (in_features + out_features)))
        self.bias = nn.Parameter(torch.zeros(num_tokens, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, a) -> (B, T, b)``."""
        tokens = x.transpose(0, 1)
        if self.bias is None:
            return torch.bmm(tokens, self.weight).transpose(0, 1)
        return torch.baddbmm(self.bias.unsqueeze(1), tokens, self.weight).transpose(0, 1)

    def flops(self) -> int:
        """``2 T a b``."""
        return 2 * self.weight.numel()


class PerTokenFFN(nn.Module):
    """``y_t = GELU(x_t W1_t + b1_t) W2_t + b2_t``.

    ``T (2 D h + h + D)`` parameters, ``4 T D h`` FLOPs.

    Args:
        num_tokens: T.
        width: D, of a token.
        hidden: h, of the inner layer.
    """

    def __init__(self, num_tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.up = PerTokenLinear(num_tokens, width, hidden)
        self.down = PerTokenLinear(num_tokens, hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D) -> (B, T, D)``."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out

    def flops(self) -> int:
        """``4 T D h``."""
        return self.up.flops() + self.down.flops()
