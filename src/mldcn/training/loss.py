"""The loss: a weighted sum of the tasks' log losses, null labels masked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def known_weight(labels: Tensor, weight: Tensor) -> Tensor:
    """``(T,)``: the sum of the weights ``(B,)`` of the rows whose label in ``(B, T)`` is known."""
    return (weight.unsqueeze(1) * ~labels.isnan()).sum(dim=0)


def task_losses(logits: Tensor, labels: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
    """``(T,)``: each task's ``sum_i v_i bce(logit_it, y_it) / sum_i v_i`` over the rows whose label is known.

    Args:
        logits: ``(B, T)``.
        labels: ``(B, T)`` in {0, 1}, NaN where unknown.
        weight: ``(B,)`` sample weights v.
        total: ``(T,)``, what the sums over rows are divided by: :func:`known_weight` of the whole batch where
            these rows are a part of it; of these rows by default.

    Returns:
        ``(T,)``, 0 for a task without a known label in the batch.
    """
    known = ~labels.isnan()
    row_weight = weight.unsqueeze(1) * known
    bce = F.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(0.0), reduction="none")
    if total is None:
        total = row_weight.sum(dim=0)
    return (bce * row_weight).sum(dim=0) / torch.where(total > 0, total, torch.ones_like(total))
