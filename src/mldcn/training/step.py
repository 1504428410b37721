"""Loss and gradients of one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mldcn.config import TrainingConfig
from mldcn.data.batch import Batch
from mldcn.interactions import auxiliary_loss
from mldcn.model import Ranker
from mldcn.training.loss import known_weight, task_losses
from mldcn.training.optimisers import build_optimisers
from mldcn.training.table_optim import clip_grad_norm


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


class TrainingStep:
    """One batch, from its loss to the moved weights: a run's step without schedule, average and recovery.

    Its memory is what ``mldcn.cost`` measures and estimates.

    Args:
        model: on its device.
        config: optimisers, clipping and precision.
    """

    def __init__(self, model: Ranker, config: TrainingConfig) -> None:
        self.model, self.config = model, config
        self.optimisers: Sequence[torch.optim.Optimizer] = build_optimisers(config.optimiser, model)
        self.task_weights = torch.ones(len(model.tasks), device=next(model.parameters()).device)

    def __call__(self, batch: Batch) -> Tensor:
        """Trains on a batch; gives its loss."""
        loss = backpropagate(self.model, batch, self.task_weights, bf16=self.config.amp == "bf16")
        if self.config.optimiser.clip_norm is not None:
            clip_grad_norm(self.model.parameters(), self.config.optimiser.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss
