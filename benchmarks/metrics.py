"""AUC and log loss on many rows against scikit-learn, on the same data, in processes that take turns.

Usage: python benchmarks/metrics.py [--rows 10000000] [--rounds 5] [--clock wall|cpu]

The cpu clock, the process's own time, is for a machine that is busy with other things too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from turns import Result, Side, alternate, machine, report, serve, shown, spread

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIDES = ("mldcn", "scikit-learn")


def cases(side: str, rows: int) -> dict[str, Callable[[], float]]:
    """What is computed, on a click rate of some 7 % and probabilities as a sigmoid gives them."""
    generator = np.random.default_rng(0)
    scores = 1 / (1 + np.exp(-(generator.normal(size=rows) - 3)))
    labels = (generator.random(rows) < scores).astype(np.int8)
    weights = generator.random(rows).astype(np.float32)
    single = scores.astype(np.float32)
    if side == "mldcn":
        from mldcn.metrics import auc, logloss

        return {
            "auc, float64": lambda: auc(labels, scores),
            "auc, float32": lambda: auc(labels, single),
            "auc, float32, weighted": lambda: auc(labels, single, weights),
            "logloss, float64": lambda: logloss(labels, scores),
            "logloss, float32": lambda: logloss(labels, single),
        }
    from sklearn.metrics import log_loss, roc_auc_score

    # scikit-learn would compute the log loss of float32 in float32: it gets the same values as float64.
    double = single.astype(np.float64)
    return {
        "auc, float64": lambda: float(roc_auc_score(labels, scores)),
        "auc, float32": lambda: float(roc_auc_score(labels, single)),
        "auc, float32, weighted": lambda: float(roc_auc_score(labels, single, sample_weight=weights)),
        "logloss, float64": lambda: float(log_loss(labels, scores)),
        "logloss, float32": lambda: float(log_loss(labels, double)),
    }


def work(side: str, rows: int, clock: Callable[[], float]) -> Callable[[], Result]:
    """A turn: seconds and value of every case."""
    calls = cases(side, rows)

    def turn() -> Result:
        found = {}
        for name, call in calls.items():
            start = clock()
            value = call()
            found[name] = {"seconds": clock() - start, "value": value}
        return found

    return turn


def measure(rows: int, rounds: int, clock: str, threads: int) -> Result:
    """Starts the sides and compares their turns."""
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            Side(
                side,
                ["metrics.py", "--side", side, "--rows", rows, "--clock", clock],
                threads,
                Path(folder) / side,
            )
            for side in SIDES
        ]
        results = alternate(sides, rounds, warm=0)
        for side in sides:
            side.close()
    found: Result = {
        "machine": machine(threads),
        "rows": rows,
        "clock": clock,
        "versions": {side.name: side.about for side in sides},
        "cases": {},
    }
    for name in results["mldcn"][0]:
        ours, theirs = ([turn[name] for turn in results[side]] for side in SIDES)
        pairs = list(zip(ours, theirs, strict=True))
        found["cases"][name] = {
            "mldcn_seconds": spread([turn["seconds"] for turn in ours]),
            "scikit-learn_seconds": spread([turn["seconds"] for turn in theirs]),
            "ratio": spread([b["seconds"] / a["seconds"] for a, b in pairs]),
            "difference": max(abs(a["value"] - b["value"]) for a, b in pairs),
        }
    return found


def main() -> None:
    """Prints one line a metric and type of scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        about = {options.side: version(options.side), "numpy": version("numpy")}
        serve(about, work(options.side, options.rows, CLOCKS[options.clock]))
        return
    found = measure(options.rows, options.rounds, options.clock, options.threads)
    print(f"{found['rows']:,} rows, {found['clock']} seconds; {found['machine']}; {found['versions']}")
    for name, case in found["cases"].items():
        print(
            f"{name:24} mldcn {shown(case['mldcn_seconds'], 3)}  scikit-learn "
            f"{shown(case['scikit-learn_seconds'], 3)}  {shown(case['ratio'], 1)}x  "
            f"difference {case['difference']:.1e}"
        )
    report(found, options.json)


if __name__ == "__main__":
    main()
