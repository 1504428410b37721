"""Bundles of every target answer behind the server as the engine does alone, and as the run they came from."""

import numpy as np
import pytest
from serving_clients import rows, serving
from test_repository import ask
from test_server import listless

from mldcn.predict import Predictor
from mldcn.serving.engine import Engine
from mldcn.serving.export import export_run


@pytest.fixture(params=["torch-export", "onnx", "aoti"])
def bundle(request, small_run, tmp_path):
    """A bundle of each target, where it can be made."""
    if request.param == "aoti":
        return request.getfixturevalue("compiled_bundle")
    if request.param == "torch-export":
        return request.getfixturevalue("small_bundle")
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed (mldcn[onnx])")
    export_run(Predictor.load(small_run.path, "cpu"), "onnx", tmp_path / "onnx")
    return tmp_path / "onnx"


def test_a_bundle_behind_the_server(bundle, small_run):
    run = Engine.load(small_run.path, "cpu")
    values = listless(rows(run, 70))
    wanted = run.score(values).probabilities[:, 0]
    with serving(f"ads={bundle}") as running:
        found = ask(running.client, values)
        assert found.status_code == 200
        np.testing.assert_allclose(found.json()["outputs"][0]["data"], wanted, atol=1e-5)
        user = {name: values[name][0] for name in run.constant}
        candidates = {name: column for name, column in values.items() if name not in user}
        answer = running.client.post("/v1/rank", json={"user": user, "candidates": candidates}).json()
        scores = run.rank(user, candidates).probabilities[:, 0]
        np.testing.assert_allclose(answer["scores"], np.sort(scores)[::-1], atol=1e-5)
        sample = running.client.get("/v1/sample").json()
        assert running.client.post("/v1/effects", json=sample).status_code == 200
