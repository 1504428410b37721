"""Rows a second of encoding a Criteo-shaped CSV (13 numbers, 26 ids), beside Polars only parsing it.

Usage: python benchmarks/encode.py [rows] [repeats]
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from mldcn.config import Config, parse
from mldcn.data.prepare import prepare

CARDINALITIES = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000)


def write_log(path: Path, rows: int) -> None:
    """Counters with heavy tails and gaps; ids of 8 hexadecimal digits, a few of them frequent."""
    draw = np.random.default_rng(0)
    columns: dict[str, object] = {"label": (draw.random(rows) < 0.22).astype(int)}
    for i in range(13):
        numbers = pl.Series(np.exp(draw.normal(2, 2, rows)).astype(int))
        columns[f"I{i + 1}"] = numbers.set(pl.Series(draw.random(rows) < 0.2), None)
    for i in range(26):
        size = CARDINALITIES[i % len(CARDINALITIES)]
        rank = np.minimum(draw.pareto(0.8, rows) * (size / 50 + 1), size - 1).astype(np.uint64)
        ids = (rank * np.uint64(2_654_435_761) + np.uint64(977 * i)) % np.uint64(2**32)
        columns[f"C{i + 1}"] = [f"{number:08x}" for number in ids.tolist()]
    pl.DataFrame(columns).write_csv(path)


def criteo_config(path: Path) -> Config:
    """All 39 columns, split at random."""
    numbers = [{"kind": "numeric", "name": f"I{i}", "transform": "signed_log"} for i in range(1, 14)]
    ids = [{"kind": "categorical", "name": f"C{i}"} for i in range(1, 27)]
    schema = {"features": numbers + ids, "labels": [{"name": "label"}]}
    return parse(Config, {"data": {"train": [str(path)]}, "schema": schema}, "benchmark")


def timed(name: str, rows: int, repeats: int, work: Callable[[int], object]) -> None:
    """Prints median and range of rows a wall second, and rows a second of processor time."""
    wall, processor = [], []
    for number in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        work(number)
        wall.append(rows / (time.perf_counter() - start))
        processor.append(rows / (time.process_time() - used))
    print(
        f"{name}: {statistics.median(wall):,.0f} rows/s ({min(wall):,.0f} to {max(wall):,.0f}); "
        f"{statistics.median(processor):,.0f} a second of one core"
    )


def main() -> None:
    """Times both on one file."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        write_log(log, rows)
        config = criteo_config(log)
        timed("polars, parsing only", rows, repeats, lambda _: pl.read_csv(log, infer_schema=False))
        timed(
            "mldcn, encoding", rows, repeats, lambda number: prepare(config, Path(folder) / f"out-{number}")
        )


if __name__ == "__main__":
    main()
