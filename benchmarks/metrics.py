"""AUC and log loss on many rows against scikit-learn, both sides in turn on the same data.

Run: OMP_NUM_THREADS=2 python benchmarks/metrics.py [--rows 10000000] [--repeats 5] [--clock wall|cpu]

The cpu clock, the process's own time, is for a machine that is busy with other things too.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import sklearn
from sklearn.metrics import log_loss, roc_auc_score

from mldcn.metrics import auc, logloss

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(call: Callable[[], float], clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds and value of a call."""
    start = clock()
    value = float(call())
    return clock() - start, value


def spread(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def main() -> None:
    """Prints one line a metric and type of scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()

    generator = np.random.default_rng(0)
    # A click rate of some 7 %, probabilities as a sigmoid gives them.
    scores = 1 / (1 + np.exp(-(generator.normal(size=arguments.rows) - 3)))
    labels = (generator.random(arguments.rows) < scores).astype(np.int8)
    weights = generator.random(arguments.rows).astype(np.float32)
    single = scores.astype(np.float32)
    # scikit-learn would compute the log loss of float32 in float32: it gets the same values as float64.
    double = single.astype(np.float64)
    cases: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "auc, float64": (lambda: auc(labels, scores), lambda: roc_auc_score(labels, scores)),
        "auc, float32": (lambda: auc(labels, single), lambda: roc_auc_score(labels, single)),
        "auc, float32, weighted": (
            lambda: auc(labels, single, weights),
            lambda: roc_auc_score(labels, single, sample_weight=weights),
        ),
        "logloss, float64": (lambda: logloss(labels, scores), lambda: log_loss(labels, scores)),
        "logloss, float32": (lambda: logloss(labels, single), lambda: log_loss(labels, double)),
    }
    print(
        f"{arguments.rows:,} rows, {arguments.repeats} repeats, {arguments.clock} seconds: median (range); "
        f"NumPy {np.__version__}, scikit-learn {sklearn.__version__}, {platform.machine()}"
    )
    for name, sides in cases.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        values = [0.0, 0.0]
        for _ in range(arguments.repeats):
            for side, call in enumerate(sides):
                elapsed, values[side] = timed(call, CLOCKS[arguments.clock])
                seconds[side].append(elapsed)
        ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
        print(
            f"{name:24}  mldcn {spread(seconds[0])}  scikit-learn {spread(seconds[1])}  "
            f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})  "
            f"difference {abs(values[0] - values[1]):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
