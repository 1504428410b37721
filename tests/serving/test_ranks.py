"""Cross layers cut to a smaller rank: exact where theirs was no larger, else the nearest of it, judged by AUC."""

import json

import numpy as np
import pytest
import torch
from test_validation import learnable
from typer.testing import CliRunner

from every_feature import SIMPLE, config, log, make_run
from mldcn.cli import app
from mldcn.errors import UserError
from mldcn.model import Ranker, save_weights
from mldcn.predict import Predictor
from mldcn.serving.engine import Engine
from mldcn.serving.export import export_run
from mldcn.serving.ranks import cut_ranks

MODELS = {
    "dcnv2": {"name": "dcnv2", "num_layers": 2},
    "dcnv2_lowrank": {"name": "dcnv2_lowrank", "num_layers": 2, "rank": 11},
    "relu": {"name": "dcnv2_lowrank", "num_layers": 2, "rank": 11, "relu": True},
    "mldcn": {"name": "mldcn_plain", "num_layers": 2, "rank": 11},
    "mldcn, bias outside": {"name": "mldcn_plain", "num_layers": 1, "rank": 11, "bias": "outside"},
}
D = 24  # columns of x0 of the four features


def ranker(interaction, features=SIMPLE):
    made = config(interaction, features)
    from mldcn.data.encoder import Encoder
    from mldcn.data.reading import table_blocks

    torch.manual_seed(0)
    encoder = Encoder.fit(made.log_schema, table_blocks(log(100), 1 << 16))
    return Ranker(made.model, made.log_schema, encoder.layout).eval().requires_grad_(False)


def thin(model, rank):
    """Gives every matrix of the cross layers a rank."""
    for name, weight in model.scorer.interaction.named_parameters():
        if weight.dim() == 2 and ".mask." not in name:
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            values[rank:] = 0
            weight.copy_(left @ torch.diag(values) @ right)


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_below_which_nothing_lies_changes_nothing(name):
    model = ranker(MODELS[name])
    thin(model, 3)
    x0 = torch.randn(50, D)
    expected = model.scorer(x0)
    before, after = cut_ranks(model, 3)
    torch.testing.assert_close(model.scorer(x0), expected, atol=1e-5, rtol=0)
    layers = MODELS[name]["num_layers"]
    if name == "dcnv2":
        assert (before, after) == (layers * 2 * D * D, layers * 2 * 2 * 3 * D)
    elif name == "dcnv2_lowrank":
        assert (before, after) == (layers * 4 * 11 * D, layers * 4 * 3 * D)
    elif name == "relu":
        assert (before, after) == (layers * 4 * 11 * D, layers * 4 * 3 * (11 + D))
    else:
        mask = 2 * (D * 6 + 6 * 11)
        assert (before, after) == (layers * (4 * 11 * D + mask), layers * (4 * 3 * (11 + D) + mask))


def test_a_cut_is_the_nearest_matrix_of_its_rank():
    for name in ("dcnv2", "dcnv2_lowrank"):
        model = ranker(MODELS[name])
        layer = model.scorer.interaction.layers[0]
        if name == "dcnv2":
            whole = layer.linear.weight.double().numpy()
        else:
            whole = (layer.up.weight.double() @ layer.down.weight.double()).numpy()
        cut_ranks(model, 4)
        if name == "dcnv2":
            found = layer.linear[1].weight @ layer.linear[0].weight
        else:
            found = layer.up.weight @ layer.down.weight
        values = np.linalg.svd(whole, compute_uv=False)
        apart = np.linalg.norm(found.double().numpy() - whole)
        assert np.linalg.matrix_rank(found.numpy(), tol=1e-4) == 4
        assert apart == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=1e-4)


def test_what_would_not_get_cheaper_is_left_alone_and_said():
    for name, rank in (("dcnv2", 12), ("dcnv2_lowrank", 11), ("mldcn", 8)):
        model = ranker(MODELS[name])
        x0 = torch.randn(5, D)
        expected = model.scorer(x0)
        with pytest.raises(UserError, match=f"--max-rank {rank}: no layer gets cheaper"):
            cut_ranks(model, rank)
        torch.testing.assert_close(model.scorer(x0), expected, atol=0, rtol=0)
    with pytest.raises(UserError, match="it is for dcnv2, dcnv2_lowrank and mldcn"):
        cut_ranks(ranker({"name": "dnn"}), 2)


def test_a_cut_is_accepted_or_refused_by_what_it_costs_in_auc(tmp_path):
    run = make_run(tmp_path / "run", config(MODELS["dcnv2_lowrank"], SIMPLE))
    model = Predictor.load(run.path, "cpu").model
    with torch.no_grad():
        thin(model, 3)
    save_weights(model, run.weights)
    run.finish()
    file = learnable(run, tmp_path)

    def export(rank, loss, **options):
        return export_run(
            Predictor.load(run.path, "cpu"),
            "torch-export",
            tmp_path / "bundle",
            max_rank=rank,
            max_auc_loss=loss,
            overwrite=True,
            **options,
        )

    made = export(3, 0.001, validation_log=[file])
    assert made.difference < 1e-5
    assert made.cut == (2 * 4 * 11 * D, 2 * 4 * 3 * D)
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["max_rank"] == 3
    rows = log(20)
    engine = Engine.load(tmp_path / "bundle", "cpu")
    given = {each.name: rows.column(each.name) for each in engine.inputs}
    expected = Predictor.load(run.path, "cpu").predict_table(rows)
    np.testing.assert_allclose(engine.score(given).probabilities, expected, atol=1e-5, rtol=0)
    made = export(1, 0.5, validation_log=[file])
    assert made.difference > 1e-3
    loss = -min(each.low for each in made.auc.values())
    assert loss > 0
    with pytest.raises(UserError, match="a loss of more than --max-auc-loss .* is not excluded"):
        export(1, loss / 2, validation_log=[file])
    with pytest.raises(UserError, match="--max-rank 1: say what it may cost"):
        export(1, None)


def test_the_command_takes_a_rank(tmp_path):
    run = make_run(tmp_path / "run", config(MODELS["mldcn"], SIMPLE))
    arguments = ["export", str(run.path), "--out", str(tmp_path / "bundle"), "--max-rank", "3"]
    done = CliRunner().invoke(app, arguments)
    assert "--max-rank 3: say what it may cost" in str(done.exception)
    arguments += ["--validation", str(learnable(run, tmp_path)), "--max-auc-loss", "0.9"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "FLOPs of the cross layers per row" in done.output
