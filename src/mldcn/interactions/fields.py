"""Normalisation field by field, for an ``x0`` whose fields may have different widths."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mldcn.layout import FieldLayout


class _PerField(nn.Module):
    """Applies ``normalise`` to every field wider than one column; neighbours of one width go together.

    A field of one number has no direction and no variance: normalised, its value would be lost.
    """

    def __init__(self, layout: FieldLayout) -> None:
        super().__init__()
        self.runs = [(width, len(list(run))) for width, run in groupby(layout.widths)]

    def normalise(self, tokens: Tensor) -> Tensor:
        """``(B, n, width) -> (B, n, width)``."""
        raise NotImplementedError

    def per_field(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        parts: list[Tensor] = []
        sizes = [width * count for width, count in self.runs]
        for part, (width, count) in zip(torch.split(x0, sizes, dim=1), self.runs, strict=True):
            wide = width > 1
            parts.append(self.normalise(part.reshape(-1, count, width)).flatten(1) if wide else part)
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class FieldLayerNorm(_PerField):
    """LayerNorm of each field on its own, with a gain and a bias a column (MaskNet's ``LN_EMB``).

    A field of one column is only scaled and shifted.

    Args:
        layout: the fields of the input, ``d`` columns in all.
        eps: added to the variance.
    """

    def __init__(self, layout: FieldLayout, eps: float = 1e-5) -> None:
        super().__init__(layout)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(layout.width))
        self.bias = nn.Parameter(torch.zeros(layout.width))

    def normalise(self, tokens: Tensor) -> Tensor:
        """To mean 0 and variance 1 over a field's columns."""
        return F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        return self.per_field(x0) * self.weight + self.bias


class FieldL2Norm(_PerField):
    """Each field to L2 norm 1, as the Homefeed model does with its embeddings (Section 3).

    A field of one column is left as it is.

    Args:
        layout: the fields of the input, ``d`` columns in all.
    """

    def normalise(self, tokens: Tensor) -> Tensor:
        """To norm 1 over a field's columns; zeros stay zeros."""
        return F.normalize(tokens, dim=-1, eps=1e-6)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        return self.per_field(x0)
