"""Training, explaining and serving on a device other than the CPU give what they give on the CPU."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from every_feature import columns, config, log, make_run
from mldcn.data.prepare import prepare
from mldcn.explain.explanation import explain
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.serving.engine import Engine
from mldcn.serving.export import export_run
from mldcn.training.fit import Trainer, fit
from second_device import AwayTensor, second_device

SETTINGS = {
    "lazy-adam": {},
    "adagrad": {"optimiser": {"table": "rowwise_adagrad", "table_lr": 0.1, "schedule": "cosine"}},
    "weight-decay": {
        "optimiser": {"dense": "adamw", "weight_decay": 0.01, "table_l2": 1e-4, "clip_norm": 0.1}
    },
    "average": {"ema": 0.9, "checkpoint_steps": 3},
    "pruning": {"pruning": {"warmup_epochs": 0, "every": 2, "span": 1}},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("log") / "log.parquet"
    pq.write_table(log(800), file)
    return file


def train(folder, file, device, **training):
    asked = config(
        {"name": "mldcn", "rank": 4},
        data={"train": [str(file)], "split": {"kind": "hash", "valid": 0.2, "test": 0.2}},
        training={"device": device, "threads": 1, "epochs": 2, "batch_size": 64, "eval_steps": 5, **training},
        evaluation={"calibration": "platt"},
    )
    run = RunFolder.create(folder / device) if not (folder / device).exists() else None
    data = prepare(asked, folder / "encoded")
    if run is None:
        fit(asked, RunFolder.open(folder / device, finished=False), data, resume=True)
    else:
        fit(asked, run, data)
    return data


def assert_equal(there, here):
    torch.testing.assert_close(load_file(there.weights), load_file(here.weights))
    for name in ("metrics.json", "calibrators.json"):
        found, expected = there.read_json(name), here.read_json(name)
        assert numbers(found) == pytest.approx(numbers(expected), rel=1e-4, abs=1e-6)


def numbers(raw):
    """All numbers in JSON, in order."""
    if isinstance(raw, dict | list):
        return [
            number for each in (raw.values() if isinstance(raw, dict) else raw) for number in numbers(each)
        ]
    return [raw] if isinstance(raw, float) else []


@pytest.mark.parametrize("training", SETTINGS.values(), ids=SETTINGS)
def test_trains_there_as_here(tmp_path, file, training):
    train(tmp_path, file, "cpu", **training)
    with second_device():
        train(tmp_path, file, "away", **training)
    assert_equal(RunFolder.open(tmp_path / "away"), RunFolder.open(tmp_path / "cpu"))


def test_goes_on_there_where_it_stopped(tmp_path, file, monkeypatch):
    training = SETTINGS["average"]
    train(tmp_path, file, "cpu", **training)
    whole = Trainer._step

    def dying(self, batch):
        if self.position.step == 8:
            raise KeyboardInterrupt
        return whole(self, batch)

    with second_device():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "_step", dying)
            train(tmp_path, file, "away", **training)
        train(tmp_path, file, "away", **training)
    assert_equal(RunFolder.open(tmp_path / "away"), RunFolder.open(tmp_path / "cpu"))


def test_predicts_and_explains_there_as_here(tmp_path, file):
    data = train(tmp_path, file, "cpu")
    rows = log(300, seed=1, unseen=True)
    found = {}
    for device in ("cpu", "away"):
        with second_device():
            predictor = Predictor.load(tmp_path / "cpu", device)
            assert next(predictor.model.parameters()).device.type == device
            found[device] = [
                predictor.predict_table(rows).tolist(),
                explain(predictor, data.test, "test rows", sample_rows=100, repeats=2).to_json(),
            ]
    here, there = numbers(found["cpu"]), numbers(found["away"])
    assert len(here) > 1000
    assert there == pytest.approx(here, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run", config({"name": "mldcn", "rank": 4}))


@pytest.mark.parametrize("dtype", [None, "fp32", "int8", "int4"])
def test_serves_there_as_here(tmp_path, run, dtype):
    path = run.path
    if dtype:
        path = tmp_path / "bundle"
        export_run(Predictor.load(run.path, "cpu"), "torch-export", path, embeddings=dtype)
    rows = log(40, seed=1, unseen=True)
    here = Engine.load(path, "cpu")
    names = [each.name for each in here.inputs]
    expected = here.score(columns(rows, names)).probabilities
    with second_device():
        there = Engine.load(path, "away")
        before = AwayTensor.made
        found = there.score(columns(rows, names)).probabilities
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert AwayTensor.made > before + 50
