"""``mldcn explain`` on runs that were trained on a planted log."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from planted import FIELDS, call, write_config, write_log
from typer.testing import CliRunner

from mldcn import cli
from mldcn.config import load_config
from mldcn.data.shards import EncodedRows
from mldcn.errors import UserError
from mldcn.explain import explain as look
from mldcn.explain.explanation import initial_model
from mldcn.explain.sample import draw_sample
from mldcn.model import Ranker
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.workflow import encoded_folder, explain

MODELS = {
    "dcnv2": {"name": "dcnv2", "num_layers": 1},
    "mldcn": {"name": "mldcn", "num_layers": 2, "rank": 8},
    "masknet": {"name": "masknet_parallel", "num_blocks": 1, "width": 8},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The log, a run of each model, and another day's log."""
    folder = tmp_path_factory.mktemp("explain")
    write_log(folder / "log.csv", 6000, seed=0)
    write_log(folder / "next.csv", 700, seed=1)
    for name, interaction in MODELS.items():
        labels = ("click", "save") if name == "masknet" else ("click",)
        write_config(folder / f"{name}.yaml", folder / "log.csv", interaction, labels)
        call("fit", folder / f"{name}.yaml", "--out", folder / "runs" / name)
    return folder


@pytest.fixture(scope="module")
def found(work):
    """Each run's explanation as plain data, the command's words, and the page."""
    told = {}
    for name in MODELS:
        words = call("explain", work / "runs" / name, "--row", 3)
        folder = work / "runs" / name / "explain"
        page = (folder / "explain.html").read_text(encoding="utf-8")
        told[name] = (json.loads((folder / "explain.json").read_text(encoding="utf-8")), words, page)
    return told


@pytest.mark.parametrize("name", ["dcnv2", "mldcn"])
def test_the_planted_pair_has_the_strongest_blocks(found, name):
    plain, words, page = found[name]
    first, second, *_ = plain["crosses"][0]["pairs"]
    assert (first["a"], first["b"]) == ("user", "ad")
    assert first["norm"] > 1.15 * second["norm"]
    for shown in (words, page):
        assert "user × ad" in shown
        assert "Training changed most those of user × ad" in shown
    norms, signal, changed = (np.array(plain["crosses"][0][key]) for key in ("norms", "signal", "changed"))
    assert plain["fields"] == [*FIELDS, "price"]
    assert norms.shape == signal.shape == changed.shape == (5, 5)
    for blocks in (signal, changed):
        pairs = np.triu(np.hypot(blocks, blocks.T)[:4, :4], 1)  # the price is a number: another scale
        assert np.unravel_index(pairs.argmax(), pairs.shape) == (0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_planted_features_are_the_important_ones(found, name):
    plain, words, _ = found[name]
    of_click = [i for i in plain["importances"] if i["task"] == "click"]
    by_name = {i["feature"]: i for i in of_click if i["metric"] == "auc"}
    assert set(by_name) == {*FIELDS, "price"}
    for feature in ("user", "ad"):
        assert 0.2 < by_name[feature]["low"] < by_name[feature]["drop"] < by_name[feature]["high"] < 0.35
    for feature in ("place", "hour", "price"):
        assert abs(by_name[feature]["drop"]) < 0.03
    losses = {i["feature"]: i["drop"] for i in of_click if i["metric"] == "logloss"}
    assert min(losses["user"], losses["ad"]) > 0.2
    assert plain["unit"] == "request"
    assert (plain["rows"], plain["total"]) == (1503, 1503)
    assert "1,503 of 1,503 rows (the run's test rows)" in " ".join(words.split())
    groups = {
        i["feature"]: i["drop"] for i in plain["groups"] if (i["task"], i["metric"]) == ("click", "auc")
    }
    assert set(groups) == {"user", "item", "context"}
    assert groups["user"] > 0.2 > 0.03 > abs(groups["context"])


def test_every_task_has_its_own_importance(found):
    plain, words, page = found["masknet"]
    saves = {i["feature"]: i for i in plain["importances"] if (i["task"], i["metric"]) == ("save", "auc")}
    assert saves["place"]["low"] > 0.1
    assert all(abs(saves[name]["drop"]) < 0.03 for name in saves if name != "place")
    assert "The other tasks: save" in page
    assert "save: AUC" in words


def test_the_auc_is_that_of_the_runs_test_rows(work, found):
    for name in MODELS:
        measured = RunFolder(work / "runs" / name).read_json("metrics.json")["test"]["click"]
        assert found[name][0]["metrics"]["click"]["auc"] == pytest.approx(measured["auc"], abs=1e-6)
        assert found[name][0]["metrics"]["click"]["logloss"] == pytest.approx(measured["logloss"], abs=1e-6)


def test_the_spectrum_of_training_is_set_against_that_of_the_first_weights(work, found):
    layer = found["dcnv2"][0]["crosses"][0]
    predictor = Predictor.load(work / "runs" / "dcnv2")
    for which, model in (("learned", predictor.model), ("initial", initial_model(predictor))):
        weight = model.scorer.interaction.layers[0].linear.weight.detach().double().numpy()
        expected = np.linalg.svd(weight, compute_uv=False)
        np.testing.assert_allclose(layer[which]["values"], expected, rtol=1e-4)
        rank = int((expected >= 0.1 * expected[0]).sum())
        assert layer[which]["ranks"]["0.1"] == rank
    assert layer["learned"]["values"] != layer["initial"]["values"]


def test_the_first_weights_are_those_that_training_began_with(work, monkeypatch):
    kept = []
    monkeypatch.setattr(Ranker, "to", lambda self, device: kept.append(copy_of(self)) or self)
    call("fit", work / "mldcn.yaml", "--out", work / "again", "--set", "training.epochs=1")
    first = kept[0]
    monkeypatch.undo()
    predictor = Predictor.load(work / "again")
    state = torch.random.get_rng_state()
    drawn = initial_model(predictor).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.keys() == drawn.keys()
    assert all(torch.equal(first[key], drawn[key]) for key in first)


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_run_that_began_with_another_ones_weights_is_not_set_against_its_seeds(work):
    write_config(work / "warm.yaml", work / "next.csv", MODELS["dcnv2"], epochs=1)
    call("fit", work / "warm.yaml", "--warm-start", work / "runs" / "dcnv2", "--out", work / "runs" / "warm")
    found, page = explain(RunFolder.open(work / "runs" / "warm"))
    assert found.warm
    assert found.crosses[0].changed is None
    assert "began with another run&#x27;s weights" in page.read_text(encoding="utf-8")


def test_masks_and_the_chosen_row_are_told(work, found):
    plain, words, page = found["mldcn"]
    assert [mask["name"] for mask in plain["masks"]] == ["layer 1", "layer 2"]
    assert list(plain["masks"][0]["by_field"]) == [*FIELDS, "price"]
    assert list(plain["masks"][0]["by_source"]) == ["user", "item", "context"]
    assert plain["row"] == 3
    assert "The masks of row 3" in page
    assert "near zero" in words
    predictor = Predictor.load(work / "runs" / "mldcn")
    rows = draw_sample(_test_rows(work), 10_000, 0)
    ids, dense = torch.from_numpy(rows.ids), torch.from_numpy(rows.dense)
    with torch.no_grad():
        x0 = predictor.model.embed(ids, dense)
        masks = predictor.model.scorer.interaction.layers[0].mask(x0)
        score = torch.sigmoid(predictor.model(ids[3:4], dense[3:4]))
    whole = plain["masks"][0]["whole"]
    assert whole["mean"] == pytest.approx(float(masks.mean()), rel=1e-4)
    assert whole["spread"] == pytest.approx(float(masks.std(correction=0)), rel=1e-4)
    assert plain["scores"]["click"] == pytest.approx(score.item(), rel=1e-5)
    assert plain["labels"]["click"] == rows.labels[3, 0]
    first = plain["example"][0]["directions"][0]
    assert first["mask"] == pytest.approx(float(masks[3, first["number"]]), rel=1e-4)
    assert first["mean"] == pytest.approx(float(masks[:, first["number"]].mean()), rel=1e-4)
    assert sum(share for _, share in first["fields"]) == pytest.approx(1)
    above = [d["mask"] - d["mean"] for d in plain["example"][0]["directions"]]
    assert above == sorted(above, reverse=True)


def _test_rows(work, name="dcnv2"):
    config = load_config(work / "runs" / name / "config.yaml")
    return EncodedRows(encoded_folder(config, work / "runs" / name) / "test")


def test_an_architecture_without_crosses_says_so_and_has_its_importance(found):
    plain, words, page = found["masknet"]
    assert plain["crosses"] == []
    for shown in (words, page):
        assert "has no matrix that crosses fields" in " ".join(shown.split())
    assert [mask["name"] for mask in plain["masks"]] == ["block 1"]


def test_pages_stand_alone_and_have_their_tables_and_pictures_as_files(work, found):
    for name in MODELS:
        page = found[name][2]
        assert "http://" not in page.replace("http://www.w3.org", "")
        assert "<script" not in page
        folder = work / "runs" / name / "explain"
        assert (folder / "importance-click.svg").exists()
        assert (folder / "importance-click-features.csv").exists()
        assert (folder / "blocks-layer-1.svg").exists() == (name != "masknet")
    RunFolder.open(work / "runs" / "mldcn")  # the run is as sound as it was


def test_a_sample_of_another_log_is_drawn_and_its_size_told(work):
    out = work / "elsewhere"
    words = call("explain", work / "runs" / "dcnv2", "--log", work / "next.csv", "--out", out)
    plain = json.loads((out / "explain.json").read_text(encoding="utf-8"))
    assert (plain["where"], plain["rows"], plain["total"]) == ("another log", 700, 700)
    assert "700 of 700" in " ".join(words.split())
    rows = _test_rows(work)
    few = draw_sample(rows, 100, seed=1)
    assert (len(few), few.total) == (100, 1503)
    assert (np.diff(few.numbers) > 0).all()
    np.testing.assert_array_equal(few.ids, draw_sample(rows, 5000, 0).ids[few.numbers])
    assert len(set(few.clusters)) > 80
    assert not np.array_equal(few.numbers, draw_sample(rows, 100, seed=2).numbers)


def test_importance_does_not_hang_on_the_row_or_on_batches(work, found):
    predictor = Predictor.load(work / "runs" / "dcnv2")
    training = predictor.config.training.model_copy(update={"eval_batch_size": 97})
    predictor.config = predictor.config.model_copy(update={"training": training})
    plain = look(predictor, _test_rows(work), "the run's test rows", row=1500).to_json()
    before = found["dcnv2"][0]["importances"]
    for now, then in zip(plain["importances"], before, strict=True):
        assert now["drop"] == pytest.approx(then["drop"], abs=1e-5)


def test_mistakes_are_named_with_their_remedy(work, tmp_path):
    refused(work / "runs" / "dcnv2", "--row", 1503, says="the rows are numbered from 0 to 1,502")
    moved = tmp_path / "dcnv2"
    shutil.copytree(work / "runs" / "dcnv2", moved)
    refused(moved, says="the run's encoded rows are gone; name a log with labels with --log")
    folder = _test_rows(work).folder.parent
    shutil.copytree(folder, tmp_path / "encoded" / folder.name)
    shutil.rmtree(tmp_path / "encoded" / folder.name / "test")
    refused(moved, says="the run has no test rows; name a log with labels with --log")
    one_class = tmp_path / "ones.csv"
    pl.read_csv(work / "next.csv").with_columns(click=pl.lit(1)).write_csv(one_class)
    refused(moved, "--log", one_class, says="every label has one class only")
    out = explain(RunFolder.open(moved), [str(work / "next.csv")], out=tmp_path / "out")[1]
    assert out == tmp_path / "out" / "explain.html"


def refused(*arguments, says):
    result = CliRunner().invoke(cli.app, ["explain", *map(str, arguments)])
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)


def test_json_has_no_nan(work):
    text = (work / "runs" / "dcnv2" / "explain" / "explain.json").read_text(encoding="utf-8")

    def odd(value):
        raise AssertionError(value)

    assert json.loads(text, parse_constant=odd)["format"] == 1
