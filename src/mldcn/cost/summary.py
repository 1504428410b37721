"""A model's cost as plain data, for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mldcn import interactions
from mldcn.cost.flops import Work
from mldcn.cost.latency import Timings
from mldcn.cost.memory import Memory
from mldcn.cost.model import ModelCost, total
from mldcn.cost.target import Target


def options(target: Target) -> dict[str, Any]:
    """The interaction's name and options, every default spelled out."""
    return interactions.parse(target.model.interaction).model_dump(mode="json")


def summary(
    target: Target,
    cost: ModelCost,
    candidates: int,
    batch_sizes: Sequence[int],
    memory: Mapping[str, Memory] | None = None,
    timings: Timings | None = None,
) -> dict[str, Any]:
    """What was found of a model's cost.

    Args:
        target: the model.
        cost: its work, parameters and traffic.
        candidates: of the request whose work is told.
        batch_sizes: at which the bytes read are told.
        memory: ``estimated`` and ``measured``, in training.
        timings: in serving.
    """
    layout = target.x0()
    found: dict[str, Any] = {
        "model": {**target.model.model_dump(mode="json"), "interaction": options(target)},
        "x0": {"columns": layout.width, "fields": len(layout)},
        "tables": target.layout.tables,
        "assumed_tables": list(target.assumed),
        "flops_per_example": _flops(cost.example),
        "flops_per_request": {"candidates": candidates, **_flops(cost.request(candidates))},
        "parameters": {
            "tables": cost.table_parameters,
            **cost.parameters,
            "dense": sum(cost.parameters.values()),
        },
        "bytes_read_per_example": {str(size): cost.bytes_read(size) for size in batch_sizes},
    }
    if memory:
        found["training_memory"] = {
            "batch_size": target.training.batch_size,
            **{how: {**asdict(each), "peak": each.peak} for how, each in memory.items()},
        }
    if timings is not None:
        found["latency"] = asdict(timings)
    return found


def _flops(work: Mapping[str, Work]) -> dict[str, dict[str, int]]:
    parts = {**work, "total": total(dict(work))}
    return {name: {"gemm": each.gemm, "elementwise": each.elementwise} for name, each in parts.items()}
