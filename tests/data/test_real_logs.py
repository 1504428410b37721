"""Smoke tests on real logs; skipped, saying so, where they are not."""

import numpy as np

from mldcn.config import Config, DataConfig, load_config, parse
from mldcn.data.inference import infer, to_yaml
from mldcn.data.prepare import prepare

CRITEO = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def test_criteo(real_data, tmp_path):
    numbers = [{"kind": "numeric", "name": f"I{i}", "transform": "signed_log"} for i in range(1, 14)]
    numbers[1] = {"kind": "numeric", "name": "I2", "transform": "log", "offset": 4.0}
    raw = {
        "data": {
            "train": [str(real_data / "criteo-60k" / "train.tsv.gz")],
            "header": False,
            "column_names": CRITEO,
            "split": {"kind": "order"},
        },
        "schema": {
            "features": numbers + [{"kind": "categorical", "name": f"C{i}"} for i in range(1, 27)],
            "labels": [{"name": "label"}],
        },
    }
    data = prepare(parse(Config, raw, "criteo"), tmp_path / "out")
    assert [len(part) for part in (data.train, data.valid, data.test)] == [48_000, 6_000, 6_000]
    clicks = np.concatenate([part.labels for part in (data.train, data.valid, data.test)])
    assert abs(clicks.mean() - 0.224) < 0.002
    train = np.concatenate([batch.dense for batch in data.train.batches(4096, shuffle=True)])
    assert np.isfinite(train).all()
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=0.02)
    ids = np.concatenate([batch.ids for batch in data.train.batches(4096)])
    assert (ids != 1).all()
    assert (ids.max(axis=0) < [data.train.layout.tables[f"C{i}"] for i in range(1, 27)]).all()


def test_criteo_inferred(real_data, tmp_path):
    log = real_data / "criteo-60k" / "train.tsv.gz"
    guess = infer([log], DataConfig(header=False, column_names=tuple(CRITEO)), rows=5_000)
    (tmp_path / "c.yaml").write_text(to_yaml(guess, log))
    schema = load_config(tmp_path / "c.yaml").log_schema
    assert schema.labels[0].name == "label"
    assert [f.name for f in schema.features] == CRITEO[1:]
    assert guess.leaks == ()


def test_movielens_inferred_and_encoded(real_data, tmp_path):
    log = real_data / "ml-1m" / "interactions.csv.gz"
    guess = infer([log], rows=20_000)
    assert guess.label == "label"
    assert guess.user == "user_id"
    assert [leak.name for leak in guess.leaks] == ["rating"]
    (tmp_path / "c.yaml").write_text(to_yaml(guess, log))
    split = "data.split={kind: column, column: split}"
    data = prepare(load_config(tmp_path / "c.yaml", [split]), tmp_path / "out")
    assert len(data.train) + len(data.valid) + len(data.test) == 1_000_209
    assert abs(len(data.train) / 1_000_209 - 0.8) < 0.001
    assert data.test.column("user").min() != 0
