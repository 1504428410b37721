"""One head a task on the part that all tasks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mldcn.interactions.dnn import MLP


class TaskHeads(nn.Module):
    """Independent MLPs ending in one logit each: ``(B, d) -> (B, T)``.

    Given one representation a task, ``(B, T, d)``, each reads its own (MMoE).

    Args:
        in_features: width d of the shared part.
        tasks: names of the T tasks.
        hidden: widths of each head's hidden layers; none makes the heads linear.
    """

    def __init__(self, in_features: int, tasks: Sequence[str], hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.towers = nn.ModuleList(MLP(in_features, tuple(hidden)) for _ in tasks)
        width = hidden[-1] if hidden else in_features
        self.logits = nn.ModuleList(nn.Linear(width, 1) for _ in tasks)
        for logit in self.logits:
            assert isinstance(logit, nn.Linear)
            nn.init.xavier_uniform_(logit.weight)
            nn.init.zeros_(logit.bias)

    def forward(self, shared: Tensor) -> Tensor:
        """Logits ``(B, T)``."""
        own = shared.unbind(1) if shared.dim() == 3 else [shared] * len(self.towers)
        return torch.cat(
            [logit(tower(each)) for each, tower, logit in zip(own, self.towers, self.logits, strict=True)],
            dim=1,
        )

    def flops(self) -> int:
        """GEMM FLOPs per example."""
        total = 0
        for tower, logit in zip(self.towers, self.logits, strict=True):
            assert isinstance(tower, MLP)
            assert isinstance(logit, nn.Linear)
            total += tower.flops() + 2 * logit.in_features
        return total
