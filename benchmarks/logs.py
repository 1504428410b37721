"""The log of the benchmarks: Criteo-shaped, 13 counters and 26 ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mldcn.config import Config, parse

NUMBERS = [f"I{i}" for i in range(1, 14)]
IDS = [f"C{i}" for i in range(1, 27)]
# 500,000 rows hold some 650,000 distinct ids.
CARDINALITIES = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 200_000, 600_000)


def write_log(path: Path, rows: int) -> None:
    """Counters with heavy tails and gaps; ids of 8 hexadecimal digits, a few of them frequent."""
    draw = np.random.default_rng(0)
    columns: dict[str, object] = {"label": (draw.random(rows) < 0.22).astype(int)}
    for name in NUMBERS:
        numbers = pl.Series(np.exp(draw.normal(2, 2, rows)).astype(int))
        columns[name] = numbers.set(pl.Series(draw.random(rows) < 0.2), None)
    for i, name in enumerate(IDS):
        size = CARDINALITIES[i % len(CARDINALITIES)]
        rank = np.minimum(draw.pareto(0.8, rows) * (size / 20 + 1), size - 1).astype(np.uint64)
        ids = (rank * np.uint64(2_654_435_761) + np.uint64(977 * i)) % np.uint64(2**32)
        columns[name] = [f"{number:08x}" for number in ids.tolist()]
    pl.DataFrame(columns).write_csv(path)


def config(path: Path, *, all_ids: bool, threads: int | None = None, batch: int = 4096) -> Config:
    """All 39 columns, every row a training row; with ``all_ids`` the counters' values are ids too.

    The model is DCN-V2: 3 full-rank cross layers beside an MLP of 400 and 400.
    """
    number = {"kind": "categorical"} if all_ids else {"kind": "numeric", "transform": "signed_log"}
    features: list[dict[str, Any]] = [{"name": name, **number} for name in NUMBERS]
    features += [{"name": name, "kind": "categorical"} for name in IDS]
    raw = {
        "data": {"train": [str(path)], "split": {"kind": "hash", "valid": 0.0, "test": 0.0}},
        "schema": {"features": features, "labels": [{"name": "label"}]},
        "model": {
            "embedding": {"dim": 16},
            "interaction": {"name": "dcnv2", "num_layers": 3},
            "deep": {"hidden": [400, 400], "structure": "parallel"},
        },
        "training": {"batch_size": batch, "threads": threads, "epochs": 1, "checkpoint_minutes": 1e6},
    }
    return parse(Config, raw, "benchmark")
