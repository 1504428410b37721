"""What some architectures add to training: a representation a task, losses of streams, terms of the loss."""

import json

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from mldcn import model as model_module
from mldcn.config import Config, ModelConfig, load_config, parse
from mldcn.cost.flops import module_flops
from mldcn.data.batch import Batch, EncodedLayout, IdSlot
from mldcn.data.prepare import prepare
from mldcn.interactions import auxiliary_loss
from mldcn.layout import FieldLayout
from mldcn.model import Ranker, Scorer, load_weights
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.schema import Categorical, Label, Schema
from mldcn.training.evaluate import evaluate
from mldcn.training.fit import Trainer, fit
from mldcn.training.step import backpropagate

ROWS, TASKS = 60, ("click", "save")
TASK_WEIGHTS = torch.tensor([1.0, 0.5])
CROSS = {"name": "dcnv2_lowrank", "num_layers": 1, "rank": 2}
STREAMS = {"name": "dcnv3", "num_deep_layers": 2, "num_shallow_layers": 1}
GATES = {"name": "mmoe", "expert": CROSS, "num_experts": 3}
BALANCED = {**GATES, "num_experts": 4, "top_k": 2, "balance": 0.3}
ROUTERS = {"name": "rankmixer_moe", "num_tokens": 4, "head_width": 4}
STRUCTURES = {
    "stacked": {"hidden": (6,)},
    "parallel": {"hidden": (6,), "structure": "parallel"},
    "linear": {"hidden": ()},
    "norm": {"hidden": (6,), "batch_norm": True},
}
structures = pytest.mark.parametrize("deep", STRUCTURES.values(), ids=STRUCTURES)


def scorer(interaction, deep, heads=()):
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"interaction": interaction, "deep": deep, "heads": {"hidden": heads}}
    )
    return Scorer(config, FieldLayout.uniform(3, 4), TASKS).double()


def behind(model, x0, crossed):
    """What heads read of an interaction's result, for one task."""
    return torch.cat([crossed, model.deep(x0)], dim=1) if model.parallel else model.deep(crossed)


def ranker(interaction, positions=4, **model):
    torch.manual_seed(0)
    names = ("ad", "user", "shop")
    slots = tuple(IdSlot(name, name, "item", i, 1) for i, name in enumerate(names))
    layout = EncodedLayout(slots, (), dict.fromkeys(names, 9), TASKS, positions)
    schema = Schema(
        features=tuple(Categorical(name=name, kind="categorical") for name in names),
        labels=tuple(Label(name=task) for task in TASKS),
    )
    raw = {"embedding": {"dim": 4}, "interaction": interaction, "deep": {"hidden": (6,)}, **model}
    return Ranker(ModelConfig.model_validate(raw), schema, layout).double()


def batch():
    draw = torch.Generator().manual_seed(1)
    labels = (torch.rand(ROWS, 2, generator=draw) < 0.3).double()
    labels[::3, 1] = torch.nan  # unknown in a third of the rows
    ids = torch.randint(0, 9, (ROWS, 3), generator=draw).int()
    weight = torch.rand(ROWS, generator=draw, dtype=torch.float64)
    position = torch.randint(0, 5, (ROWS,), generator=draw)
    return Batch(ids, torch.zeros(ROWS, 0, dtype=torch.float64), labels, weight, position)


def plain_losses(logits, rows):
    """Each task's weighted mean log loss, row by row; ``(T,)``."""
    losses = []
    for task in range(2):
        known = ~rows.labels[:, task].isnan()
        # Logits go through float32 where their loss is made.
        bce = F.binary_cross_entropy_with_logits(
            logits[known, task].float().double(), rows.labels[known, task], reduction="none"
        )
        losses.append((bce * rows.weight[known]).sum() / rows.weight[known].sum())
    return torch.stack(losses)


def gradients(model):
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_backpropagates(model, expected_loss, seed=0):
    """The step's loss and gradients against those of a plain computation of the loss."""
    model.train()
    torch.manual_seed(seed)
    loss = expected_loss()
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(seed)
    found = backpropagate(model, batch(), TASK_WEIGHTS.double())
    torch.testing.assert_close(found, loss.detach().to(found.dtype), rtol=1e-6, atol=1e-7)
    got = gradients(model)
    assert got.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7)


# One representation a task -----------------------------------------------------------------------------------


@structures
@pytest.mark.parametrize("heads", [(), (5,)], ids=["linear", "towers"])
def test_each_task_reads_its_own_representation(deep, heads):
    model = scorer(GATES, deep, heads).eval()
    x0 = torch.randn(7, 12, dtype=torch.float64)
    logits = model(x0)
    assert logits.shape == (7, 2)
    own = model.interaction(x0)
    assert own.shape == (7, 2, 12)
    for task in range(2):
        shared = behind(model, x0, own[:, task])
        expected = model.heads.logits[task](model.heads.towers[task](shared))
        torch.testing.assert_close(logits[:, task : task + 1], expected)


@structures
def test_flops_count_the_shared_part_once_for_each_task_behind_it(deep):
    model = scorer(GATES, deep).eval()
    assert sum(model.flops().values()) == module_flops(model, torch.randn(4, 12, dtype=torch.float64))
    repeats = 1 if model.parallel else 2
    assert model.flops()["deep"] == repeats * model.deep.flops()


@structures
def test_one_row_and_none_keep_their_shape(deep):
    model = scorer(GATES, deep).eval()
    for rows in (1, 0):
        assert model(torch.zeros(rows, 12, dtype=torch.float64)).shape == (rows, 2)


def test_a_tasks_loss_leaves_the_other_tasks_gates_alone():
    model = scorer(GATES, {"hidden": ()})
    model(torch.randn(9, 12, dtype=torch.float64))[:, 1].sum().backward()
    gates = model.interaction.mixture.gates.linear.weight.grad.unflatten(0, (2, 3))
    assert not gates[0].any()
    assert gates[1].any()


@pytest.mark.parametrize("structure", ["stacked", "parallel"])
def test_gradients_of_tasks_with_their_own_representations(structure):
    model = ranker(GATES, deep={"hidden": (6,), "structure": structure})

    def plain():
        rows = batch()
        return (plain_losses(model(rows.ids, rows.dense, rows.position), rows) * TASK_WEIGHTS).sum()

    assert_backpropagates(model, plain)


def test_parts_of_rows_sum_to_the_batch(monkeypatch):
    model = ranker(GATES).train()
    backpropagate(model, batch(), TASK_WEIGHTS.double())
    whole = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(model_module, "PART_NUMBERS", 16 * 12)
    calls = counted(model.scorer, monkeypatch)
    backpropagate(model, batch(), TASK_WEIGHTS.double())
    assert calls == [16, 16, 16, 12]
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name])


def counted(part, monkeypatch):
    """The rows of each call of a scorer's interaction, from now on."""
    calls = []
    part.interaction.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    return calls


# Streams with losses of their own ----------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [STRUCTURES["linear"], STRUCTURES["parallel"]], ids=["linear", "parallel"])
def test_with_linear_heads_the_whole_is_the_mean_of_the_streams(deep):
    model = scorer(STREAMS, deep)
    logits, streams = model.with_streams(torch.randn(7, 12, dtype=torch.float64))
    assert streams.shape == (2, 7, 2)
    assert not torch.allclose(streams[0], streams[1])
    torch.testing.assert_close(streams.mean(dim=0), logits)


@structures
def test_a_stream_is_what_the_model_says_without_the_other(deep):
    model = scorer(STREAMS, deep).eval()
    x0 = torch.randn(7, 12, dtype=torch.float64)
    logits, streams = model.with_streams(x0)
    torch.testing.assert_close(logits, model(x0))
    crossed = model.interaction(x0)
    for i in range(2):
        alone = torch.zeros_like(crossed)
        alone[:, 12 * i : 12 * (i + 1)] = 2 * crossed[:, 12 * i : 12 * (i + 1)]
        torch.testing.assert_close(streams[i], model.heads(behind(model, x0, alone)))


@pytest.mark.parametrize("deep", [STRUCTURES["stacked"], STRUCTURES["parallel"]], ids=["stacked", "parallel"])
@pytest.mark.parametrize("detach", [True, False])
def test_tri_bce_of_a_batch(detach, deep):
    """L + sum_s max(0, L_s - L) L_s a task, positions, unknown labels and weights included."""
    model = ranker({**STREAMS, "detach_weights": detach}, deep=deep)
    with torch.no_grad():
        model.position_bias.weight.normal_()
        for head in model.scorer.heads.logits:
            head.weight.mul_(4)  # so that streams are worse than the whole

    weights_seen = []

    def plain():
        rows = batch()
        x0 = model.embedder(rows.ids, rows.dense)
        bias = model.position_bias(rows.position)
        logits, streams = model.scorer.with_streams(x0)
        whole = plain_losses(logits + bias, rows)
        total = whole
        for stream in streams:
            own = plain_losses(stream + bias, rows)
            weight = (own - whole).clamp(min=0)
            weights_seen.append(weight.detach())
            total = total + (weight.detach() if detach else weight) * own
        return (total * TASK_WEIGHTS).sum()

    assert_backpropagates(model, plain)
    assert torch.stack(weights_seen).any()


def test_a_batch_with_streams_is_computed_whole(monkeypatch):
    """Tri-BCE's weights are those of a batch: parts would have weights of their own."""
    model = ranker(STREAMS).train()
    monkeypatch.setattr(model_module, "PART_NUMBERS", 16 * 12)
    calls = counted(model.scorer, monkeypatch)
    backpropagate(model, batch(), TASK_WEIGHTS.double())
    assert calls == [ROWS]


# Terms of the loss -------------------------------------------------------------------------------------------


def test_terms_of_the_loss_are_added_once():
    model = ranker({**BALANCED, "balance": 3.0})
    terms = []

    def plain():
        rows = batch()
        losses = plain_losses(model(rows.ids, rows.dense, rows.position), rows)
        terms.append(auxiliary_loss(model))
        return (losses * TASK_WEIGHTS).sum() + terms[0]

    assert_backpropagates(model, plain)
    assert terms[0] > 0.01
    assert auxiliary_loss(model) is None


def test_a_batch_with_a_term_of_the_loss_is_computed_whole(monkeypatch):
    model = ranker(BALANCED).train()
    monkeypatch.setattr(model_module, "PART_NUMBERS", 16 * 12)
    calls = counted(model.scorer, monkeypatch)
    backpropagate(model, batch(), TASK_WEIGHTS.double())
    assert calls == [ROWS]
    assert model.scorer.whole_batches()
    assert not ranker(GATES).scorer.whole_batches()


def test_nothing_is_added_in_evaluation():
    model = ranker(BALANCED).eval()
    rows = batch()
    model(rows.ids, rows.dense, rows.position)
    assert auxiliary_loss(model) is None
    assert torch.equal(model(rows.ids, rows.dense), model(rows.ids, rows.dense))


# A whole run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("extras") / "log.parquet"
    rng = np.random.default_rng(0)
    ad, position = rng.integers(0, 12, 3000), rng.integers(1, 5, 3000)
    click = rng.random(3000) < 1 / (1 + np.exp(-(0.5 * ad - 2.5 - 0.6 * (position - 1))))
    long = np.where(click, rng.random(3000) < 1 - ad / 12, None)
    pl.DataFrame(
        {
            "ad": ad,
            "user": rng.integers(0, 40, 3000),
            "position": position,
            "click": click.astype(int),
            "long": pl.Series([None if each is None else int(each) for each in long]),
        }
    ).write_parquet(path)
    return path


def config(log, interaction, **training):
    raw = {
        "data": {"train": [str(log)], "split": {"kind": "hash", "valid": 0.2, "test": 0.2}},
        "schema": {
            "features": [{"name": name, "kind": "categorical"} for name in ("ad", "user")],
            "labels": [{"name": "click"}, {"name": "long", "weight": 0.5}],
            "position": "position",
            "max_position": 4,
        },
        "model": {"embedding": {"dim": 4}, "interaction": interaction, "deep": {"hidden": [8]}},
        "training": {"threads": 1, "epochs": 4, "batch_size": 128, "optimiser": {"lr": 0.02}, **training},
    }
    return parse(Config, raw, "test")


FIRST_ORDER = {"name": "deepfm", "hidden": [6]}
RUNS = {
    "first-order terms in experts": ({**GATES, "expert": FIRST_ORDER}, {}),
    "first-order terms in an ensemble": ({"name": "dhen", "layers": [["dnn", FIRST_ORDER], ["dcnv2"]]}, {}),
    "tasks": (GATES, {}),
    "task tokens": ({"name": "hiformer", "token_width": 8, "num_layers": 1}, {}),
    "streams": (STREAMS, {}),
    "two routers": (ROUTERS, {"ema": 0.95}),
    "two routers in half precision": (ROUTERS, {"amp": "bf16"}),
    "terms": (BALANCED, {"ema": 0.95}),
    "half precision": ({**BALANCED, "balance": 0.01}, {"amp": "bf16"}),
    "streams in half precision": (STREAMS, {"amp": "bf16"}),
}


@pytest.mark.parametrize(("interaction", "training"), RUNS.values(), ids=RUNS)
def test_a_run_learns_both_tasks_and_predicts_what_it_measured(log, tmp_path, interaction, training):
    wanted = config(log, interaction, **training)
    data = prepare(wanted, tmp_path / "encoded")
    run = RunFolder.create(tmp_path / "run")
    summary = fit(wanted, run, data)
    assert summary.metrics["test"]["click"]["auc"] > 0.7
    assert summary.metrics["test"]["long"]["auc"] > 0.6
    assert summary.flops["interaction"] > 0

    saved = load_config(run.path / "config.yaml")
    model = Ranker(saved.model, saved.log_schema, data.encoder.layout)
    load_weights(model, run.weights)
    again = evaluate(model, data.test, saved, device=torch.device("cpu")).metrics
    for task in ("click", "long"):
        assert again[task]["logloss"] == pytest.approx(summary.metrics["test"][task]["logloss"], rel=1e-3)

    rows = pl.read_parquet(log).head(50)
    scores = Predictor.load(run.path, "cpu").predict_table(rows.to_arrow())
    assert scores.shape == (50, 2)
    assert np.isfinite(scores).all()
    one = Predictor.load(run.path, "cpu").predict_table(rows[7:8].to_arrow())
    np.testing.assert_allclose(one, scores[7:8], rtol=1e-4)


def test_the_measured_loss_is_the_tasks_alone(log, tmp_path):
    """A balance so large that its term would show."""
    wanted = config(log, {**BALANCED, "balance": 50.0}, epochs=1)
    data = prepare(wanted, tmp_path / "encoded")
    fit(wanted, RunFolder.create(tmp_path / "run"), data)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["valid"]["click"]["logloss"] < 1


@pytest.mark.parametrize("interaction", [BALANCED, STREAMS, ROUTERS], ids=["terms", "streams", "routers"])
def test_a_resumed_run_ends_with_the_same_weights(log, tmp_path, monkeypatch, interaction):
    """The gates' noise and the coefficient that adapts included."""
    wanted = config(log, interaction, checkpoint_steps=5)
    data = prepare(wanted, tmp_path / "encoded")
    step = Trainer._step

    def dying(self, batch):
        if self.position.step == 23:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", dying)
        fit(wanted, RunFolder.create(tmp_path / "stopped"), data)
    stopped = RunFolder.open(tmp_path / "stopped", finished=False)
    fit(wanted, stopped, data, resume=True)
    fit(wanted, RunFolder.create(tmp_path / "whole"), data)
    for name in ("weights.safetensors", "metrics.json", "predictions.arrow"):
        assert (stopped.path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
