"""``mldcn demo``: the whole job on a synthetic ads log, in a few minutes on two cores."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mldcn.config import Config, parse
from mldcn.console import EncodingProgress, FitProgress, err, number, out, table
from mldcn.cost.budget import match_flops, scorer_flops, x0_layout
from mldcn.data.prepare import prepare
from mldcn.datasets.pinads import PinadsConfig, pinads_config, write_log
from mldcn.errors import UserError
from mldcn.files import write_text
from mldcn.metrics import Difference
from mldcn.report import comparison_page
from mldcn.run import RunFolder
from mldcn.training.fit import Summary
from mldcn.training.identity import monitored
from mldcn.workflow import REPORT, check, compare, encoded_folder, run_summary, train

# ML-DCN's width sets the budget; the rivals' knobs are turned until they cost as much.
REFERENCE = "mldcn"
SMALLEST = 1000
MODELS: dict[str, dict[str, Any]] = {
    "mldcn": {"name": "mldcn", "num_layers": 3, "rank": 48},
    "dcnv2": {"name": "dcnv2", "num_layers": 2},
    "dcnv2_lowrank": {"name": "dcnv2_lowrank", "num_layers": 3},
    "masknet_parallel": {"name": "masknet_parallel", "num_blocks": 2, "reduction_ratio": 0.25},
    "dnn": {"name": "dnn", "hidden": [256, 128]},
}


@dataclass(frozen=True)
class Entry:
    """One model's run."""

    name: str
    run: RunFolder
    config: Config
    summary: Summary


def run_demo(folder: Path, rows: int, seed: int) -> None:
    """Generates the log, trains every model at one FLOPs budget, compares them and writes the report.

    Args:
        folder: for the log, the encoded rows, the runs and the report.
        rows: impressions to generate.
        seed: of the log and of the models.
    """
    if rows < SMALLEST:
        raise UserError(f"--rows {rows}: at least {SMALLEST:,} are needed to train, validate and test")
    started = time.perf_counter()
    log = folder / "log"
    err.print(f"generating {rows:,} ad impressions in {log}")
    write_log(log, rows, PinadsConfig(seed=seed))
    truth = json.loads((log / "truth.json").read_text(encoding="utf-8"))
    base = demo_config(log, seed)
    check(base)
    progress = EncodingProgress()
    data = prepare(base, encoded_folder(base, folder / "runs" / REFERENCE), progress)
    progress.close()
    layout = x0_layout(base.model, base.log_schema, data.encoder.layout)
    tasks = data.encoder.layout.tasks
    budget = scorer_flops(base.model, layout, tasks)
    err.print(f"x0 has {layout.width} columns; every model costs about {budget:,} FLOPs an impression")
    entries = []
    for name, interaction in MODELS.items():
        model = base.model.model_copy(update={"interaction": dict(interaction)})
        model = match_flops(model, layout, tasks, budget)
        config = base.model_copy(update={"model": base.model if name == REFERENCE else model})
        run = RunFolder(folder / "runs" / name)
        watcher = FitProgress(monitored(config), name)
        try:
            entries.append(Entry(name, run, config, train(config, run, overwrite=True, observers=[watcher])))
        finally:
            watcher.close()
    _show(folder, entries, truth["bayes"]["newest_tenth"], rows, time.perf_counter() - started)


def demo_config(log: Path, seed: int) -> Config:
    """The config of the reference model on the demo's log."""
    raw = pinads_config(log)
    raw["model"] = {"embedding": {"dim": 8}, "interaction": MODELS[REFERENCE], "deep": {"hidden": [64]}}
    raw["training"] = {
        "seed": seed,
        "batch_size": 1024,
        "epochs": 6,
        "patience": 1,
        "monitor": "click/auc",
        "optimiser": {"table_lr": 3e-3, "table_l2": 1e-5},
    }
    return parse(Config, raw, "demo")


def _show(folder: Path, entries: list[Entry], bayes: dict[str, Any], rows: int, seconds: float) -> None:
    task = entries[0].config.log_schema.tasks[0]
    best = bayes[task]["auc_on_labels"]
    shown, summaries = [], []
    for entry in entries:
        test = entry.summary.metrics["test"][task]
        differences: dict[str, Difference] = {}
        text = "reference"
        if entry.name != REFERENCE:
            comparison = compare(entries[0].run.path, entry.run.path, repeats=200)
            aucs = [(t, d) for t, m, d in comparison.differences if m == "auc" and d.method != "DeLong"]
            differences = dict(aucs)
            difference = differences[task]
            text = f"{difference.delta:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        share = (test["auc"] - 0.5) / (best - 0.5)
        cost = entry.summary.flops
        flops = sum(cost.values()) - cost["embedding"]
        row = [entry.name, f"{flops:,}", number(test["auc"]), text, f"{share:.1%}"]
        shown.append(
            [*row, number(test["logloss"]), number(test["calibration"], 3), f"{entry.summary.seconds:.0f}"]
        )
        summaries.append(run_summary(entry.name, entry.run, differences))
    columns = [
        "model",
        "FLOPs",
        "AUC",
        f"against {REFERENCE} [95 %]",
        "of attainable",
        "log loss",
        "calibration",
        "s",
    ]
    table(f"{task}, newest tenth of {rows:,} impressions; attainable AUC {best:.4f}", columns, shown)
    page = comparison_page(
        "ML-DCN and its closest rivals at equal FLOPs",
        summaries,
        reference=REFERENCE,
        attainable={
            t: {"auc": v["auc_on_labels"], "logloss": v["logloss_on_labels"]} for t, v in bayes.items()
        },
        protocol=_protocol(rows, entries),
        next_steps=[("Train on a log of your own", "mldcn init YOUR_LOG && mldcn fit mldcn.yaml")],
    )
    page.write_files(folder)
    page.write(folder / REPORT)
    write_text(folder / "mldcn.yaml", entries[0].run.config.read_text(encoding="utf-8"))
    out.print(
        f"report: {folder / REPORT}   ({seconds:.0f} s in all)\n"
        "next, with a log of your own (CSV, TSV or Parquet, a row an impression):\n"
        "  .venv/bin/mldcn init YOUR_LOG && .venv/bin/mldcn fit mldcn.yaml",
        markup=False,
    )


def _protocol(rows: int, entries: list[Entry]) -> str:
    schema = entries[0].config.log_schema
    return (
        f"{rows:,} synthetic impressions (pinads), split by time: the newest tenth is the test, the tenth "
        f"before it chose when to stop. {len(schema.features)} features; one seed; one setting for all "
        "models; nothing was tuned here. Intervals: bootstrap over users of one pair of models, so they hold "
        "the noise of the test rows and not that of other seeds."
    )
