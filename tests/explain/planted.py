"""A log in which two fields decide together and nothing else matters, and small runs on it."""

import numpy as np
import polars as pl
import yaml
from typer.testing import CliRunner

from mldcn import cli

FIELDS = ("user", "ad", "place", "hour")
VALUES = 6


def write_log(path, rows, seed):
    """Clicks depend on how user and ad meet, and on neither alone; saves on the place."""
    rng = np.random.default_rng(seed)
    ids = {name: rng.integers(0, VALUES, rows) for name in FIELDS}
    meet = (ids["user"] + ids["ad"]) % 2 == 0
    click = rng.random(rows) < np.where(meet, 0.8, 0.2)
    frame = {name: [f"{name}{i}" for i in column] for name, column in ids.items()}
    frame |= {
        "price": rng.exponential(1.0, rows),
        "session": np.arange(rows) // 4,
        "click": click.astype(int),
        "save": (rng.random(rows) < np.where(ids["place"] < 2, 0.7, 0.3)).astype(int),
    }
    pl.DataFrame(frame).write_csv(path)


def write_config(path, log, interaction, labels=("click",), **training):
    """A config of the log; ``price`` is numeric, rows of a session belong together."""
    source = {"user": "user", "ad": "item", "place": "context", "hour": "context"}
    features = [{"name": name, "kind": "categorical", "source": source[name]} for name in FIELDS]
    features.append({"name": "price", "kind": "numeric", "transform": "log", "source": "item"})
    config = {
        "data": {"train": [str(log)], "split": {"kind": "hash", "valid": 0.15, "test": 0.25}},
        "schema": {
            "features": features,
            "labels": [{"name": label} for label in labels],
            "request": "session",
        },
        "model": {
            "embedding": {"dim": 4, "init_std": 0.3},
            "deep": {"hidden": []},
            "interaction": interaction,
        },
        "training": {
            "epochs": 6,
            "batch_size": 128,
            "threads": 1,
            "optimiser": {"lr": 0.02},
            **training,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def call(*arguments):
    """The command line; an internal error is raised."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
