"""From a run's raw scores to the probabilities that are served."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mldcn.config import Config, parse
from mldcn.data.prepare import prepare
from mldcn.errors import UserError
from mldcn.predict import Predictor, _write_tables, unsampled
from mldcn.run import RunFolder
from mldcn.training.fit import fit


def test_sampled_negatives_are_corrected_for():
    # Of 100 rows with 10 clicks a log that keeps a fifth of the negatives has 10 clicks in 28 rows.
    scores = np.array([[10 / 28, 0.0, 1.0]], np.float32)
    np.testing.assert_allclose(unsampled(scores, [0.2, 0.2, 0.2]), [[0.1, 0.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(unsampled(scores[:, :1], [0.2]), [[0.1]], rtol=1e-6)
    assert unsampled(scores, [1.0, 1.0, 1.0]) is scores
    assert unsampled(scores, [0.2, 1.0, 1.0]).dtype == np.float32


def test_only_the_task_whose_negatives_were_dropped_is_corrected():
    scores = np.array([[10 / 28, 0.4]], np.float32)
    np.testing.assert_allclose(unsampled(scores, [0.2, 1.0]), [[0.1, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("calibration", ["platt", "isotonic"])
def test_calibrators_see_the_log_as_it_is_before_its_sampling_is_undone(tmp_path, calibration):
    rng = np.random.default_rng(0)
    ad, rate = rng.integers(0, 20, 12_000), np.linspace(0.02, 0.3, 20)
    click = rng.random(12_000) < rate[ad]
    kept = click | (rng.random(12_000) < 0.1)
    log = pl.DataFrame({"ad": ad, "click": click.astype(int)}).filter(pl.Series(kept))
    log.write_parquet(tmp_path / "log.parquet")
    raw = {
        "data": {
            "train": [str(tmp_path / "log.parquet")],
            "split": {"kind": "hash", "valid": 0.5, "test": 0},
        },
        "schema": {
            "features": [{"name": "ad", "kind": "categorical"}],
            "labels": [{"name": "click", "negative_sampling_rate": 0.1}],
        },
        "model": {"embedding": {"dim": 2}, "interaction": {"rank": 2, "num_layers": 1}},
        "training": {"threads": 1, "epochs": 30, "batch_size": 64, "optimiser": {"lr": 0.02}},
        "evaluation": {"calibration": calibration},
    }
    config = parse(Config, raw, "test")
    run = RunFolder.create(tmp_path / "run")
    fit(config, run, prepare(config, tmp_path / "encoded"))
    scores = Predictor.load(run.path, "cpu").predict_table(pl.DataFrame({"ad": range(20)}).to_arrow())
    assert scores.mean() == pytest.approx(rate.mean(), rel=0.15)
    assert scores.min() < 0.1
    assert np.corrcoef(scores[:, 0], rate)[0, 1] > 0.9


def test_a_list_is_kept_in_parquet_only(tmp_path):
    table = pa.table({"tags": [["a"], ["b", "c"]], "p_click": [0.1, 0.2]})
    with pytest.raises(UserError, match=r"--keep tags: holds lists, .* write a .parquet file"):
        _write_tables([table], tmp_path / "scores.csv", ".csv")
    _write_tables([table], tmp_path / "scores.parquet", ".parquet")
