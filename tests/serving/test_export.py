"""Exported programs compute what the trained model does, for every target and every kind of feature."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from every_feature import SIMPLE, columns, config, log, make_run
from mldcn.cli import app
from mldcn.data.reading import table_blocks
from mldcn.errors import UserError
from mldcn.metrics import Isotonic, Platt
from mldcn.predict import Predictor, calibrated, unsampled
from mldcn.serving.engine import Engine
from mldcn.serving.export import export_run
from mldcn.serving.whole import _Served

ROWS = 10_000
SPINNING = "session.intra_op.allow_spinning"
MODELS = {
    "mldcn": {"name": "mldcn", "rank": 4, "num_layers": 2},
    "dcnv2": {"name": "dcnv2", "num_layers": 2},
    "tokens": {"name": "autoint"},
    "sides": {"name": "deepfm"},
    "fp32 in part": {"name": "afn", "num_neurons": 8},
    "per task": {"name": "mmoe"},
}


@pytest.fixture(scope="module")
def rows():
    return log(ROWS, seed=7, unseen=True)


def bundled(tmp_path, config, to, **options):
    """A run, its bundle's engine, and what the export said."""
    run = make_run(tmp_path / "run", config)
    made = export_run(Predictor.load(run.path, "cpu"), to, tmp_path / "bundle", **options)
    return Predictor.load(run.path, "cpu"), Engine.load(tmp_path / "bundle", "cpu"), made


def given(engine, rows):
    return {each.name: rows.column(each.name) for each in engine.inputs}


@pytest.mark.parametrize("name", MODELS)
def test_a_portable_program_equals_the_run(tmp_path, rows, name):
    predictor, engine, made = bundled(tmp_path, config(MODELS[name]), "torch-export")
    expected = predictor.predict_table(rows)
    found = engine.score(given(engine, rows)).probabilities
    assert found.shape == (ROWS, 2)
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert made.difference < 1e-5
    for count in (0, 1, 2, 3, 17):
        part = engine.score(given(engine, rows.slice(5, count))).probabilities
        np.testing.assert_allclose(part, expected[5 : 5 + count], atol=1e-5, rtol=0)
    plain = columns(rows.slice(0, 50), [each.name for each in engine.inputs])
    np.testing.assert_allclose(
        engine.score(json.loads(json.dumps(plain))).probabilities, expected[:50], atol=1e-5, rtol=0
    )
    plain["age"][3] = "old"
    with pytest.raises(UserError, match="row 4, column 'age': 'old' is not a number"):
        engine.score(plain)


@pytest.mark.parametrize("name", ["mldcn", "sides"])
def test_an_onnx_file_equals_the_run_in_onnx_runtime_alone(tmp_path, rows, name):
    made = config(MODELS[name], evaluation={"calibration": "platt"})
    predictor, engine, _ = bundled(tmp_path, made, "onnx")
    expected = predictor.predict_table(rows)
    np.testing.assert_allclose(engine.score(given(engine, rows)).probabilities, expected, atol=1e-5, rtol=0)
    (block,) = table_blocks(rows, ROWS)
    encoded = predictor.encoder.encode(block, labels=False)
    file = tmp_path / "bundle" / "model.onnx"
    session = onnxruntime.InferenceSession(file)
    for count in (1, 2, 333, ROWS):
        inputs = {"ids": encoded.ids[:count], "dense": encoded.dense[:count]}
        (found,) = session.run(["probabilities"], inputs)
        np.testing.assert_allclose(found, expected[:count], atol=1e-5, rtol=0)
    model = onnx.load(file)
    assert {each.domain: each.version for each in model.opset_import}[""] == 20
    assert {node.domain for node in model.graph.node} == {""}
    assert {each.key: each.value for each in model.metadata_props}["tasks"] == "click,save"
    if name == "mldcn":
        run_documented_lines(tmp_path / "bundle")


def run_documented_lines(bundle):
    """Where neither mldcn nor PyTorch can be imported."""
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    lines = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    without = "import sys; sys.modules.update(torch=None, mldcn=None)\n"
    done = subprocess.run(
        [sys.executable, "-c", without + lines], cwd=bundle, capture_output=True, text=True, check=True
    )
    found = ast.literal_eval(done.stdout)
    assert found.keys() == {"click", "save"}
    assert len(set(found["click"])) == 1
    assert 0 < found["click"][0] < 1


def test_a_compiled_program_equals_the_run(small_run, compiled_bundle):
    predictor, engine = Predictor.load(small_run.path, "cpu"), Engine.load(compiled_bundle)
    rows = log(ROWS, seed=8, unseen=True)
    expected = predictor.predict_table(rows)
    for count in (0, 1, 2, 3, 17, ROWS):
        found = engine.score(given(engine, rows.slice(0, count))).probabilities
        np.testing.assert_allclose(found, expected[:count], atol=1e-5, rtol=0)
    facts = json.loads((compiled_bundle / "bundle.json").read_text())
    assert facts["torch"] == torch.__version__
    from mldcn.serving.bundle import open_program

    with pytest.raises(UserError, match="was compiled for PyTorch 1.0, this is"):
        open_program(compiled_bundle, {**facts, "torch": "1.0"}, "cpu")
    with pytest.raises(UserError, match="was compiled for another, this machine is"):
        open_program(compiled_bundle, {**facts, "machine": "another"}, "cpu")


@pytest.mark.parametrize(
    ("to", "embeddings", "bound"),
    [
        ("torch-export", "int8", 0.02),
        ("onnx", "int8", 0.02),
        ("torch-export", "int4", 0.2),
        ("onnx", "int4", 0.2),
    ],
)
def test_quantised_tables_change_little_and_take_less(tmp_path, rows, to, embeddings, bound):
    predictor, engine, made = bundled(tmp_path, config(MODELS["mldcn"]), to, embeddings=embeddings)
    expected = predictor.predict_table(rows)
    found = engine.score(given(engine, rows)).probabilities
    assert 0 < np.abs(found - expected).max() < bound
    assert 0 < made.difference < bound
    if to != "onnx":
        tables = sum(table.nbytes for table in predictor.model.tables().values())
        stored = sum(size for file, size in made.sizes.items() if file.startswith("tables/"))
        assert stored == tables * {"int8": 6 + 8, "int4": 3 + 4}[embeddings] // (4 * 6)


def test_bf16_weights_and_tables_change_little(tmp_path, rows):
    made = config({"name": "mldcn", "rank": 4, "num_layers": 2})
    predictor, engine, exported = bundled(tmp_path, made, "torch-export", dtype="bf16", embeddings="bf16")
    found = engine.score(given(engine, rows)).probabilities
    apart = np.abs(found - predictor.predict_table(rows))
    assert 0 < apart.max() < 0.1
    assert apart.mean() < 0.01
    assert exported.difference > 0


def test_onnx_runtime_takes_the_threads_that_pytorch_has(tmp_path, monkeypatch):
    bundled(tmp_path, config({"name": "dnn", "hidden": [4]}, SIMPLE), "onnx")
    made = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, file, settings, **options):
            made.append((settings.intra_op_num_threads, settings.get_session_config_entry(SPINNING)))
            super().__init__(file, settings, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    Engine.load(tmp_path / "bundle", "cpu")
    assert made == [(3, "0")]


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize(
    "calibrator",
    [
        None,
        Platt(1.7, -0.4),
        Isotonic(np.array([0.1, 0.2, 0.20000001, 0.9]), np.array([0.05, 0.3, 0.4, 0.8])),
        Isotonic(np.array([0.5]), np.array([0.3])),
    ],
)
def test_an_onnx_files_last_steps_are_those_of_predict(calibrator, rate):
    scores = np.concatenate([np.linspace(0, 1, 1001), [0.2, 1e-9, 1 - 1e-7]]).astype(np.float32)[:, None]
    expected = unsampled(calibrated(scores, ["t"], {"t": calibrator} if calibrator else {}), [rate])
    found = _Served(calibrator, rate)(torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_cannot_be_exported_is_said(tmp_path, small_run):
    def export(to, **options):
        export_run(Predictor.load(small_run.path, "cpu"), to, tmp_path / "bundle", **options)

    with pytest.raises(UserError, match="--dtype bf16: ONNX Runtime has no bf16"):
        export("onnx", dtype="bf16")
    with pytest.raises(UserError, match="--device meta: only aoti"):
        export("torch-export", device="meta")
    assert not (tmp_path / "bundle").exists()


def test_the_command_writes_a_bundle_and_refuses_to_replace_it(small_run, tmp_path):
    out = tmp_path / "bundle"
    arguments = [
        "export",
        str(small_run.path),
        "--to",
        "torch-export",
        "--out",
        str(out),
        "--embeddings",
        "int8",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "made-up rows" in done.output
    assert f"mldcn serve {out}".replace(" ", "") in done.output.replace("\n", "").replace(" ", "")
    Engine.load(out, "cpu")
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, UserError)
    assert "holds a bundle already; replace it with --force" in str(again.exception)
