"""The loss: a weighted sum of the tasks' log losses, null labels masked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def known_weight(labels: Tensor, weight: Tensor) -> Tensor:
    """``(T,)``: the sum of the weights ``(B,)`` of the rows whose label in ``(B, T)`` is known."""
    return (weight.unsqueeze(1) * ~labels.isnan()).sum(dim=0)


def task_loss(
    logits: Tensor, labels: Tensor, weight: Tensor, task_weights: Tensor, total: Tensor | None = None
) -> Tensor:
    """``sum_t w_t * sum_i v_i bce(logit_it, y_it) / sum_i v_i`` over the rows whose label t is known.

    Args:
        logits: ``(B, T)``.
        labels: ``(B, T)`` in {0, 1}, NaN where unknown.
        weight: ``(B,)`` sample weights v.
        task_weights: ``(T,)`` loss weights w.
        total: ``(T,)``, what the sums over rows are divided by: :func:`known_weight` of the whole batch where
            these rows are a part of it; of these rows by default.

    Returns:
        A scalar. A task without a known label in the batch adds 0.
    """
    known = ~labels.isnan()
    row_weight = weight.unsqueeze(1) * known
    bce = F.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(0.0), reduction="none")
    if total is None:
        total = row_weight.sum(dim=0)
    mean = (bce * row_weight).sum(dim=0) / torch.where(total > 0, total, torch.ones_like(total))
    return (mean * task_weights).sum()
