"""Numerical trouble: what counts as it, going back, and giving up."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from mldcn.config import Config, RecoveryConfig, parse
from mldcn.data.batch import Batch, DenseSlot, EncodedLayout
from mldcn.data.prepare import prepare
from mldcn.errors import UserError
from mldcn.run import RunFolder
from mldcn.training.fit import Trainer, fit
from mldcn.training.observers import Observer
from mldcn.training.recovery import LossWatch, Place, all_finite, extreme_values
from mldcn.workflow import write_report

ROWS = 3000


def watched(losses, spike=20.0, norms=None):
    """The step at which a watch that is read now and then finds trouble, and in what words."""
    watch = LossWatch(RecoveryConfig(spike=spike), 1.0)
    for step, loss in enumerate(losses, 1):
        norm = None if norms is None else torch.tensor(norms[step - 1])
        watch.add(Place(step, 0, step - 1), torch.tensor(loss), norm)
        if step % 7 == 0 or step == len(losses):
            trouble = watch.read()[1]
            if trouble is not None:
                return trouble.step, trouble.problem
    return None


def test_losses_and_norms_that_are_not_finite_are_trouble():
    assert watched([0.7, 0.6, math.nan, math.nan]) == (3, "the loss is nan")
    assert watched([math.inf]) == (1, "the loss is inf")
    assert watched([0.7, 0.6, 0.5], norms=[1.0, math.inf, math.nan])[0] == 2
    assert watched([0.7, 0.6, 0.5], norms=[1.0, 1e30, 2.0]) is None


def test_a_spike_is_measured_against_the_median_and_against_a_coin():
    assert watched([0.5] * 50 + [14.0]) == (51, "the loss is 14 where 0.5 is usual")
    assert watched([0.5] * 50 + [13.8]) is None  # below 20 log 2
    assert watched([0.001] * 50 + [8.0]) is None  # one rare positive in a small batch
    assert watched([500.0, 400.0, 90.0, 60.0, 20.0, 5.0, 3.0]) is None  # a bad start that mends itself
    assert watched([1.2**step for step in range(120)])[0] < 40  # slow growth
    assert watched([0.5] * 50 + [1e6], spike=None) is None
    assert watched([0.5] * 50 + [math.nan], spike=None) == (51, "the loss is nan")


def test_rare_positives_in_tiny_batches_are_no_spikes():
    generator = random.Random(0)
    rate, rows = 1e-4, 4
    losses = [
        -sum(math.log(rate if generator.random() < rate else 1 - rate) for _ in range(rows)) / rows
        for _ in range(100_000)
    ]
    assert max(losses) > 2  # there were some
    assert watched(losses) is None


def test_where_trouble_is_found_does_not_depend_on_when_it_is_looked_for():
    losses = [0.5] * 30 + [30.0, 0.5, math.nan]
    found = set()
    for often in (1, 2, 5, 100):
        watch = LossWatch(RecoveryConfig(), 1.0)
        trouble = None
        for step, loss in enumerate(losses, 1):
            watch.add(Place(step, 0, step - 1), torch.tensor(loss), None)
            if (step % often == 0 or step == len(losses)) and trouble is None:
                trouble = watch.read()[1]
        found.add(trouble)
    assert len(found) == 1
    assert found.pop().step == 31


def test_the_most_extreme_values_are_named():
    slots = [
        DenseSlot("price", "item", 0, 1),
        DenseSlot("vector", "item", 1, 2, "embedding"),
        DenseSlot("age", "user", 3, 1),
    ]
    layout = EncodedLayout((), tuple(slots), {}, ("click",))
    dense = torch.zeros(4, 4)
    dense[2, 0], dense[1, 2], dense[3, 3] = 3e7, math.nan, -0.5
    labels = torch.tensor([[0.0], [1.0], [math.nan], [0.0]])
    batch = Batch(torch.zeros(4, 0, dtype=torch.int32), dense, labels, torch.ones(4), torch.zeros(4))
    expected = ("feature vector = nan (row 2)", "feature price = 3e+07 (row 3)", "feature age = -0.5 (row 4)")
    assert extreme_values(batch, layout) == expected
    weight = torch.tensor([1.0, 1.0, 1.0, math.inf])
    assert "weight = inf (row 4)" in extreme_values(replace(batch, weight=weight), layout)


def test_all_finite_looks_at_every_number():
    assert all_finite([torch.zeros(3), torch.zeros(0), torch.tensor([1, 2])])
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite([torch.zeros(3), torch.tensor([[0.0, bad], [0.0, 1.0]])])


class Notes(Observer):
    def __init__(self):
        self.texts = []

    def noted(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A config on a log, and its encoded rows."""
    folder = tmp_path_factory.mktemp("recovery")
    rng = np.random.default_rng(0)
    ad, price = rng.integers(0, 12, ROWS), rng.normal(size=ROWS)
    click = rng.random(ROWS) < 1 / (1 + np.exp(-(0.4 * ad - 2.4 + 0.5 * price)))
    pl.DataFrame({"ad": ad, "price": price, "click": click.astype(int)}).write_parquet(folder / "log.parquet")
    raw = {
        "data": {
            "train": [str(folder / "log.parquet")],
            "split": {"kind": "hash", "valid": 0.2, "test": 0.2},
        },
        "schema": {
            "features": [
                {"name": "ad", "kind": "categorical", "source": "item"},
                {"name": "price", "kind": "numeric", "source": "item"},
            ],
            "labels": [{"name": "click"}],
        },
        "model": {"embedding": {"dim": 4, "dropout": 0.1}, "interaction": {"rank": 2, "num_layers": 1}},
        "training": {
            "threads": 1,
            "epochs": 3,
            "patience": 9,
            "batch_size": 128,
            "checkpoint_steps": 5,
            "ema": 0.9,
            "optimiser": {"lr": 0.02},
        },
    }
    config = parse(Config, raw, "test")
    return config, prepare(config, folder / "encoded")


def spoil(monkeypatch, places, change):
    """Changes the batches at some (epoch, batch), whenever they are read."""
    whole = Trainer._batches

    def spoilt(self, start, epoch=None):
        at = self.position.epoch if epoch is None else epoch
        for number, batch in enumerate(whole(self, start, epoch), start):
            yield change(batch) if (at, number) in places else batch

    monkeypatch.setattr(Trainer, "_batches", spoilt)


def with_price(value):
    def change(batch):
        dense = batch.dense.clone()
        dense[3, :] = value
        return replace(batch, dense=dense)

    return change


def weights(run):
    return (run.path / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("value", "problem"), [(math.nan, "the loss is nan"), (1e30, "the loss is")], ids=["nan row", "corrupted"]
)
def test_a_bad_batch_is_passed_over_from_the_last_checkpoint_and_told_of(
    log, tmp_path, monkeypatch, value, problem
):
    config, data = log
    spoil(monkeypatch, {(1, 3)}, with_price(value))
    notes = Notes()
    run = RunFolder.create(tmp_path / "run")
    summary = fit(config, run, data, observers=[notes])
    steps = math.ceil(len(data.train) / 128)
    assert summary.steps == 3 * steps
    assert summary.metrics["test"]["click"]["auc"] > 0.6
    (trouble,) = summary.troubles
    assert (trouble.step, trouble.epoch, trouble.batch) == (steps + 4, 1, 3)
    assert problem in trouble.problem
    assert any(text.startswith("feature price") and text.endswith("(row 4)") for text in trouble.values)
    assert len(notes.texts) == 1
    assert "0.3 times the learning rate" in notes.texts[0]
    lines = [json.loads(line) for line in run.history.read_text().splitlines()]
    (event,) = [line for line in lines if "event" in line]
    assert event["to_step"] == steps  # of the checkpoints at 5, 10, 15 and the epoch's end, the newest
    assert run.info()["troubles"] == [trouble.to_json()]
    write_report(run)
    assert "Training was rolled back" in (run.path / "report.html").read_text()


def test_a_learning_rate_that_cannot_work_is_given_up_with_a_reason(log, tmp_path):
    config, data = log
    optimiser = config.training.optimiser.model_copy(update={"lr": 1e6})
    wanted = config.model_copy(
        update={"training": config.training.model_copy(update={"optimiser": optimiser})}
    )
    notes = Notes()
    with pytest.raises(
        UserError, match=r"broke down: at step .* loss is .*feature price.*3 roll-backs"
    ) as error:
        fit(wanted, RunFolder.create(tmp_path / "run"), data, observers=[notes])
    assert "Lower training.optimiser.lr" in str(error.value)
    assert len(notes.texts) == 3
    assert notes.texts[-1].endswith("0.027 times the learning rate")


def test_a_learning_rate_that_is_too_high_is_lowered_until_it_works(log, tmp_path):
    config, data = log
    recovery = RecoveryConfig(tries=3, lr_factor=1e-3)
    optimiser = config.training.optimiser.model_copy(update={"lr": 1e4})
    training = config.training.model_copy(update={"optimiser": optimiser, "recovery": recovery})
    wanted = config.model_copy(update={"training": training})
    summary = fit(wanted, RunFolder.create(tmp_path / "run"), data)
    assert 1 <= len(summary.troubles) <= 3
    assert summary.metrics["test"]["click"]["auc"] > 0.6


def test_zero_tries_give_up_at_once(log, tmp_path, monkeypatch):
    config, data = log
    spoil(monkeypatch, {(0, 2)}, with_price(math.nan))
    recovery = RecoveryConfig(tries=0)
    wanted = config.model_copy(update={"training": config.training.model_copy(update={"recovery": recovery})})
    with pytest.raises(UserError, match=r"at step 3 \(epoch 1, batch 3\) the loss is nan; .*price = nan"):
        fit(wanted, RunFolder.create(tmp_path / "run"), data)


def test_normal_training_is_not_changed_by_being_watched(log, tmp_path):
    config, data = log
    fit(config, RunFolder.create(tmp_path / "a"), data)
    recovery = RecoveryConfig(tries=0, spike=None)
    other = config.model_copy(update={"training": config.training.model_copy(update={"recovery": recovery})})
    summary = fit(other, RunFolder.create(tmp_path / "b"), data)
    assert summary.troubles == ()
    assert weights(RunFolder(tmp_path / "a")) == weights(RunFolder(tmp_path / "b"))


@pytest.fixture(scope="module")
def troubled(log, tmp_path_factory):
    """A run whose batches 3 and 6 of the second epoch are bad, and that nothing else disturbed."""
    config, data = log
    run = RunFolder.create(tmp_path_factory.mktemp("troubled") / "run")
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, {(1, 3), (1, 6)}, with_price(math.nan))
        fit(config, run, data)
    return run


@pytest.mark.parametrize("minutes", [1e-9, 10.0], ids=["a checkpoint a step", "few"])
@pytest.mark.parametrize("killed_at", [17, 19, 24, 40])
def test_a_run_with_trouble_that_is_killed_and_resumed_ends_with_the_same_bits(
    log, troubled, tmp_path, monkeypatch, minutes, killed_at
):
    config, data = log
    spoil(monkeypatch, {(1, 3), (1, 6)}, with_price(math.nan))
    wanted = config.model_copy(
        update={"training": config.training.model_copy(update={"checkpoint_minutes": minutes})}
    )
    step, seen = Trainer._step, iter(range(10**6))

    def dying(self, batch):
        if next(seen) == killed_at:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", dying)
        fit(wanted, RunFolder.create(tmp_path / "run"), data)
    run = RunFolder.open(tmp_path / "run", finished=False)
    summary = fit(wanted, run, data, resume=True)
    assert len(summary.troubles) == 2
    for name in ("weights.safetensors", "metrics.json", "history.jsonl", "predictions.arrow"):
        assert (run.path / name).read_bytes() == (troubled.path / name).read_bytes(), name
