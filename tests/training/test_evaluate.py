"""Evaluation in bounded memory: no whole column, few rows in memory, a sample for calibrators."""

import numpy as np
import polars as pl
import pytest
import torch

from mldcn.config import Config, parse
from mldcn.data.prepare import prepare
from mldcn.data.shards import EncodedRows
from mldcn.errors import UserError
from mldcn.model import Ranker
from mldcn.training import evaluate as module
from mldcn.training.evaluate import check_labels, evaluate, fit_calibrators

ROWS = 4000


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A config, its rows, and a model that knows nothing."""
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    ad = rng.integers(0, 12, ROWS)
    log = {
        "ad": ad,
        "user": rng.integers(0, 50, ROWS),
        "request": np.arange(ROWS) // 4,
        "position": np.arange(ROWS) % 4 + 1,  # so that rows and groups are measured by a stream each
        "click": (rng.random(ROWS) < 0.02 * ad).astype(int),
        "never": np.zeros(ROWS, int),
        "weight": rng.integers(1, 3, ROWS),
    }
    pl.DataFrame(log).write_parquet(folder / "log.parquet")
    raw = {
        "data": {"train": [str(folder / "log.parquet")], "split": {"kind": "order", "valid": 0, "test": 0}},
        "schema": {
            "features": [{"name": "ad", "kind": "categorical", "source": "item"}],
            "labels": [{"name": "click"}, {"name": "never"}],
            "user": "user",
            "request": "request",
            "position": "position",
            "weight": "weight",
        },
        "model": {"embedding": {"dim": 4}, "interaction": {"rank": 2, "num_layers": 1}},
        "training": {"eval_batch_size": 300},
    }
    config = parse(Config, raw, "test")
    data = prepare(config, folder / "encoded")
    torch.manual_seed(0)
    return config, data.train, Ranker(config.model, config.log_schema, data.encoder.layout)


def run(measured, **options):
    config, rows, model = measured
    return evaluate(model, rows, config, device=torch.device("cpu"), **options)


def test_no_column_is_read_whole_and_rows_on_disk_measure_the_same(measured, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a whole column was read")

    monkeypatch.setattr(EncodedRows, "column", forbidden)
    expected = run(measured).metrics
    assert {"auc", "gauc", "hit@3"} <= expected["click"].keys()
    monkeypatch.setattr(module, "_memory_rows", lambda *_, **__: 700)
    for task, values in run(measured).metrics.items():
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[task][name], rtol=1e-12, err_msg=f"{task} {name}")
    check_labels(measured[1], ("click", "never"), "click", "auc")
    with pytest.raises(UserError, match="label never is 0 in all 4,000 validation rows, so that auc"):
        check_labels(measured[1], ("click", "never"), "never", "auc")


def test_memory_rows_follow_the_bound(measured):
    config = measured[0]
    config = config.model_copy(update={"data": config.data.model_copy(update={"memory_mb": 1024})})
    assert module._memory_rows(config, 1, streams=1) == (512 << 20) // 140
    assert module._memory_rows(config, 2, streams=2) == (512 << 20) // 340


def test_calibrators_are_fitted_on_all_rows_or_on_a_fixed_sample_of_them(measured, monkeypatch):
    whole = run(measured, sample=True)
    assert whole.scores.shape == (ROWS, 2)
    monkeypatch.setattr(module, "SAMPLE_ROWS", 1000)
    sample = run(measured, sample=True)
    assert 900 < len(sample.scores) < 1100
    np.testing.assert_array_equal(run(measured, sample=True).scores, sample.scores)
    assert sample.labels[:, 0].mean() == pytest.approx(whole.labels[:, 0].mean(), abs=0.03)
    assert sample.metrics["click"] == whole.metrics["click"]  # those are of all rows
    probabilities = np.array([0.3, 0.5])
    calibrated = [
        fit_calibrators("platt", found)["click"].transform(probabilities) for found in (whole, sample)
    ]
    np.testing.assert_allclose(*calibrated, atol=0.06)
    assert fit_calibrators("platt", whole).keys() == {"click"}  # of one class there is nothing to fit


def test_a_sample_is_even_over_the_rows():
    drawn = np.concatenate([module._drawn(start, 10**5, 8 * 10**6) for start in range(0, 8 * 10**6, 10**6)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.005)
    assert np.concatenate([module._drawn(i, 1, 8 * 10**6) for i in range(100)]).tolist() == (
        drawn[:100].tolist()
    )
