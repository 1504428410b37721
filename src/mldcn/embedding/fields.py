"""How looked-up rows and dense columns become fields of ``x0``."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mldcn.layout import FieldLayout


def pool(vectors: Tensor, valid: Tensor, how: Literal["mean", "sum", "max"]) -> Tensor:
    """One vector ``(B, e)`` from the valid ones of ``vectors (B, L, e)``; zero where none is valid.

    Args:
        vectors: ``(B, L, e)``.
        valid: ``(B, L)`` bool.
        how: what is computed over the valid vectors, element by element.
    """
    if how == "max":
        highest = vectors.masked_fill(~valid.unsqueeze(2), -math.inf).amax(1)
        return highest.masked_fill(~valid.any(1, keepdim=True), 0.0)
    weights = valid.to(vectors.dtype)
    if how == "mean":
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1.0)
    return weighted_sum(weights, vectors)


def weighted_sum(weights: Tensor, vectors: Tensor) -> Tensor:
    """``sum_j weights_j vectors_j``: ``(B, L), (B, L, e) -> (B, e)`` without a ``(B, L, e)`` temporary."""
    return torch.bmm(weights.unsqueeze(1), vectors).squeeze(1)


class SequencePooling(nn.Module):
    """A weighted mean of the sequence's items, by age and by match with a target.

    Weights are a softmax over the valid items of::

        logit_j = <target, k_j> / sqrt(e)  -  decay * log(1 + age_j)

    The first term is scaled dot-product attention (Vaswani et al. 2017, Eq. 1; DIN, Zhou et al. 2018, has an
    MLP there and no softmax). Without a target it is left out; without times too this is the plain mean.
    The second weighs an item by ``(1 + age) ** -decay``, a power law, with one learned ``decay`` a sequence
    that starts at 0. An empty sequence gives a zero vector.

    Args:
        width: e.
        times: whether the ages of items are known.
    """

    def __init__(self, width: int, *, times: bool) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.decay = nn.Parameter(torch.zeros(())) if times else None

    def forward(
        self, items: Tensor, valid: Tensor, target: Tensor | None = None, log_age: Tensor | None = None
    ) -> Tensor:
        """Pools ``items (B, L, e)``.

        Args:
            items: ``(B, L, e)``.
            valid: ``(B, L)`` bool.
            target: ``(B, e)``, or None for no attention.
            log_age: ``(B, L)``, log(1 + time since the item), with ``times`` only.

        Returns:
            ``(B, e)``.
        """
        logits = items.new_zeros(valid.shape)
        if target is not None:
            logits = torch.bmm(items, target.unsqueeze(2)).squeeze(2) * self.scale
        if self.decay is not None and log_age is not None:
            logits = logits - self.decay * log_age
        # A finite floor instead of -inf, so that an empty sequence has weights (then set to 0) and no NaN.
        weights = torch.softmax(logits.masked_fill(~valid, torch.finfo(logits.dtype).min), dim=1)
        return weighted_sum((weights * valid).to(items.dtype), items)


class FieldNorm(nn.Module):
    """Scales each field of ``x0`` to L2 norm 1, as the Homefeed model does with its embeddings.

    Numeric fields and fields of width 1 are left as they are: a norm of 1 would keep only their sign.
    Zero vectors stay zero.

    Args:
        layout: the fields of x0.
        eps: norms are taken to be at least this.
    """

    def __init__(self, layout: FieldLayout, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps
        # Adjacent fields alike in width are normalised by one call: (fields, width, whether to normalise).
        self.runs: list[tuple[int, int, bool]] = []
        for field in layout:
            scaled = field.kind != "numeric" and field.width > 1
            if self.runs and self.runs[-1][1:] == (field.width, scaled):
                count, _, _ = self.runs[-1]
                self.runs[-1] = (count + 1, field.width, scaled)
            else:
                self.runs.append((1, field.width, scaled))
        self.columns = [count * width for count, width, _ in self.runs]

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        parts = []
        for part, (count, width, scaled) in zip(
            torch.split_with_sizes(x0, self.columns, dim=1), self.runs, strict=True
        ):
            if not scaled:
                parts.append(part)
                continue
            fields = part.reshape(-1, count, width)
            parts.append(functional.normalize(fields, dim=2, eps=self.eps).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm that uses its running statistics for a batch of one row, which has no deviation itself."""

    def forward(self, input: Tensor) -> Tensor:
        """``(B, d) -> (B, d)``."""
        if self.training and input.shape[0] == 1:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)
