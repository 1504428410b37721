"""The loop as a whole, on a log whose rows say what to do with them."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from mldcn import interactions
from mldcn.config import Config, load_config, parse
from mldcn.data.prepare import prepare
from mldcn.errors import UserError
from mldcn.model import Ranker
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.training.evaluate import evaluate
from mldcn.training.fit import Trainer, fit
from mldcn.training.identity import monitored

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


def test_the_monitor_names_a_task_and_a_metric_that_is_measured(folder):
    def asked(monitor, **schema):
        return monitored(config(folder, training={"monitor": monitor}, schema=schema))

    assert asked("auc") == ("click", "auc")
    assert asked("long/hit@3", request="request") == ("long", "hit@3")
    assert asked("gauc", request="request") == asked("gauc", user="user") == ("click", "gauc")
    for monitor, schema, message in (
        ("buy/auc", {}, "no task 'buy'"),
        ("auk", {}, "no metric"),
        ("calibration", {}, "neither high nor low"),
        ("gauc", {}, "name the column in schema.user"),
        ("hit@3", {"user": "user"}, "name the column in schema.request"),
        ("hit@5", {"request": "request"}, "add 5 to evaluation.hit_at"),
    ):
        with pytest.raises(UserError, match=message):
            asked(monitor, **schema)


def test_a_run_shorter_than_eval_steps_is_evaluated_at_its_end(folder, tmp_path):
    summary = train(folder, tmp_path, training={"eval_steps": 1000, "epochs": 1})
    assert summary.best_step == summary.steps
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 1


def test_a_run_spells_out_every_option_of_its_interaction(folder, tmp_path):
    train(folder, tmp_path, training={"epochs": 1})
    saved = load_config(tmp_path / "run" / "config.yaml").model.interaction
    assert saved == interactions.parse({"name": "mldcn", "rank": 2, "num_layers": 1}).model_dump(mode="json")


def test_calibration_needs_validation_rows_and_is_saved_where_it_found_nothing_to_fit(folder, tmp_path):
    wanted = config(folder, evaluation={"calibration": "platt"}, training={"epochs": 1})
    data = prepare(wanted, tmp_path / "encoded")
    with pytest.raises(UserError, match="data.split gives none"):
        fit(wanted, RunFolder.create(tmp_path / "run"), replace(data, valid=None))
    schema = {"labels": [{"name": "click", "at_least": 2}]}
    loss = {"epochs": 1, "monitor": "logloss"}
    never = config(folder, evaluation={"calibration": "platt"}, training=loss, schema=schema)
    fit(never, RunFolder.create(tmp_path / "never"), prepare(never, tmp_path / "never-encoded"))
    assert Predictor.load(tmp_path / "never").calibrators == {}


def test_a_label_of_one_class_is_refused_before_training(folder, tmp_path):
    schema = {"labels": [{"name": "click", "at_least": 2}]}
    with pytest.raises(UserError, match="click is 0 in all .* validation rows"):
        train(folder, tmp_path, schema=schema)


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch):
    """A config, its data, and a run of it that was cut off in the middle of an epoch."""
    wanted = config(
        folder,
        training={
            "ema": 0.9,
            "checkpoint_steps": 5,
            "eval_steps": 9,
            "patience": 50,
            "optimiser": {"lr": 0.02, "schedule": "cosine", "table": "rowwise_adagrad"},
        },
        model={"embedding": {"dim": 4, "dropout": 0.2, "normalise": "batch"}, "deep": {"dropout": 0.2}},
    )
    data = prepare(wanted, tmp_path / "encoded")
    whole = Trainer._step

    def dying(self, batch):
        if self.position.step == 23:
            raise KeyboardInterrupt
        return whole(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", dying)
        fit(wanted, RunFolder.create(tmp_path / "stopped"), data)
    return wanted, data, RunFolder.open(tmp_path / "stopped", finished=False)


def test_resuming_inside_an_epoch_restores_dropout_average_schedule_and_order(stopped, tmp_path):
    wanted, data, run = stopped
    fit(wanted, run, data, resume=True)
    fit(wanted, RunFolder.create(tmp_path / "whole"), data)
    for name in ("weights.safetensors", "metrics.json", "history.jsonl", "predictions.arrow"):
        assert (run.path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_is_not_resumed_on_another_log_or_with_another_config(stopped):
    wanted, data, run = stopped
    with pytest.raises(UserError, match="not those that this run began with"):
        fit(wanted, run, replace(data, fingerprint={"files": {}}), resume=True)
    changed = {"epochs": 9, "optimiser": wanted.training.optimiser.model_copy(update={"lr": 0.5})}
    other = wanted.model_copy(update={"training": wanted.training.model_copy(update=changed)})
    with pytest.raises(
        UserError, match=r"training.epochs was 4 and is 9; training.optimiser.lr was 0.02 and is"
    ):
        fit(other, run, data, resume=True)
    free = {"checkpoint_minutes": 1.0, "keep_checkpoints": 9}
    other = wanted.model_copy(update={"training": wanted.training.model_copy(update=free)})
    fit(other, run, data, resume=True)


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
