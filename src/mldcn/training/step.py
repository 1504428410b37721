"""Loss and gradients of one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mldcn.data.batch import Batch
from mldcn.interactions import auxiliary_loss
from mldcn.model import Ranker
from mldcn.training.loss import known_weight, task_losses


def backpropagate(model: Ranker, batch: Batch, task_weights: Tensor, *, bf16: bool = False) -> Tensor:
    """Adds the gradients of a batch's loss to the parameters' and gives the loss, detached.

    The loss is the weighted sum of the :func:`task_losses`, with those of the interaction's streams in them,
    and of what its regularised parts add.

    The embedding is one look-up and one gradient for the whole batch. What is behind it is computed part by
    part (:meth:`Ranker.parts`), which gives the same sums: the loss is one over rows. Models with a part that
    looks at the whole batch (BatchNorm, say) are computed in one part.

    Args:
        model: in training mode.
        batch: on the model's device.
        task_weights: ``(T,)`` loss weights.
        bf16: compute with autocast to bfloat16.
    """
    autocast = torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16)
    with autocast:
        x0 = model.embed(batch.ids, batch.dense)
    total = known_weight(batch.labels, batch.weight)
    whole = model.scorer.whole_batches()
    parts = [slice(0, len(batch))] if whole else model.parts(len(batch), x0.device)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for part in parts:
        # A leaf of its own: autograd stops here, and goes on through the embedder once for all parts.
        piece = x0.detach()[part].requires_grad_(x0.requires_grad)
        with autocast:
            each = _losses(model, piece, batch, part, total)
        loss = (each * task_weights).sum()
        if whole and (extra := auxiliary_loss(model.scorer)) is not None:
            loss = loss + extra
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        if piece.grad is not None:
            gradients.append(piece.grad)
    if x0.requires_grad:
        x0.backward(gradients[0] if len(parts) == 1 else torch.cat(gradients))  # type: ignore[no-untyped-call]
    return losses[0] if len(parts) == 1 else torch.stack(losses).sum()


def _losses(model: Ranker, x0: Tensor, batch: Batch, part: slice, total: Tensor) -> Tensor:
    """``(T,)``: each task's loss of a part of the batch, its streams' included."""
    labels, weight, position = batch.labels[part], batch.weight[part], batch.position[part]
    interaction = model.scorer.interaction
    if not interaction.streams:
        return task_losses(model.logits(x0, position), labels, weight, total)
    logits, streams = model.stream_logits(x0, position)
    own = torch.stack([task_losses(stream, labels, weight, total) for stream in streams])
    return interaction.stream_loss(task_losses(logits, labels, weight, total), own)
