"""Runs as a report gets them."""

from __future__ import annotations

import numpy as np

from mldcn.report import Bins, Difference, RunSummary

HOSTILE = "<script>alert('x')</script> & \"$x_1$\" | `_a_` \x00\x1b"


def make_run(
    i: int, *, name: str = "", tasks: tuple[str, ...] = ("click",), difference: float | None = None
) -> RunSummary:
    auc = 0.74 - 0.001 * i
    predicted = np.geomspace(0.002, 0.3, 8)
    observed = predicted * (1 + 0.1 * (-1) ** i)
    observed[0] = 0.0
    return RunSummary(
        name=name or f"model {i}",
        options="rank 64",
        metrics={
            task: {"auc": auc, "logloss": 0.14 + 0.001 * i, "ne": 0.91, "calibration": 1.01} for task in tasks
        },
        valid_metrics={task: {"auc": auc + 0.002, "logloss": 0.139} for task in tasks},
        flops=131_000.0,  # the same for all, as in a study at a matched budget
        dense_params=90_000 + i,
        embedding_params=4_300_000,
        seconds=75.0,
        rows_per_second=80_000.0,
        intervals=dict.fromkeys(tasks, (auc - 0.002, auc + 0.002)),
        history=[
            (step, {task: {"auc": auc - 50 / step} for task in tasks}) for step in range(500, 3000, 500)
        ],
        reliability={task: Bins(predicted.tolist(), observed.tolist(), [100.0] * 8) for task in tasks},
        differences={}
        if difference is None
        else {task: Difference(difference, difference - 0.001, difference + 0.001, 0.04) for task in tasks},
        config="model:\n  interaction: {name: dnn}\n",
    )
