"""Numerical trouble: seeing it, step by step, and saying what the batch holds.

A step is in trouble where its loss or its gradient's norm is not finite, or where the loss is a spike. Both are
kept on the device and read back together, some steps later, so that a GPU need not wait at each step; whether
and where trouble is found does not depend on when it is looked for.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mldcn.config import RecoveryConfig
from mldcn.data.batch import Batch, EncodedLayout

WINDOW = 101  # losses whose median a spike is measured against
COIN = math.log(2.0)  # the log loss of whoever says one half


@dataclass(frozen=True)
class Place:
    """A step (1 is the first), and its batch's number in its epoch (0 is the first of either)."""

    step: int
    epoch: int
    batch: int


@dataclass(frozen=True)
class Trouble:
    """What went wrong at a step; ``values`` are the batch's most extreme ones, in words."""

    step: int
    epoch: int
    batch: int
    problem: str
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"at step {self.step:,} (epoch {self.epoch + 1}, batch {self.batch + 1}) {self.problem}"
        return f"{where}; most extreme in that batch: {', '.join(self.values) or 'nothing'}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "values": list(self.values)}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Trouble:
        """The inverse of :meth:`to_json`."""
        return cls(**{**raw, "values": tuple(raw["values"])})


class LossWatch:
    """Collects losses and gradient norms as tensors and judges them when asked.

    A loss is a spike where it is more than ``spike`` times the median of the last 101 losses, and more than
    ``spike`` times the loss of a model that always says one half. The second condition keeps rare positives from
    ever being one: with a spike of 20 a batch's mean log loss has to be above 13.9 for each unit of task weight,
    that is, the model has to hold what happened for less likely than one in a million, on average over the
    rows.

    Args:
        config: says what a spike is.
        task_weights: the tasks' weights in the loss, summed.
    """

    def __init__(self, config: RecoveryConfig, task_weights: float) -> None:
        self.spike = config.spike
        self.floor = COIN * task_weights
        self.window: deque[float] = deque(maxlen=WINDOW)
        self._waiting: list[tuple[Place, Tensor, Tensor | None]] = []

    def add(self, place: Place, loss: Tensor, norm: Tensor | None) -> None:
        """Takes a step's loss and gradient norm (where it is measured), two scalars, without reading them."""
        self._waiting.append((place, loss, norm))

    def read(self) -> tuple[float | None, Trouble | None]:
        """The mean loss of the steps since the last reading, if there were any, and the first trouble."""
        if not self._waiting:
            return None, None
        losses: list[float] = torch.stack([loss for _, loss, _ in self._waiting]).tolist()
        norms = [norm for _, _, norm in self._waiting if norm is not None]
        read = iter(torch.stack(norms).tolist() if norms else [])
        for (place, _, norm), loss in zip(self._waiting, losses, strict=True):
            problem = self._judge(loss, next(read) if norm is not None else 0.0)
            if problem is not None:
                return loss, Trouble(place.step, place.epoch, place.batch, problem)
            self.window.append(loss)
        self._waiting.clear()
        return sum(losses) / len(losses), None

    def _judge(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.spike is not None and self.window and loss > self.spike * self.floor:
            usual = statistics.median(self.window)
            if loss > self.spike * usual:
                return f"the loss is {loss:.4g} where {usual:.4g} is usual"
        if not math.isfinite(norm):
            return f"the loss is {loss:.4g} and the gradient's norm {norm}"
        return None

    def state(self) -> list[float]:
        """The last losses, for a checkpoint."""
        return list(self.window)

    def restore(self, window: Iterable[float]) -> None:
        """Goes on from what :meth:`state` gave."""
        self.window = deque(window, maxlen=WINDOW)
        self._waiting.clear()


def extreme_values(batch: Batch, layout: EncodedLayout, count: int = 3) -> tuple[str, ...]:
    """The features (and labels and weights) with the most extreme encoded value, that which is not finite first.

    Args:
        batch: on the CPU.
        layout: names the columns.
        count: how many to name.
    """
    columns = [(f"feature {slot.feature}", batch.dense[:, slot.columns]) for slot in layout.dense]
    odd = [("weight", batch.weight.unsqueeze(1))]
    odd += [
        (f"label {task}", batch.labels[:, i : i + 1].nan_to_num(0.0)) for i, task in enumerate(layout.tasks)
    ]
    columns += [(name, values) for name, values in odd if not bool(torch.isfinite(values).all())]
    found: list[tuple[float, str]] = []
    for name, values in columns:
        if not values.numel():
            continue
        size = values.abs().nan_to_num(nan=math.inf, posinf=math.inf).flatten()
        at = int(size.argmax())
        row = at // values.shape[1]
        found.append((float(size[at]), f"{name} = {float(values.flatten()[at]):.4g} (row {row + 1})"))
    found.sort(key=lambda pair: -pair[0])
    return tuple(text for _, text in found[:count])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no floating-point number among them is NaN or infinite; nothing is copied."""
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (math.isfinite(float(low)) and math.isfinite(float(high))):
                return False
    return True
