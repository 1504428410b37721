"""Loss and gradients of one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mldcn.data.batch import Batch
from mldcn.model import Ranker
from mldcn.training.loss import known_weight, task_loss


def backpropagate(model: Ranker, batch: Batch, task_weights: Tensor, *, bf16: bool = False) -> Tensor:
    """Adds the gradients of a batch's :func:`task_loss` to the parameters' and gives the loss, detached.

    The embedding is one look-up and one gradient for the whole batch. What is behind it is computed part by
    part (:meth:`Ranker.parts`), which gives the same sums: the loss is one over rows. Only BatchNorm looks at
    the whole batch, so that a model with one is computed in one part.

    Args:
        model: in training mode.
        batch: on the model's device.
        task_weights: ``(T,)`` loss weights.
        bf16: compute with autocast to bfloat16.
    """
    autocast = torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16)
    with autocast:
        x0 = model.embedder(batch.ids, batch.dense)
    total = known_weight(batch.labels, batch.weight)
    whole = any(isinstance(module, _BatchNorm) for module in model.scorer.modules())
    parts = [slice(0, len(batch))] if whole else model.parts(len(batch), x0.device)
    losses, gradients = [], []
    for part in parts:
        # A leaf of its own: autograd stops here, and goes on through the embedder once for all parts.
        piece = x0.detach()[part].requires_grad_(x0.requires_grad)
        with autocast:
            logits = model.logits(piece, batch.position[part])
        loss = task_loss(logits, batch.labels[part], batch.weight[part], task_weights, total)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        gradients.append(piece.grad)
    if x0.requires_grad:
        x0.backward(gradients[0] if len(parts) == 1 else torch.cat(gradients))
    return losses[0] if len(parts) == 1 else torch.stack(losses).sum()
