"""The loop as a whole, on a log whose rows say what to do with them."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch

from mldcn.config import Config, parse
from mldcn.data.prepare import prepare
from mldcn.errors import UserError
from mldcn.model import Ranker
from mldcn.run import RunFolder
from mldcn.training.evaluate import evaluate
from mldcn.training.fit import Trainer, fit, monitored

ROWS = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    rng = np.random.default_rng(0)
    ad, position = rng.integers(0, 12, ROWS), rng.integers(1, 5, ROWS)
    click = rng.random(ROWS) < 1 / (1 + np.exp(-(0.4 * ad - 2.4 - 0.8 * (position - 1))))
    dwell = np.where(click, rng.random(ROWS) < ad / 12, None)
    pl.DataFrame(
        {
            "ad": ad,
            "position": position,
            "user": rng.integers(0, 50, ROWS),
            "request": np.arange(ROWS) // 4,
            "click": click.astype(int),
            "long": pl.Series([None if d is None else int(d) for d in dwell]),
            "weight": rng.integers(1, 3, ROWS),
        }
    ).write_parquet(folder / "log.parquet")
    return folder


def config(folder, *, schema=None, training=None, model=None, evaluation=None):
    raw = {
        "data": {
            "train": [str(folder / "log.parquet")],
            "split": {"kind": "hash", "valid": 0.2, "test": 0.2},
        },
        "schema": {
            "features": [{"name": "ad", "kind": "categorical", "source": "item"}],
            "labels": [{"name": "click"}, {"name": "long", "weight": 0.5}],
            **(schema or {}),
        },
        "model": {"embedding": {"dim": 4}, "interaction": {"rank": 2, "num_layers": 1}, **(model or {})},
        "training": {
            "threads": 1,
            "epochs": 4,
            "batch_size": 128,
            "optimiser": {"lr": 0.02},
            **(training or {}),
        },
        "evaluation": evaluation or {},
    }
    return parse(Config, raw, "test")


def train(folder, tmp_path, **options):
    wanted = config(folder, **options)
    data = prepare(wanted, tmp_path / "encoded")
    return fit(wanted, RunFolder.create(tmp_path / "run"), data)


@pytest.mark.parametrize(
    "training",
    [
        {"optimiser": {"lr": 0.02, "table": "rowwise_adagrad", "table_lr": 0.1}},
        {"optimiser": {"lr": 0.02, "dense": "adamw", "weight_decay": 0.01, "clip_norm": None}},
        {"optimiser": {"lr": 0.02, "schedule": "cosine", "warmup_steps": 5, "table_l2": 1e-5}},
        {"ema": 0.99, "optimiser": {"lr": 0.02}},
        {"amp": "bf16", "optimiser": {"lr": 0.02}},
        {"eval_steps": 7, "patience": 50, "monitor": "long/logloss", "optimiser": {"lr": 0.02}},
    ],
    ids=["adagrad", "adamw", "schedule", "ema", "bf16", "eval-steps"],
)
def test_every_setting_learns_both_tasks(folder, tmp_path, training):
    summary = train(folder, tmp_path, training=training)
    assert summary.metrics["test"]["click"]["auc"] > 0.7
    assert summary.metrics["test"]["long"]["auc"] > 0.6


def test_early_stopping_keeps_the_best_weights_not_the_last(folder, tmp_path):
    summary = train(
        folder,
        tmp_path,
        training={"epochs": 30, "patience": 2, "monitor": "logloss", "optimiser": {"lr": 0.1}},
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    losses = [line["metrics"]["click"]["logloss"] for line in lines]
    best = int(np.argmin(losses))
    assert len(lines) < 30
    assert len(lines) == best + 1 + 2
    assert summary.best_step == lines[best]["step"]
    assert summary.metrics["valid"]["click"]["logloss"] == pytest.approx(losses[best], rel=1e-6)


def test_tensorboard_is_written(folder, tmp_path):
    train(folder, tmp_path, training={"tensorboard": True, "epochs": 1})
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    RunFolder.open(tmp_path / "run")


def test_positions_and_groups_are_measured_where_they_belong(folder, tmp_path):
    schema = {"position": "position", "max_position": 4, "user": "user", "request": "request"}
    wanted = config(folder, schema=schema)
    data = prepare(wanted, tmp_path / "encoded")
    summary = fit(wanted, RunFolder.create(tmp_path / "run"), data)
    values = summary.metrics["test"]["click"]
    assert {"gauc", "hit@3", "hit_rate@3"} <= values.keys()
    # With the logged positions the model knows more of the labels than at one fixed position.
    blind = config(folder, schema={**schema, "position": None})
    other = tmp_path / "blind"
    unaware = fit(blind, RunFolder.create(other / "run"), prepare(blind, other / "encoded"))
    assert values["auc"] > unaware.metrics["test"]["click"]["auc"] + 0.02
    model = Ranker(wanted.model, wanted.log_schema, data.encoder.layout)
    assert model.position_bias.weight.shape == (5, 2)


def test_row_weights_are_respected(folder, tmp_path):
    weighted = config(folder, schema={"weight": "weight"})
    data = prepare(weighted, tmp_path / "encoded")
    model = Ranker(weighted.model, weighted.log_schema, data.encoder.layout)
    found = evaluate(model, data.test, weighted, device=torch.device("cpu")).metrics["click"]["logloss"]
    plain = config(folder)
    unweighted = evaluate(model, data.test, plain, device=torch.device("cpu")).metrics["click"]["logloss"]
    assert found != unweighted


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step(folder, tmp_path, monkeypatch):
    whole = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, batch: whole(self, batch) * math.nan)
    with pytest.raises(UserError, match="loss is nan at step"):
        train(folder, tmp_path)


def test_unknown_monitors_are_refused():
    assert monitored("auc", ("click", "save")) == ("click", "auc")
    assert monitored("save/hit@3", ("click", "save")) == ("save", "hit@3")
    with pytest.raises(UserError, match="no task 'buy'"):
        monitored("buy/auc", ("click",))
    with pytest.raises(UserError, match="no metric"):
        monitored("auk", ("click",))
    with pytest.raises(UserError, match="neither high nor low"):
        monitored("calibration", ("click",))


def test_training_without_validation_keeps_the_last_weights(folder, tmp_path):
    raw = config(folder)
    wanted = raw.model_copy(
        update={
            "data": raw.data.model_copy(update={"split": raw.data.split.model_copy(update={"valid": 0.0})})
        }
    )
    summary = fit(wanted, RunFolder.create(tmp_path / "run"), prepare(wanted, tmp_path / "encoded"))
    assert summary.best_step == summary.steps
    assert summary.metrics["test"]["click"]["auc"] > 0.7
