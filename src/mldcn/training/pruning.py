"""DeepLight's structured pruning: the smallest weights become zero, more of them as training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mldcn.config import PruningConfig
from mldcn.errors import UserError
from mldcn.interactions.fm import FwFM
from mldcn.model import Ranker

DECAY = 0.99
# Until this share of the final sparsity is reached, later weights are kept over better ones with fewer zeros.
REACHED = 0.95


class Pruner:
    """Zeroes the smallest weights of a model, as many as the step asks for (DeepLight, Algorithm 1).

    k steps after the warm-up the sparsity is ``s (1 - 0.99^(k / span))``. Three groups have a ratio of it
    each: every matrix of the interaction, the deep part and the heads' towers on its own (a stack of matrices
    is one; the last linear map to a logit is left whole), the field pairs' weights R of each FwFM, and the
    tables of ``x0`` together. Nothing keeps a zero from growing again until the next pruning; that is
    DeepLight's way to let it come back. What to prune follows from the weights and the step alone, so that a
    run that was stopped needs no more than these to go on.

    A dense product takes as long with zeros as without: ``benchmarks/sparse.py`` measures from which share on a
    sparse one is faster.

    Args:
        config: the sparsity and its schedule.
        model: whose weights are pruned in place.
        steps_per_epoch: of the training.
        epochs: of the training.

    Raises:
        UserError: training ends before the pruning begins, or there is nothing to prune.
    """

    def __init__(self, config: PruningConfig, model: Ranker, steps_per_epoch: int, epochs: int) -> None:
        if config.warmup_epochs >= epochs:
            raise UserError(
                f"training.pruning.warmup_epochs: pruning begins after epoch {config.warmup_epochs}, and "
                f"training.epochs is {epochs}"
            )
        self.config = config
        self.start = config.warmup_epochs * steps_per_epoch
        groups = prunable(model)
        ratios = {"dense": config.dense, "field_pairs": config.field_pairs, "embedding": config.embedding}
        self.groups = {name: group for name, group in groups.items() if group and ratios[name]}
        self.ratios = ratios
        if not self.groups:
            raise UserError("training.pruning: there is nothing to prune; set one of its ratios above 0")

    def sparsity(self, step: int) -> float:
        """Of a weight group with ratio 1, after so many steps of the training."""
        since = max(step - self.start, 0)
        return float(self.config.sparsity * (1 - DECAY ** (since / self.config.span)))

    def growing(self, step: int) -> bool:
        """Whether the sparsity is still far from its final value."""
        return self.sparsity(step) < REACHED * self.config.sparsity

    def due(self, step: int) -> bool:
        """Whether the schedule prunes after this step."""
        return step > self.start and (step - self.start) % self.config.every == 0

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """Zeroes what the schedule asks for after so many steps."""
        for name, group in self.groups.items():
            share = self.ratios[name] * self.sparsity(step)
            if name == "embedding":
                zero_smallest(list(group.values()), share)
            else:
                for weight in group.values():
                    zero_smallest([weight], share)

    def found(self) -> dict[str, float]:
        """The share of zeros in each group."""
        return {name: zeros(group) for name, group in self.groups.items()}


def prunable(model: Ranker) -> dict[str, dict[str, nn.Parameter]]:
    """The weights that can be pruned, by group and name."""
    pairs = {
        f"scorer.{name}.weight": module.weight
        for name, module in model.scorer.named_modules()
        if isinstance(module, FwFM)
    }
    dense = {
        f"scorer.{name}": parameter
        for name, parameter in model.scorer.named_parameters()
        if parameter.dim() >= 2 and not name.startswith("heads.logits.")
    }
    tables = {name: table for name, table in model.tables().items() if name.startswith("embedder.")}
    return {"dense": dense, "field_pairs": pairs, "embedding": tables}


def zero_smallest(weights: list[nn.Parameter], share: float) -> None:
    """Zeroes, in place, a share of all numbers, the smallest in magnitude and those that tie with them."""
    sizes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    count = int(share * sizes.numel())
    if count == 0:
        return
    threshold = sizes.kthvalue(count).values
    for weight in weights:
        weight.masked_fill_(weight.abs() <= threshold, 0.0)


def zeros(tensors: Mapping[str, Tensor]) -> float:
    """The share of zeros."""
    total = sum(tensor.numel() for tensor in tensors.values())
    return sum(int((tensor == 0).sum()) for tensor in tensors.values()) / max(total, 1)
