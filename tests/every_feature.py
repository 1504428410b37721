"""A log with every kind of feature, and finished runs of any model on it, made without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mldcn.config import Config, dump_config, parse
from mldcn.data.encoder import Encoder
from mldcn.data.reading import table_blocks
from mldcn.model import Ranker, save_weights
from mldcn.run import RunFolder

FEATURES = [
    {"name": "user", "kind": "categorical", "source": "user"},
    {"name": "age", "kind": "numeric", "source": "user", "missing_indicator": True},
    {"name": "history", "kind": "sequence", "source": "user", "share": "item", "max_length": 5}
    | {"times": "history_times", "actions": "history_actions", "pooling": "attention", "target": "item"},
    {"name": "hour", "kind": "bucketised", "source": "context", "buckets": 4},
    {
        "name": "item",
        "kind": "categorical",
        "source": "item",
        "encoding": {"kind": "vocabulary", "min_count": 2},
    },
    {"name": "tags", "kind": "multi", "source": "item", "max_length": 4, "pooling": "max"},
    {"name": "hashed", "kind": "categorical", "source": "item"}
    | {"encoding": {"kind": "hash", "rows": 50, "hashes": 2}},
    {"name": "price", "kind": "numeric", "source": "item", "transform": "log"},
    {"name": "picture", "kind": "embedding", "source": "item", "width": 4, "project_to": 3},
    {"name": "distance", "kind": "numeric", "source": "user_item", "transform": "quantile"},
]
SIMPLE = [FEATURES[0], FEATURES[3], FEATURES[4], FEATURES[6]]
LABELS = [{"name": "click"}, {"name": "save", "negative_sampling_rate": 0.5}]


def log(rows: int, seed: int = 0, unseen: bool = False) -> pa.Table:
    """Rows of the log, with missing values, and with ids that training never saw where asked for."""
    rng = np.random.default_rng(seed)
    high = 60 if unseen else 30

    def some(values, share=0.1):
        return [None if rng.random() < share else value for value in values]

    lengths = rng.integers(0, 7, rows)
    return pa.table(
        {
            "user": some([f"u{i}" for i in rng.integers(0, high, rows)]),
            "age": some(rng.integers(18, 80, rows).tolist()),
            "history": [[f"i{j}" for j in rng.integers(0, high, n)] for n in lengths],
            "history_times": [rng.integers(0, 1000, n).tolist() for n in lengths],
            "history_actions": [rng.choice(["view", "buy"], n).tolist() for n in lengths],
            "time": rng.integers(1000, 2000, rows),
            "hour": some(rng.integers(0, 24, rows).tolist()),
            "item": some([f"i{i}" for i in rng.integers(0, high, rows)]),
            "tags": ["|".join(rng.choice(["red", "blue", "new", "odd"], n)) or None for n in lengths % 4],
            "hashed": some(rng.integers(0, 10**12, rows).tolist()),
            "price": some(rng.lognormal(size=rows).tolist()),
            "picture": some(rng.normal(size=(rows, 4)).tolist()),
            "distance": some(rng.normal(size=rows).tolist()),
            "position": rng.integers(1, 5, rows),
            "click": rng.integers(0, 2, rows),
            "save": rng.integers(0, 2, rows),
        }
    )


def config(interaction: dict, features=FEATURES, labels=LABELS, **others) -> Config:
    """A config of a small model."""
    times = {"time": "time"} if any("times" in feature for feature in features) else {}
    schema = {"features": features, "labels": labels, "position": "position", "max_position": 4, **times}
    model = {
        "embedding": {"dim": 6, "normalise": "layer"},
        "interaction": interaction,
        "deep": {"hidden": [16]},
    }
    return parse(Config, {"schema": schema, "model": model, **others}, "test")


def make_run(path: Path, config: Config, rows: int = 400) -> RunFolder:
    """A finished run whose weights are random, and large enough that every feature tells."""
    encoder = Encoder.fit(config.log_schema, table_blocks(log(rows), 1 << 16))
    run = RunFolder.create(path, dump_config(config))
    encoder.save(run.encoder)
    torch.manual_seed(0)
    model = Ranker(config.model, config.log_schema, encoder.layout)
    with torch.no_grad():
        for table in model.tables().values():
            table.normal_(0.0, 0.5)
        if model.position_bias is not None:
            model.position_bias.weight.normal_()
    save_weights(model, run.weights)
    if config.evaluation.calibration == "platt":
        run.write_json("calibrators.json", {"click": {"kind": "platt", "slope": 1.5, "intercept": -0.3}})
    run.finish()
    return run


def columns(table: pa.Table, names) -> dict[str, list]:
    """The named columns of a table as JSON would give them."""
    return {name: table.column(name).to_pylist() for name in names}
