"""The learning rate by step."""

from __future__ import annotations

import math

from mldcn.config import OptimiserConfig


def lr_factor(config: OptimiserConfig, step: int, total_steps: int) -> float:
    """The share of the peak learning rate at a step (0 is the first).

    It rises linearly over ``warmup_steps``, then stays, or falls to ``final_lr`` at ``total_steps``.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.final_lr + (1.0 - config.final_lr) * shape
