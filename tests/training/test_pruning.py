"""DeepLight's pruning: what becomes zero, when, and what of it a run keeps."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from mldcn.config import Config, ModelConfig, PruningConfig, parse
from mldcn.data.batch import EncodedLayout, IdSlot
from mldcn.data.prepare import prepare
from mldcn.errors import UserError
from mldcn.model import Ranker
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.schema import Categorical, Label, Schema
from mldcn.training.fit import Trainer, fit
from mldcn.training.pruning import Pruner, prunable, zero_smallest, zeros

ROWS, FAST = 3000, {"warmup_epochs": 1, "span": 0.1, "sparsity": 0.8, "embedding": 0.5}


def ranker(name="deeplight", **options):
    torch.manual_seed(0)
    names = ("ad", "user", "shop")
    slots = tuple(IdSlot(each, each, "item", i, 1) for i, each in enumerate(names))
    layout = EncodedLayout(slots, (), dict.fromkeys(names, 20), ("click",), 0)
    schema = Schema(
        features=tuple(Categorical(name=each, kind="categorical") for each in names),
        labels=(Label(name="click"),),
    )
    interaction = {"name": name, **(options or {"hidden": (10, 7)})}
    model = {"embedding": {"dim": 4}, "interaction": interaction, "heads": {"hidden": (5,)}}
    return Ranker(ModelConfig.model_validate(model), schema, layout)


def test_the_schedule_is_the_papers():
    pruner = Pruner(PruningConfig(sparsity=0.9, warmup_epochs=2), ranker(), steps_per_epoch=50, epochs=9)
    assert [pruner.sparsity(step) for step in (0, 100)] == [0, 0]
    assert pruner.sparsity(200) == pytest.approx(0.009)  # k = 100: 0.9 (1 - 0.99)
    assert pruner.sparsity(300) == pytest.approx(0.9 * (1 - 0.99**2))
    assert pruner.sparsity(100 + 6897) == pytest.approx(0.45, abs=1e-4)
    assert [pruner.due(step) for step in (90, 100, 105, 110, 120)] == [False, False, False, True, True]
    last = 100 + int(100 * np.log(0.05) / np.log(0.99))
    assert pruner.growing(last)
    assert not pruner.growing(last + 1)


def test_the_smallest_numbers_of_all_tensors_together_become_zero():
    one = torch.nn.Parameter(torch.tensor([[5.0, -0.1], [0.3, -4.0]]))
    two = torch.nn.Parameter(torch.tensor([0.2, -7.0, 0.25]))
    with torch.no_grad():
        zero_smallest([one, two], 3.99 / 7)
    assert one.tolist() == [[5.0, 0.0], [pytest.approx(0.3), -4.0]]
    assert two.tolist() == [0.0, -7.0, 0.0]
    before = one.detach().clone()
    with torch.no_grad():
        zero_smallest([one], 0.24)
    assert torch.equal(one, before)


def test_what_is_pruned_of_a_model():
    """Every matrix but the logit's; the field pairs; the tables that x0 is made from."""
    groups = prunable(ranker())
    assert {name: tuple(weight.shape) for name, weight in groups["dense"].items()} == {
        "scorer.interaction.fwfm.linear.linear.weight": (1, 12),
        "scorer.interaction.mlp.net.0.weight": (10, 12),
        "scorer.interaction.mlp.net.2.weight": (7, 10),
        "scorer.deep.net.0.weight": (64, 8),
        "scorer.heads.towers.0.net.0.weight": (5, 64),
    }
    assert {name: tuple(weight.shape) for name, weight in groups["field_pairs"].items()} == {
        "scorer.interaction.fwfm.weight": (3,)
    }
    assert len(groups["embedding"]) == 1
    masked = prunable(ranker("mldcn", rank=2, num_layers=1))
    assert masked["field_pairs"] == {}
    assert "scorer.interaction.layers.0.down.weight" in masked["dense"]
    first_order = prunable(ranker("deepfm", hidden=(4,)))
    assert all(name.startswith("embedder.") for name in first_order["embedding"])


def test_each_matrix_has_the_sparsity_and_the_tables_have_it_together():
    model = ranker()
    groups = prunable(model)
    with torch.no_grad():
        (table,) = groups["embedding"].values()
        table[:20] *= 0.01  # the first feature's vectors are all small
    config = PruningConfig(sparsity=0.5, warmup_epochs=0, span=1e-3, field_pairs=0.7, embedding=0.5)
    pruner = Pruner(config, model, steps_per_epoch=10, epochs=1)
    pruner.prune(10)
    for name, weight in groups["dense"].items():
        assert zeros({name: weight}) == int(0.5 * weight.numel()) / weight.numel()
    assert pruner.found()["field_pairs"] == pytest.approx(1 / 3)  # 0.35 of three
    assert zeros(groups["embedding"]) == pytest.approx(0.25, abs=0.02)
    assert zeros({"first": table[:20]}) > 0.7
    logits = model.scorer.heads.logits[0].weight
    assert (logits != 0).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"warmup_epochs": 3}, "pruning begins after epoch 3, and training.epochs is 3"),
        ({"dense": 0, "field_pairs": 0, "embedding": 0, "warmup_epochs": 0}, "nothing to prune"),
    ],
)
def test_a_schedule_that_prunes_nothing_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        Pruner(PruningConfig(**config), ranker(), steps_per_epoch=10, epochs=3)


# A whole run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("pruning") / "log.parquet"
    rng = np.random.default_rng(0)
    ad, user = rng.integers(0, 12, ROWS), rng.integers(0, 200, ROWS)
    click = rng.random(ROWS) < 1 / (1 + np.exp(-(0.5 * ad - 3.0 + 0.5 * (user % 2))))
    pl.DataFrame({"ad": ad, "user": user, "click": click.astype(int)}).write_parquet(path)
    return path


def config(log, *, interaction=None, pruning=FAST, **training):
    raw = {
        "data": {"train": [str(log)], "split": {"kind": "hash", "valid": 0.2, "test": 0.2}},
        "schema": {
            "features": [{"name": name, "kind": "categorical"} for name in ("ad", "user")],
            "labels": [{"name": "click"}],
        },
        "model": {
            "embedding": {"dim": 4},
            "interaction": interaction or {"name": "deeplight", "hidden": [16, 16]},
            "deep": {"hidden": []},
        },
        "training": {
            "threads": 1,
            "epochs": 5,
            "batch_size": 100,
            "optimiser": {"lr": 0.02},
            "pruning": pruning,
            **training,
        },
    }
    return parse(Config, raw, "test")


def run(wanted, tmp_path, name="run", **options):
    data = prepare(wanted, tmp_path / "encoded")
    return fit(wanted, RunFolder.create(tmp_path / name), data, **options)


def shares(path, prefix):
    weights = load_file(path / "weights.safetensors")
    return {
        name: float((value == 0).float().mean())
        for name, value in weights.items()
        if name.startswith(prefix) and value.dim() >= 2
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.9},
        {"interaction": {"name": "mldcn", "rank": 4, "num_layers": 2}, "amp": "bf16"},
        {"interaction": {"name": "mmoe", "expert": "dnn", "num_experts": 2}, "eval_steps": 7, "patience": 50},
    ],
    ids=["deeplight", "average", "mldcn", "mmoe"],
)
def test_the_kept_weights_are_as_sparse_as_asked_and_still_predict(log, tmp_path, options):
    wanted = config(log, **options)
    summary = run(wanted, tmp_path)
    found = shares(tmp_path / "run", "scorer.interaction")
    assert found
    assert all(share >= 0.8 - 0.05 - 1e-6 for share in found.values()), found
    table = shares(tmp_path / "run", "embedder")
    assert all(0.35 < share < 0.5 for share in table.values()), table
    assert summary.metrics["test"]["click"]["auc"] > 0.7
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["zeros"]["dense"] == pytest.approx(0.8, abs=0.05)
    assert summary.best_step > wanted.training.pruning.warmup_epochs * 18
    Predictor.load(tmp_path / "run")


def test_dense_weights_of_the_warm_up_are_not_kept_though_they_score_better(log, tmp_path):
    """Pruned to one weight in a hundred, no model matches what it was before."""
    hard = {**FAST, "sparsity": 0.99, "embedding": 1.0}
    summary = run(config(log, pruning=hard, epochs=3), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    values = {line["step"]: line["metrics"]["click"]["auc"] for line in lines}
    steps = sorted(values)
    assert summary.best_step in steps[1:]
    assert values[steps[0]] > values[summary.best_step]


def test_without_validation_rows_the_last_weights_are_pruned(log, tmp_path):
    wanted = config(log)
    split = wanted.data.split.model_copy(update={"valid": 0.0})
    wanted = wanted.model_copy(update={"data": wanted.data.model_copy(update={"split": split})})
    run(wanted, tmp_path)
    assert all(share >= 0.75 for share in shares(tmp_path / "run", "scorer.interaction").values())


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_resumed_run_ends_with_the_same_weights(log, tmp_path, monkeypatch, ema):
    wanted = config(log, ema=ema, checkpoint_steps=5, pruning={**FAST, "every": 4})
    whole_step = Trainer._step

    def dying(self, batch):
        if self.position.step == 43:
            raise KeyboardInterrupt
        return whole_step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", dying)
        run(wanted, tmp_path, "stopped")
    stopped = RunFolder.open(tmp_path / "stopped", finished=False)
    fit(wanted, stopped, prepare(wanted, tmp_path / "encoded"), resume=True)
    run(wanted, tmp_path, "whole")
    for name in ("weights.safetensors", "metrics.json", "history.jsonl", "predictions.arrow"):
        assert (stopped.path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_checkpoint_that_the_clock_asks_for_changes_nothing(log, tmp_path):
    wanted = config(log)
    run(wanted, tmp_path, "usual")
    often = wanted.model_copy(
        update={"training": wanted.training.model_copy(update={"checkpoint_minutes": 1e-9})}
    )
    run(often, tmp_path, "often")
    usual, other = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("usual", "often"))
    assert usual == other


def test_the_average_of_rows_that_no_batch_touches_is_right_across_prunings(log, tmp_path, monkeypatch):
    """Against an average of every row at every step."""
    wanted = config(log, ema=0.9, epochs=3)
    data = prepare(wanted, tmp_path / "encoded")
    trainer = Trainer(wanted, RunFolder.create(tmp_path / "run"), data, ())
    (name,) = trainer.average.tables
    plain = {name: trainer.average.average[name].clone()}
    step = Trainer._step

    def followed(self, batch):
        found = step(self, batch)
        t = self.average.step
        table = self.average.tables[name].detach()
        plain[name].lerp_(table, 1 - min(0.9, (1 + t) / (10 + t)))
        return found

    monkeypatch.setattr(Trainer, "_step", followed)
    trainer.fit(resume=False)
    trainer.average.sync()
    torch.testing.assert_close(trainer.average.average[name], plain[name], rtol=1e-4, atol=1e-5)
