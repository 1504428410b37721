"""What the block shuffle is worth beside a full shuffle, on logs sorted by label and by day.

``EncodedRows.batches`` shuffles rows within windows made of chunks (see ``mldcn/data/shards.py``). A window holds
a million rows, so that a test on many windows wants many million rows; here chunks and windows are smaller by a
factor of 128, and so is the batch, so that all that matters keeps its ratio: a window of 256 chunks, many windows
a log, more than a hundred batches a window. A second, coarse setting has only two chunks a window.

Two things are measured. The order: how batch means of the label vary against binomial expectation, and where
rows and neighbours end up. The training: test AUC and log loss after an epoch over the sorted log, block against
full shuffle, paired by seed.

    python endurance/shuffle.py                          # writes docs/results/shuffle.json
    python endurance/shuffle.py --seeds 4 --rows 60000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import markdown

BATCH = 64
ORDERS = ("label", "day")


@dataclass(frozen=True)
class Setting:
    """Rows of a chunk and of a window."""

    name: str
    chunk: int
    window: int

    def apply(self) -> None:
        """Makes it this process's shuffle."""
        from mldcn.data import shards

        shards.CHUNK_ROWS, shards.WINDOW_ROWS = self.chunk, self.window


FULL = Setting("full", 32, 1 << 40)
BLOCK = Setting("block", 32, 256 * 32)
COARSE = Setting("coarse", 4096, 2 * 4096)
SETTINGS = (FULL, BLOCK, COARSE)


def write_sorted_logs(work: Path, rows: int) -> None:
    """A ``pinads`` log whose training rows lie sorted by click, and by day; validation and test rows apart."""
    import polars as pl

    from mldcn.datasets.pinads import write_log

    write_log(work / "log", rows)
    log = pl.read_parquet(work / "log" / "pinads.parquet").with_row_index("row")
    # Days, and within one what comes first is the click: time itself would leave each batch a moment.
    place = pl.col("row").hash(seed=1) % 10
    train = log.filter(place > 1)
    parts = {
        "label": train.sort("click", "row"),
        "day": train.sort(pl.col("timestamp") // 86_400, "click", "row"),
        "valid": log.filter(place == 1),
        "test": log.filter(place == 0),
    }
    for name, part in parts.items():
        part.drop("row").write_parquet(work / f"{name}.parquet")


def config_of(work: Path, order: str, seed: int) -> Any:
    """A small model of the click, trained for one epoch."""
    from mldcn.config import Config, parse
    from mldcn.datasets.pinads import pinads_config

    raw = pinads_config(work)
    raw["data"] = {
        "split": {"kind": "files"},
        "train": [str(work / f"{order}.parquet")],
        "valid": [str(work / "valid.parquet")],
        "test": [str(work / "test.parquet")],
        "encoded": str(work / f"encoded-{order}"),
    }
    raw["schema"]["labels"] = [{"name": "click"}]
    # Sequences and vectors would only cost time.
    kinds = ("categorical", "numeric", "bucketised")
    raw["schema"]["features"] = [f for f in raw["schema"]["features"] if f["kind"] in kinds]
    raw["model"] = {
        "embedding": {"dim": 4},
        "interaction": {"name": "mldcn", "num_layers": 2, "rank": 16},
        "deep": {"hidden": [32]},
    }
    raw["training"] = {
        "seed": seed,
        "threads": 1,
        "device": "cpu",
        "epochs": 1,
        "batch_size": BATCH,
        "optimiser": {"lr": 0.004, "schedule": "cosine"},
    }
    return parse(Config, raw, "shuffle")


def train(job: tuple[Path, str, Setting, int]) -> dict[str, Any]:
    """One run; gives its test metrics."""
    from mldcn.data.prepare import prepare
    from mldcn.run import RunFolder
    from mldcn.training.fit import fit

    work, order, setting, seed = job
    setting.apply()
    config = config_of(work, order, seed)
    folder = work / "runs" / f"{order}-{setting.name}-{seed}"
    data = prepare(config, work / f"encoded-{order}")
    metrics = fit(config, RunFolder.create(folder), data).metrics["test"]["click"]
    shutil.rmtree(folder)
    named = {name: metrics[name] for name in ("auc", "logloss", "calibration")}
    return {"order": order, "setting": setting.name, "seed": seed, **named}


def order_statistics(work: Path, order: str, setting: Setting, epochs: int) -> dict[str, Any]:
    """Direct statistics of the order in which rows come; what a full shuffle is expected to give beside them.

    ``variance``: of the batch means of the label, over its binomial expectation (1). ``drift``: the same of the
    means of 64 batches in a row. ``displacement``: the mean distance between a row's place in the log and in
    the epoch, as a share of the log (1/3). ``neighbours``: how often the next row of the log falls into the
    same batch, over chance (1).
    """
    from mldcn.data.prepare import prepare

    setting.apply()
    rows = prepare(config_of(work, order, 0), work / f"encoded-{order}").train
    labels = rows.labels[:, 0]
    count = len(rows) // BATCH * BATCH
    rate, found = float(labels.mean()), []
    # The request's number and the position make a row known again, as the encoded rows hold no row number.
    for epoch in range(epochs):
        taken = _places(rows, setting, epoch)[:count]
        batches = labels[taken].reshape(-1, BATCH).mean(axis=1)
        runs = batches[: len(batches) // 64 * 64].reshape(-1, 64).mean(axis=1)
        expected = rate * (1 - rate) / BATCH
        batch_of = np.full(len(rows), -1)
        batch_of[taken] = np.arange(count) // BATCH
        together = np.mean((batch_of[1:] == batch_of[:-1]) & (batch_of[1:] >= 0))
        found.append(
            {
                "variance": float(batches.var() / expected),
                "drift": float(runs.var() / (expected / 64)),
                "displacement": float(np.abs(taken - np.arange(count)).mean() / len(rows)),
                "neighbours": float(together / (BATCH / len(rows))),
            }
        )
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return {"order": order, "setting": setting.name, "epochs": epochs, **means}


def _places(rows: Any, setting: Setting, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The places in the log of an epoch's rows, one after the other."""
    places = [
        np.asarray(batch.position.numpy(), np.int64)
        for batch in numbered(rows).batches(BATCH, shuffle=True, seed=0, epoch=epoch)
    ]
    return np.concatenate(places)


def numbered(rows: Any) -> Any:
    """The same rows with the row's number in ``position``, so that a batch says where its rows lay."""
    from dataclasses import replace

    from mldcn.data.encoder import EncodedBlock
    from mldcn.data.shards import EncodedRows, ShardWriter

    folder = rows.folder.parent.parent / f"numbered-{rows.folder.parent.name}"
    if not folder.exists():
        size = len(rows)
        layout = replace(rows.layout, ids=(), dense=())
        empty = np.zeros((size, 0), np.float32)
        block = EncodedBlock(
            ids=empty.astype(np.int32),
            dense=empty,
            labels=np.zeros((size, len(layout.tasks)), np.float32),
            weight=np.ones(size, np.float32),
            position=np.arange(size, dtype=np.int32),
            request=np.zeros(size, np.int64),
            user=np.zeros(size, np.int64),
            time=np.zeros(size),
        )
        with ShardWriter(folder, layout) as writer:
            writer.write(block)
    return EncodedRows(folder)


def compared(trained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each order's and setting's difference from the full shuffle, paired by seed, with 95 % t-intervals."""
    from scipy import stats

    rows = []
    for order in ORDERS:
        for setting in SETTINGS[1:]:
            for metric in ("auc", "logloss"):
                of = {
                    name: np.array(
                        [t[metric] for t in trained if (t["order"], t["setting"]) == (order, name)]
                    )
                    for name in (FULL.name, setting.name)
                }
                difference = of[setting.name] - of[FULL.name]
                seeds = len(difference)
                half = stats.t.ppf(0.975, seeds - 1) * difference.std(ddof=1) / np.sqrt(seeds)
                rows.append(
                    {
                        "order": order,
                        "setting": setting.name,
                        "metric": metric,
                        "full": float(of[FULL.name].mean()),
                        "seed_deviation": float(of[FULL.name].std(ddof=1)),
                        "difference": float(difference.mean()),
                        "low": float(difference.mean() - half),
                        "high": float(difference.mean() + half),
                        "seeds": seeds,
                    }
                )
    return rows


def check(work: Path, *, rows: int, seeds: int, epochs: int, jobs: int) -> dict[str, Any]:
    """Measures everything.

    Args:
        work: an empty folder.
        rows: of the log.
        seeds: runs of each order and setting; 0 trains none.
        epochs: over which the statistics of the order are averaged.
        jobs: runs at the same time.
    """
    from mldcn.data.prepare import prepare

    write_sorted_logs(work, rows)
    for order in ORDERS:
        prepare(config_of(work, order, 0), work / f"encoded-{order}")
    order_rows = [order_statistics(work, order, s, epochs) for order in ORDERS for s in SETTINGS]
    planned = [(work, order, s, seed) for seed in range(seeds) for order in ORDERS for s in SETTINGS]
    # Fresh processes: forked ones would inherit this one's thread pools.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        trained = list(pool.map(train, planned))
    return {
        "rows": rows,
        "batch": BATCH,
        "settings": [asdict(setting) for setting in SETTINGS],
        "order": order_rows,
        "training": compared(trained) if seeds > 1 else [],
        "runs": trained,
    }


def show(found: dict[str, Any]) -> str:
    """Two Markdown tables."""
    order = [
        [
            r["order"],
            r["setting"],
            *(f"{r[n]:.2f}" for n in ("variance", "drift")),
            f"{r['displacement']:.3f}",
            f"{r['neighbours']:.1f}",
        ]
        for r in found["order"]
    ]
    header = [
        "sorted by",
        "shuffle",
        "variance of batch means",
        "of 64 batches' means",
        "displacement",
        "neighbours",
    ]
    trained = [
        [
            r["order"],
            r["setting"],
            r["metric"],
            f"{r['full']:.5f}",
            f"{r['seed_deviation']:.5f}",
            f"{r['difference']:+.5f}",
            f"[{r['low']:+.5f}, {r['high']:+.5f}]",
        ]
        for r in found["training"]
    ]
    names = [
        "sorted by",
        "shuffle",
        "test metric",
        "full shuffle",
        "its seeds' deviation",
        "difference",
        "95 % interval",
    ]
    return markdown(header, order) + "\n\n" + markdown(names, trained)


def main() -> int:
    """Prints the tables and writes the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000, help="impressions in the log")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5, help="for the statistics of the order")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("docs/results/shuffle.json"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mldcn-shuffle-") as folder:
        found = check(
            Path(folder), rows=options.rows, seeds=options.seeds, epochs=options.epochs, jobs=options.jobs
        )
    found["seconds"] = round(time.perf_counter() - begun, 1)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(show(found))
    print(f"\nwrote {options.out}; {found['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
