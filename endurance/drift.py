"""Ten days of ads whose rates and interactions drift: is daily warm-started training as good as training anew?

Every day d from the second on is the next day's log of the models that were trained on the days before it: it is
scored before anything is trained on it. Policies:

- ``full``: trained from scratch each day, on all days before d.
- ``warm``: yesterday's model goes on with day d - 1 alone, as ``mldcn fit --warm-start`` does; variants keep the
  optimisers' state, refresh the numeric transforms, or go on with the last three days.
- ``never``: trained on day 1 and never again.

The newest tenth of the last day says when to stop, for every policy. Each seed has a world and models of its own.

    python endurance/drift.py                      # the committed setting, below 10 minutes on two cores
    python endurance/drift.py --rows 4000 --seeds 1 --out /tmp/drift
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import polars as pl

from mldcn.config import Config, dump_config, parse
from mldcn.data.prepare import prepare
from mldcn.datasets.pinads import PinadsConfig, pinads_config, write_days
from mldcn.files import write_text
from mldcn.run import RunFolder
from mldcn.training.fit import fit
from mldcn.training.warm_start import WarmStart
from mldcn.workflow import evaluate_log

TASK = "click"
BATCH = 256
HELD_OUT = 0.1  # of a day's rows, its newest, on which training is stopped
# How a day's model goes on from yesterday's, and with how many days; ``full`` and ``never`` start from nothing.
WARM: dict[str, tuple[dict[str, Any], int]] = {
    "warm": ({"statistics": "keep", "optimiser": "restart"}, 1),
    "warm, optimiser kept": ({"statistics": "keep", "optimiser": "keep"}, 1),
    "warm, statistics refreshed": ({"statistics": "refresh", "optimiser": "restart"}, 1),
    "warm, last three days": ({"statistics": "keep", "optimiser": "restart"}, 3),
}
POLICIES = ("full", *WARM, "never")


def world(seed: int, days: int, drift: float) -> PinadsConfig:
    """The ads: a tenth of what they depend on is new each day, by default, and so are some pins and users."""
    # The pins' own rates count as much as what they have in common with other pins.
    return PinadsConfig(
        seed=seed,
        days=days,
        num_users=4_000,
        num_items=1_500,
        new_items=0.6,
        new_users=0.4,
        drift=drift,
        weights={"identity": 0.6},
    )


def config(folder: Path, files: list[Path], seed: int, epochs: int) -> Config:
    """The model of every policy, on some days' files."""
    raw = pinads_config(folder)
    # The newest tenth of the last day, however many days there are.
    raw["data"] = {
        "train": [str(file) for file in files],
        "split": {"kind": "time", "valid": HELD_OUT / len(files), "test": 0.0},
    }
    raw["model"] = {
        "embedding": {"dim": 8},
        "interaction": {"name": "mldcn", "num_layers": 2, "rank": 32},
        "deep": {"hidden": [64]},
    }
    raw["training"] = {
        "seed": seed,
        "threads": 1,
        "batch_size": BATCH,
        "epochs": epochs,
        "patience": 1,
        "monitor": f"{TASK}/auc",
        "keep_optimiser": True,
        "optimiser": {"table_lr": 3e-3, "table_l2": 1e-5},
    }
    return parse(Config, raw, "endurance/drift.py")


class Policies:
    """All policies on one world, day by day."""

    def __init__(self, home: Path, seed: int, options: argparse.Namespace) -> None:
        self.home, self.seed, self.options = home, seed, options
        self.told = write_days(
            home / "log", options.rows * options.days, world(seed, options.days, options.drift)
        )
        self.files = [home / "log" / f"day-{day:02}.parquet" for day in range(1, options.days + 1)]
        self.days: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """A row a policy and day: AUC on that day, and what training before it cost."""
        first, cost = self._train("day-01-first", self.files[:1], self.options.epochs)
        runs = dict.fromkeys(POLICIES, first)
        costs = dict.fromkeys(POLICIES, cost)
        for day in range(2, self.options.days + 1):
            for policy in POLICIES if day > 2 else ():
                name = f"day-{day:02}-{policy.replace(', ', '-').replace(' ', '-')}"
                costs[policy] = {"rows": 0, "seconds": 0.0}
                if policy == "full":
                    everything = self.files[: day - 1]
                    runs[policy], costs[policy] = self._train(name, everything, self.options.epochs)
                elif policy in WARM:
                    how, window = WARM[policy]
                    start = WarmStart.open(runs[policy].path, **how)
                    newest = self.files[max(0, day - 1 - window) : day - 1]
                    runs[policy], costs[policy] = self._train(name, newest, self.options.warm_epochs, start)
            for policy in POLICIES:
                # On day 2 all policies have the one model of day 1.
                same = runs[policy] is first and policy != POLICIES[0]
                auc = self.days[-1]["auc"] if same and day == 2 else self._auc(runs[policy], day)
                self.days.append(
                    {"seed": self.seed, "day": day, "policy": policy, "auc": auc, **costs[policy]}
                )
            self._attainable(day)
        return self.days

    def _train(
        self, name: str, files: list[Path], epochs: int, start: WarmStart | None = None
    ) -> tuple[RunFolder, dict[str, Any]]:
        wanted = config(self.home / "log", files, self.seed, epochs)
        begun = time.process_time()
        base, statistics = None, "keep"
        if start is not None:
            wanted, base, statistics = start.adapt(wanted), start.encoder(), start.statistics
        run = RunFolder.create(self.home / "runs" / name, dump_config(wanted))
        data = prepare(wanted, self.home / "encoded" / name, base=base, statistics=statistics)
        summary = fit(wanted, run, data, warm_start=start)
        seconds = time.process_time() - begun
        rows = run.info()["rows"]["train"]
        passes = summary.steps / math.ceil(rows / BATCH)
        return run, {"rows": round(passes * rows), "seconds": round(seconds, 2)}

    def _auc(self, run: RunFolder, day: int) -> float:
        return evaluate_log(run, [str(self.files[day - 1])]).metrics[TASK]["auc"]

    def _attainable(self, day: int) -> None:
        """What the true probabilities score on the day, and how many of its rows show a pin of that day's."""
        known = set(
            pl.concat([pl.read_parquet(f, columns=["pin_id"]) for f in self.files[: day - 1]])["pin_id"]
        )
        pins = pl.read_parquet(self.files[day - 1], columns=["pin_id"])["pin_id"]
        new = sum(pin not in known for pin in pins) / len(pins)
        best = self.told["bayes"][f"day-{day:02}"][TASK]["auc_on_labels"]
        facts = {"seed": self.seed, "day": day, "policy": "truth", "auc": best, "new_pins": round(new, 4)}
        self.days.append(facts)


def one_seed(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All policies on one world, in a folder that is removed."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mldcn-drift-", dir=options.work) as home:
        return Policies(Path(home), seed, options).run()


def summarise(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Means over seeds by day, differences to full retraining seed by seed, and costs."""
    seeds = sorted({row["seed"] for row in rows})
    days = range(2, options.days + 1)
    at = {(row["seed"], row["policy"], row["day"]): row for row in rows}

    def mean_auc(seed: int, policy: str) -> float:
        # Day 2 is the same model for all.
        return statistics.fmean(at[seed, policy, day]["auc"] for day in days if day > 2)

    told: dict[str, Any] = {}
    for policy in (*POLICIES, "truth"):
        means = [mean_auc(seed, policy) for seed in seeds]
        against = [mean - mean_auc(seed, "full") for mean, seed in zip(means, seeds, strict=True)]
        told[policy] = {
            "auc_by_day": {day: _spread([at[seed, policy, day]["auc"] for seed in seeds]) for day in days},
            "auc": _spread(means),
            "minus_full": _spread(against),
        }
        if policy != "truth":
            for cost in ("rows", "seconds"):
                total = [sum(at[seed, policy, day][cost] for day in days if day > 2) for seed in seeds]
                told[policy][cost] = round(statistics.fmean(total), 1)
    new = {
        day: round(statistics.fmean(at[seed, "truth", day]["new_pins"] for seed in seeds), 4) for day in days
    }
    return {"policies": told, "share_of_rows_with_a_new_pin": new}


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "by_seed": values}


def markdown(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The tables for people."""
    policies = found["policies"]
    days = range(2, options.days + 1)
    lines = [
        f"Click AUC on each day before it is trained on, mean of {len(options.seeds)} seeds; "
        f"{options.rows:,} impressions a day, drift {options.drift:g} a day.",
        "",
        "| policy | " + " | ".join(f"day {day}" for day in days) + " |",
        "|---|" + "---|" * len(days),
    ]
    for policy, told in policies.items():
        lines.append(
            f"| {policy} | " + " | ".join(f"{told['auc_by_day'][day]['mean']:.4f}" for day in days) + " |"
        )
    new = found["share_of_rows_with_a_new_pin"]
    lines += [
        "| *rows with a pin never shown before* | " + " | ".join(f"{new[day]:.1%}" for day in days) + " |"
    ]
    lines += [
        "",
        f"Days 3 to {options.days} together (± is the deviation over seeds; cost is that of all days' training).",
        "",
        "| policy | mean AUC | minus full | rows trained | processor seconds |",
        "|---|---|---|---|---|",
    ]
    for policy, told in policies.items():
        cells = [_with_spread(told["auc"], ".4f")]
        cells.append("–" if policy == "full" else _with_spread(told["minus_full"], "+.4f"))
        cells += [f"{told[cost]:,.0f}" if cost in told else "–" for cost in ("rows", "seconds")]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _with_spread(spread: dict[str, Any], digits: str) -> str:
    text = format(spread["mean"], digits)
    return text if spread["sd"] is None else f"{text} ± {spread['sd']:.4f}"


def main() -> None:
    """Reads the options, runs the seeds side by side, writes ``drift.json`` and ``drift.md``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=12_000, help="impressions a day")
    parser.add_argument("--days", type=int, default=10)
    parser.add_argument("--drift", type=float, default=0.1, help="share of the truth that is new each day")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--epochs", type=int, default=6, help="at most, from scratch")
    parser.add_argument("--warm-epochs", type=int, default=2, help="at most, of a warm-started day")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at the same time, a thread each")
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    begun, rows = time.time(), []
    # Processes are started afresh: a forked one would inherit the parent's thread pools.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(one_seed, seed, options): seed for seed in options.seeds}
        for future in as_completed(running):
            rows += future.result()
            print(f"seed {running[future]} done, {time.time() - begun:.0f} s", file=sys.stderr)
    found = summarise(rows, options)
    setting = {
        name: getattr(options, name) for name in ("rows", "days", "drift", "seeds", "epochs", "warm_epochs")
    }
    text = markdown(found, options)
    write_text(options.out / "drift.json", json.dumps({"setting": setting, **found}, indent=1) + "\n")
    write_text(options.out / "drift.md", text)
    print(text)


if __name__ == "__main__":
    main()
