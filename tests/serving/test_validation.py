"""What an export costs in AUC is measured as evaluation measures it, and refused where it is too much."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from every_feature import LABELS, SIMPLE, config, log, make_run
from mldcn import workflow
from mldcn.cli import app
from mldcn.errors import UserError
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.serving.export import export_run
from mldcn.serving.validation import described, validation

MODEL = {"name": "mldcn", "rank": 4, "num_layers": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("judged") / "run",
        config(MODEL, SIMPLE, evaluation={"calibration": "platt"}),
    )


def learnable(run, tmp_path, rows=2000):
    """A log whose clicks follow the run's own scores at their positions."""
    predictor = Predictor.load(run.path, "cpu")
    table = log(rows, seed=5)
    scores = predictor.predict_table(table)
    rng = np.random.default_rng(0)
    for i, name in enumerate(("click", "save")):
        table = table.set_column(
            table.column_names.index(name), name, pa.array(rng.random(rows) < scores[:, i])
        )
        table = table.set_column(table.column_names.index(name), name, pc.cast(table[name], pa.int64()))
    pq.write_table(table, tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def test_the_runs_auc_is_that_of_evaluation_and_an_exact_export_changes_none(run, tmp_path):
    file = learnable(run, tmp_path)
    expected = workflow.evaluate_log(RunFolder.open(run.path), [str(file)]).metrics
    made = export_run(
        Predictor.load(run.path, "cpu"),
        "torch-export",
        tmp_path / "bundle",
        validation_log=[file],
        max_auc_loss=1e-4,
    )
    assert set(made.auc) == {"click", "save"}
    for task, change in made.auc.items():
        assert change.a == pytest.approx(expected[task]["auc"], abs=1e-9)
        assert change.a > 0.55
        assert abs(change.delta) < 1e-5
    facts = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert facts["auc"]["click"] == {"run": made.auc["click"].a, "bundle": made.auc["click"].b}


def test_a_worse_program_is_measured_and_refused(run, tmp_path):
    file = learnable(run, tmp_path)
    predictor = Predictor.load(run.path, "cpu")
    with validation(predictor, [file]) as judge:
        assert len(judge) == 2000
        change = judge.auc_change(lambda ids, dense: -predictor.model(*_tensors(ids, dense)).detach().numpy())
        with pytest.raises(UserError, match="scores that are no numbers"):
            judge.auc_change(lambda ids, dense: np.full((len(ids), 2), np.nan, np.float32))
    assert change["save"].b == pytest.approx(1 - change["save"].a, abs=0.02)  # but for the positions' terms
    assert "click AUC: 0." in next(described(change))

    def export(**options):
        predictor = Predictor.load(run.path, "cpu")
        return export_run(
            predictor,
            "torch-export",
            tmp_path / "bundle",
            embeddings="int8",
            validation_log=[file],
            **options,
        )

    loss = -min(each.low for each in export(overwrite=True).auc.values())
    assert 0 < loss < 0.01
    export(overwrite=True, max_auc_loss=2 * loss)
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="a loss of more than --max-auc-loss .* is not excluded"):
        export(overwrite=True, max_auc_loss=loss / 2)
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="--max-auc-loss: a number above 0, with a log"):
        export_run(Predictor.load(run.path, "cpu"), "torch-export", tmp_path / "other", max_auc_loss=0.1)


def _tensors(ids, dense):
    import torch

    return torch.from_numpy(ids), torch.from_numpy(dense)


def test_weights_count_and_tasks_of_one_class_are_left_out(tmp_path):
    made = config(MODEL, SIMPLE, LABELS)
    raw = made.model_dump(by_alias=True)
    raw["schema"]["weight"] = "time"
    run = make_run(tmp_path / "run", type(made).model_validate(raw))
    table = log(500, seed=2)
    table = table.set_column(table.column_names.index("save"), "save", pa.array([0] * 500))
    pq.write_table(table, tmp_path / "log.parquet")
    predictor = Predictor.load(run.path, "cpu")
    expected = workflow.evaluate_log(RunFolder.open(run.path), [str(tmp_path / "log.parquet")]).metrics
    with validation(predictor, [tmp_path / "log.parquet"]) as judge:
        change = judge.auc_change(lambda ids, dense: predictor.model(*_tensors(ids, dense)).detach().numpy())
    assert set(change) == {"click"}
    assert change["click"].a == pytest.approx(expected["click"]["auc"], abs=1e-9)
    none = table.set_column(table.column_names.index("click"), "click", pa.array([1] * 500))
    pq.write_table(none, tmp_path / "none.parquet")
    with (
        pytest.raises(UserError, match="none.parquet: no task has positive and negative labels"),
        validation(predictor, [tmp_path / "none.parquet"]),
    ):
        pass


def test_the_command_shows_the_change(run, tmp_path):
    file = learnable(run, tmp_path, 500)
    arguments = ["export", str(run.path), "--out", str(tmp_path / "bundle"), "--embeddings", "int8"]
    done = CliRunner().invoke(app, [*arguments, "--validation", str(file)])
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "click AUC: 0." in words
    assert "95 % interval" in words
