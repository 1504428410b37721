"""The main job through the command line, on a small log with a pattern to learn."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from mldcn import CTRModel, cli
from mldcn.errors import UserError
from mldcn.predict import Predictor
from mldcn.run import RunFolder

ROWS = 6000


def make_log(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    user, ad, price = rng.integers(0, 40, rows), rng.integers(0, 30, rows), rng.exponential(5, rows)
    logit = 3.0 * ((user % 3) == (ad % 3)) - 2.5 + 0.2 * np.log1p(price)
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    return pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in user],
            "ad_id": ad,
            "price": np.round(price, 3),
            "hour": rng.integers(0, 24, rows),
            "click": click.astype(int),
        }
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a log, a config and a finished run."""
    folder = tmp_path_factory.mktemp("work")
    make_log().write_csv(folder / "log.csv")
    config = {
        "data": {"train": [str(folder / "log.csv")], "split": {"kind": "hash", "valid": 0.15, "test": 0.15}},
        "schema": {
            "features": [
                {"name": "user_id", "kind": "categorical", "source": "user"},
                {"name": "ad_id", "kind": "categorical", "source": "item"},
                {"name": "price", "kind": "numeric", "transform": "log", "source": "item"},
            ],
            "labels": [{"name": "click"}],
            "user": "user_id",
        },
        "model": {
            "embedding": {"dim": 4},
            "interaction": {"rank": 4, "num_layers": 2, "dropout": 0.0},
            "deep": {"hidden": [8]},
        },
        "training": {"epochs": 5, "batch_size": 64, "threads": 1, "optimiser": {"lr": 0.02}},
    }
    (folder / "mldcn.yaml").write_text(yaml.safe_dump(config))
    run("fit", folder / "mldcn.yaml", "--out", folder / "runs" / "a")
    return folder


def run(*arguments):
    """Calls a command as the shell would; gives its output."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_fit_learns_and_leaves_a_whole_run(work):
    run_folder = RunFolder.open(work / "runs" / "a")
    metrics = run_folder.read_json("metrics.json")
    assert metrics["test"]["click"]["auc"] > 0.75
    assert {"logloss", "ne", "rig", "calibration", "ece", "pr_auc", "gauc"} <= metrics["valid"][
        "click"
    ].keys()
    assert (run_folder.path / "report.html").read_text().startswith("<!")
    assert run_folder.info()["rows"].keys() == {"train", "valid", "test"}
    assert not run_folder.checkpoints.exists()


def test_same_seed_same_weights_bit_for_bit(work):
    run("fit", work / "mldcn.yaml", "--out", work / "runs" / "again")
    a, b = ((work / "runs" / name / "weights.safetensors").read_bytes() for name in ("a", "again"))
    assert a == b
    run("fit", work / "mldcn.yaml", "--out", work / "runs" / "other", "--set", "training.seed=1")
    assert (work / "runs" / "other" / "weights.safetensors").read_bytes() != a


def test_an_interrupted_run_ends_as_if_it_had_not_been(work, monkeypatch):
    from mldcn.training import fit

    whole = fit.Trainer._step
    steps = []

    def dying(self, batch):
        steps.append(1)
        if len(steps) == 100:
            raise KeyboardInterrupt
        return whole(self, batch)

    target = work / "runs" / "resumed"
    monkeypatch.setattr(fit.Trainer, "_step", dying)
    result = CliRunner().invoke(cli.app, ["fit", str(work / "mldcn.yaml"), "--out", str(target)])
    assert result.exit_code != 0
    assert list((target / "checkpoints").glob("step-*"))
    monkeypatch.setattr(fit.Trainer, "_step", whole)
    run("fit", "--resume", target)
    for name in ("weights.safetensors", "metrics.json", "history.jsonl"):
        assert (target / name).read_bytes() == (work / "runs" / "a" / name).read_bytes(), name


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predict_scores_rows_in_order_without_labels(work, suffix):
    fresh = make_log(300, seed=5)
    fresh.drop("click").with_columns(row=pl.int_range(300)).write_csv(work / "fresh.csv")
    target = work / f"scores{suffix}"
    run("predict", work / "runs" / "a", work / "fresh.csv", "--out", target, "--keep", "row")
    scores = pl.read_csv(target) if suffix == ".csv" else pl.read_parquet(target)
    assert scores["row"].cast(int).to_list() == list(range(300))
    direct = Predictor.load(work / "runs" / "a").predict_table(fresh.drop("click").to_arrow())
    np.testing.assert_allclose(scores["p_click"].to_numpy(), direct[:, 0], rtol=1e-5)


def test_evaluate_on_another_log_agrees_with_predictions(work):
    from sklearn.metrics import roc_auc_score

    from mldcn.workflow import evaluate_log

    fresh = make_log(1000, seed=6)
    fresh.write_csv(work / "labelled.csv")
    found = evaluate_log(RunFolder.open(work / "runs" / "a"), [str(work / "labelled.csv")]).metrics["click"]
    scores = Predictor.load(work / "runs" / "a").predict_table(fresh.to_arrow())[:, 0]
    assert found["auc"] == pytest.approx(roc_auc_score(fresh["click"], scores), abs=1e-6)
    assert "auc" in run("evaluate", work / "runs" / "a", work / "labelled.csv")


def test_compare_says_what_is_shown(work):
    run(
        "fit",
        work / "mldcn.yaml",
        "--out",
        work / "runs" / "dnn",
        "--set",
        "model.interaction={name: dnn, hidden: [4]}",
    )
    text = run("compare", work / "runs" / "a", work / "runs" / "dnn", "--repeats", "50")
    assert "DeLong" in text
    assert "bootstrap by user" in text
    same = run("compare", work / "runs" / "a", work / "runs" / "a", "--repeats", "50")
    assert "no difference shown" in same


def test_compare_refuses_different_rows(work):
    settings = ["--set", "data.split={kind: order}", "--set", f"data.encoded={work / 'other-encoded'}"]
    run("fit", work / "mldcn.yaml", "--out", work / "runs" / "split", *settings)
    with pytest.raises(UserError, match="not tested on the same rows"):
        run("compare", work / "runs" / "a", work / "runs" / "split")


def test_calibrated_runs_predict_calibrated(work):
    run(
        "fit", work / "mldcn.yaml", "--out", work / "runs" / "iso", "--set", "evaluation.calibration=isotonic"
    )
    predictor = Predictor.load(work / "runs" / "iso")
    assert set(predictor.calibrators) == {"click"}
    scores = predictor.predict_table(make_log(500, seed=7).to_arrow())
    assert len(np.unique(scores)) < 200  # an isotonic map has steps


def test_init_describe_fit_on_an_unknown_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_log(2000).with_columns(dwell_seconds=pl.when(pl.col("click") == 1).then(12.5)).write_csv("log.csv")
    run("init", "log.csv")
    text = (tmp_path / "mldcn.yaml").read_text()
    assert "dwell_seconds" in text
    config = yaml.safe_load(text)
    assert [label["name"] for label in config["schema"]["labels"]] == ["click"]
    assert "dwell_seconds" not in [f["name"] for f in config["schema"]["features"]]
    assert "click" in run("describe", "mldcn.yaml")
    run("fit", "mldcn.yaml", "--set", "training.epochs=1", "--out", "run")
    with pytest.raises(UserError, match="exists already"):
        run("init", "log.csv")


def test_estimator_on_polars_pandas_and_arrow(tmp_path):
    log = make_log(3000)
    model = CTRModel(
        {"name": "mldcn", "rank": 4, "num_layers": 1},
        label="click",
        model={"embedding": {"dim": 4}},
        training={"epochs": 2, "threads": 1, "batch_size": 128, "optimiser": {"lr": 0.01}},
    )
    features = log.drop("click")
    model.fit(log)
    from_polars = model.predict_proba(features)
    np.testing.assert_array_equal(from_polars, model.predict_proba(features.to_pandas()))
    np.testing.assert_array_equal(from_polars, model.predict_proba(features.to_arrow()))
    assert from_polars.sum(axis=1) == pytest.approx(np.ones(3000))
    model.save(tmp_path / "saved")
    loaded = CTRModel.load(tmp_path / "saved")
    np.testing.assert_array_equal(from_polars, loaded.predict_proba(features))
    assert loaded.get_params()["interaction"]["rank"] == 4
    with pytest.raises(UserError, match="has a column 'click' already"):
        model.fit(log, log["click"])
    with pytest.raises(UserError, match="has a column 'click' already"):
        CTRModel(schema=loaded.schema).fit(log, log["click"])
    with pytest.raises(UserError, match="not trained"):
        CTRModel().predict(features)
    with pytest.raises(UserError, match="expected a Polars"):
        model.predict([[1, 2]])


def test_errors_are_one_line_on_stderr_and_exit_1(work, capsys, monkeypatch):
    error = fails(capsys, monkeypatch, "fit", work / "none.yaml")
    assert error == f"mldcn: {work / 'none.yaml'}: cannot be read (No such file or directory)\n"


def test_a_wrong_interaction_is_refused_before_anything_is_written(work):
    with pytest.raises(UserError, match="did you mean 'rank'"):
        run("fit", work / "mldcn.yaml", "--out", work / "runs" / "bad", "--set", "model.interaction={rnk: 4}")
    assert not (work / "runs" / "bad").exists()


def test_a_damaged_run_is_refused(work):
    shutil.copytree(work / "runs" / "a", work / "runs" / "damaged")
    weights = work / "runs" / "damaged" / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UserError, match="damaged"):
        Predictor.load(work / "runs" / "damaged")


def test_history_has_a_line_an_evaluation(work):
    lines = [json.loads(line) for line in (work / "runs" / "a" / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "command",
    ["init", "describe", "fit", "evaluate", "predict", "compare", "models", "cost", "study", "demo"],
)
def test_help_carries_an_example(command):
    assert "Example: mldcn" in run(command, "--help")


def fails(capsys, monkeypatch, *arguments):
    """Runs a command as the shell would, expecting exit code 1; gives what it wrote to stderr."""
    monkeypatch.setattr("sys.argv", ["mldcn", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_bug_is_one_line_too_and_a_traceback_where_asked(work, capsys, monkeypatch):
    from mldcn import workflow

    def broken(*_, **__):
        raise KeyError("oops")

    monkeypatch.setattr(workflow, "compare", broken)
    runs = [work / "runs" / "a", work / "runs" / "a"]
    error = fails(capsys, monkeypatch, "compare", *runs)
    assert error.startswith("mldcn: internal error, KeyError")
    assert "Traceback" not in error
    monkeypatch.setenv("MLDCN_TRACEBACK", "")
    assert "Traceback" in fails(capsys, monkeypatch, "--traceback", "compare", *runs)


def test_a_finished_run_is_not_resumed_or_changed(work, capsys, monkeypatch):
    run_path = work / "runs" / "a"
    assert "is finished" in fails(capsys, monkeypatch, "fit", "--resume", run_path)
    assert "--set changes a new run" in fails(
        capsys, monkeypatch, "fit", "--resume", run_path, "--set", "a=1"
    )
    assert "--out and --force are for a new run" in fails(
        capsys, monkeypatch, "fit", "--resume", run_path, "--out", work / "elsewhere"
    )
    assert "holds a run already" in fails(capsys, monkeypatch, "fit", work / "mldcn.yaml", "--out", run_path)
