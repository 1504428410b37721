"""fit --warm-start and fit --repeats through the command line."""

import json
from itertools import combinations

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from mldcn import CTRModel, cli
from mldcn.comparison import PredictionWriter, agreement, read_predictions
from mldcn.errors import UserError
from mldcn.predict import Predictor
from mldcn.run import RunFolder


def write_day(path, day, rows=1200):
    rng = np.random.default_rng(day)
    user, ad = rng.integers(0, 30 + 5 * day, rows), rng.integers(0, 10 * day, rows)
    click = rng.random(rows) < 1 / (1 + np.exp(2.0 - 2.5 * ((user % 3) == (ad % 3))))
    frame = pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "ad": ad,
            "price": rng.exponential(day, rows),
            "click": click.astype(int),
        }
    )
    frame.write_csv(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two days' logs, their configs, and a run on the first."""
    folder = tmp_path_factory.mktemp("retraining")
    for day in (1, 2):
        write_day(folder / f"{day}.csv", day)
        config = {
            "data": {
                "train": [str(folder / f"{day}.csv")],
                "split": {"kind": "hash", "valid": 0.2, "test": 0.2},
            },
            "schema": {
                "features": [
                    {"name": "user", "kind": "categorical", "source": "user"},
                    {"name": "ad", "kind": "categorical", "source": "item"},
                    {"name": "price", "kind": "numeric", "transform": "log", "source": "item"},
                ],
                "labels": [{"name": "click"}],
            },
            "model": {"embedding": {"dim": 4}, "interaction": {"rank": 4, "num_layers": 1}},
            "training": {"epochs": 2, "batch_size": 128, "threads": 1, "optimiser": {"lr": 0.02}},
        }
        (folder / f"{day}.yaml").write_text(yaml.safe_dump(config))
    run("fit", folder / "1.yaml", "--out", folder / "one", "--set", "training.keep_optimiser=true")
    return folder


def call(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_next_day_is_evaluated_before_and_trained_on_after(work):
    assert "auc" in run("evaluate", work / "one", work / "2.csv")
    run("fit", work / "2.yaml", "--warm-start", work / "one", "--optimiser", "keep", "--statistics", "refresh",
        "--out", work / "two")  # fmt: skip
    info = RunFolder.open(work / "two").info()["warm_start"]
    assert (info["statistics"], info["optimiser"]) == ("refresh", "keep")
    old, new = (Predictor.load(work / name).encoder for name in ("one", "two"))
    assert new.tables["ad"].rows > old.tables["ad"].rows
    assert info["tables"]["ad"] == {"had": old.tables["ad"].rows, "has": new.tables["ad"].rows}
    assert new.tables["ad"].values[: len(old.tables["ad"].values)].equals(old.tables["ad"].values)
    # The encoded rows lie apart from those that were encoded without the old vocabularies.
    assert len([p for p in (work / "encoded").iterdir() if p.is_dir()]) == 2
    assert "auc" in run("evaluate", work / "two", work / "1.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2.yaml", "--optimiser", "keep"], "go with --warm-start"),
        (["--resume", "one", "--warm-start", "one"], "are for a new run"),
        (["--resume", "one", "--repeats", "2"], "are for a new run"),
        (["2.yaml", "--warm-start", "nowhere"], "is no run's folder"),
        (["2.yaml", "--warm-start", "one", "--out", "one", "--force"], "start"),
        (
            ["2.yaml", "--warm-start", "one", "--set", "model.interaction.rank=3", "--out", "x"],
            "rank is 3 here",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_touched(work, monkeypatch, arguments, message):
    monkeypatch.chdir(work)
    with pytest.raises(UserError, match=message):
        call("fit", *arguments)
    RunFolder.open(work / "one")
    assert not (work / "x").exists()


def interrupt(patch, when):
    """Ctrl-C at the first step for which ``when(trainer)`` holds."""
    from mldcn.training.fit import Trainer

    step = Trainer._step

    def stop(trainer, batch):
        if when(trainer):
            raise KeyboardInterrupt
        return step(trainer, batch)

    patch.setattr(Trainer, "_step", stop)


def test_an_interrupted_warm_start_goes_on_to_the_same_weights(work, monkeypatch, tmp_path):
    arguments = ["fit", work / "2.yaml", "--warm-start", work / "one", "--optimiser", "keep"]
    arguments += ["--set", "training.checkpoint_steps=2"]
    run(*arguments, "--out", tmp_path / "whole")
    for step in (0, 3):
        out = tmp_path / f"killed-{step}"
        with monkeypatch.context() as patch:
            interrupt(patch, lambda trainer, step=step: trainer.position.step == step)
            call(*arguments, "--out", out)
        assert not (out / "manifest.json").exists()
        run("fit", "--resume", out)
        assert (out / "weights.safetensors").read_bytes() == (
            tmp_path / "whole" / "weights.safetensors"
        ).read_bytes()


def test_repeats_trains_copies_and_tells_how_far_they_differ(work, tmp_path, monkeypatch):
    out = tmp_path / "copies"
    arguments = ["fit", work / "1.yaml", "--repeats", 3, "--out", out, "--set", "training.seed=5"]
    with monkeypatch.context() as patch:
        interrupt(patch, lambda trainer: trainer.config.training.seed == 6 and trainer.position.step == 3)
        call(*arguments)
    assert not (out / "repeats.json").exists()
    first = (out / "seed-5" / "run.json").stat().st_mtime_ns
    shown = run(*arguments)
    assert (out / "seed-5" / "run.json").stat().st_mtime_ns == first  # finished copies are left alone
    assert "deviation" in shown
    assert "mean absolute difference" in shown
    runs = [RunFolder.open(out / f"seed-{seed}") for seed in (5, 6, 7)]
    told = json.loads((out / "repeats.json").read_text())
    assert told["seeds"] == [5, 6, 7]
    aucs = [folder.read_json("metrics.json")["test"]["click"]["auc"] for folder in runs]
    assert len(set(aucs)) == 3
    spread = told["metrics"]["test"]["click"]["auc"]
    assert spread["values"] == aucs
    assert spread["mean"] == pytest.approx(np.mean(aucs), abs=1e-12)
    assert spread["deviation"] == pytest.approx(np.std(aucs, ddof=1), abs=1e-12)
    scores = [read_predictions(folder.predictions)["p_click"].to_numpy().astype(float) for folder in runs]
    expected = np.mean([np.abs(a - b).mean() for a, b in combinations(scores, 2)])
    found = told["predictions"]["click"]
    assert found["difference"] == pytest.approx(expected, rel=1e-9)
    assert found["relative"] == pytest.approx(expected / np.mean(scores), rel=1e-9)
    assert found["rows"] == len(scores[0])
    assert (out / "repeats.html").read_text().startswith("<!DOCTYPE")
    assert "Mean absolute difference" in (out / "repeats.md").read_text()
    assert len([p for p in (out / "encoded").iterdir() if p.is_dir()]) == 1  # encoded once
    # A copy is the run that its seed gives, also where it was interrupted.
    run("fit", work / "1.yaml", "--out", tmp_path / "six", "--set", "training.seed=6")
    assert (tmp_path / "six" / "weights.safetensors").read_bytes() == runs[1].weights.read_bytes()
    with pytest.raises(UserError, match=r"seed-5: holds a copy of another config.*--force"):
        call(*arguments, "--set", "training.epochs=3")


def test_an_estimator_goes_on_with_newer_rows(work):
    rows = pl.read_csv(work / "2.csv")
    model = CTRModel.load(work / "one").fit(rows, warm_start=work / "one")
    assert model.predict_proba(rows).shape == (len(rows), 2)
    assert model.predictor_.encoder.tables["ad"].rows > Predictor.load(work / "one").encoder.tables["ad"].rows
    with pytest.raises(UserError, match="model.embedding.dims.user is 16 here"):
        CTRModel({"name": "mldcn", "rank": 9}, schema=model.schema).fit(rows, warm_start=work / "one")


def test_copies_may_begin_with_a_run(work, tmp_path):
    run("fit", work / "2.yaml", "--repeats", 2, "--warm-start", work / "one", "--out", tmp_path / "copies")
    for seed in (0, 1):
        assert RunFolder.open(tmp_path / "copies" / f"seed-{seed}").info()["warm_start"]["tables"]
    with pytest.raises(UserError, match="another config"):
        call("fit", work / "2.yaml", "--repeats", 2, "--out", tmp_path / "copies")


def write_scores(path, scores, labels=None, chunk=4):
    labels = np.full(scores.shape, np.nan) if labels is None else labels
    with PredictionWriter(path, tuple("ab"[: scores.shape[1]])) as writer:
        for start in range(0, len(scores), chunk):
            rows = slice(start, start + chunk)
            ones = np.ones(len(scores[rows]), np.float32)
            ids = np.arange(len(ones), dtype=np.int64)
            writer.write(labels[rows].astype(np.float32), scores[rows].astype(np.float32), ones, ids, ids)
    return path


def test_agreement_by_hand_and_over_batches(tmp_path):
    a, b, c = (
        np.array([[0.1, 0.5], [0.2, 0.5]]),
        np.array([[0.2, 0.5], [0.4, 0.5]]),
        np.array([[0.1, 0.8]] * 2),
    )
    files = [write_scores(tmp_path / f"{i}.arrow", s, chunk=1) for i, s in enumerate((a, b, c))]
    found = agreement(files)
    # Task a: pairs differ by 0.1, 0, 0.1 in the first row and by 0.2, 0.1, 0.3 in the second.
    assert found["a"].difference == pytest.approx((0.2 + 0.6) / 6, rel=1e-6)
    assert found["a"].mean == pytest.approx(1.1 / 6, rel=1e-6)
    assert found["a"].relative == pytest.approx(0.8 / 1.1, rel=1e-6)
    assert found["b"].difference == pytest.approx(0.2, rel=1e-6)
    same = agreement([files[0], files[0]])
    assert same["a"].difference == 0


def test_agreement_refuses_other_rows_and_damaged_files(tmp_path):
    scores = np.full((6, 1), 0.5)
    one = write_scores(tmp_path / "1.arrow", scores, np.zeros((6, 1)))
    for other in (
        write_scores(tmp_path / "2.arrow", scores, np.ones((6, 1))),
        write_scores(tmp_path / "3.arrow", scores[:4], np.zeros((4, 1))),
        write_scores(tmp_path / "4.arrow", scores[:5], np.zeros((5, 1))),
    ):
        with pytest.raises(UserError, match="not tested on the same rows"):
            agreement([one, other])
    (tmp_path / "5.arrow").write_bytes(one.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged"):
        agreement([one, tmp_path / "5.arrow"])
    assert pa.ipc.open_file(str(one)).num_record_batches == 2
