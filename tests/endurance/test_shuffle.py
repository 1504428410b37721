"""The order in which rows come, on sorted logs."""

import pytest
import shuffle
from shuffle import Setting, check, compared

from mldcn.data import shards


@pytest.fixture
def small(monkeypatch):
    """Settings for a log of some thousand rows; the module's own constants come back afterwards."""
    for name in ("CHUNK_ROWS", "WINDOW_ROWS"):
        monkeypatch.setattr(shards, name, getattr(shards, name))
    settings = (Setting("full", 4, 1 << 40), Setting("block", 4, 1024), Setting("coarse", 512, 1024))
    monkeypatch.setattr(shuffle, "SETTINGS", settings)


def test_windows_of_many_chunks_are_like_a_full_shuffle_and_few_are_not(small, tmp_path):
    found = check(tmp_path, rows=8000, seeds=0, epochs=4, jobs=1)
    of = {(row["order"], row["setting"]): row for row in found["order"]}
    for order in ("label", "day"):
        for setting in ("full", "block"):
            assert 0.7 < of[order, setting]["variance"] < 1.3
            assert of[order, setting]["displacement"] == pytest.approx(1 / 3, abs=0.03)
        assert of[order, "full"]["neighbours"] < 2 < of[order, "block"]["neighbours"]
    # The check itself notices a shuffle that leaves a sorted log's labels together.
    assert of["label", "coarse"]["variance"] > 3


def test_differences_are_paired_by_seed():
    settings = {"full": 0.0, "block": 0.01, "coarse": 0.5}
    runs = [
        {"order": order, "setting": name, "seed": seed, "auc": 0.7 + 0.1 * seed + shift, "logloss": 0.4}
        for order in ("label", "day")
        for name, shift in settings.items()
        for seed in range(3)
    ]
    found = {(row["order"], row["setting"], row["metric"]): row for row in compared(runs)}
    row = found["day", "block", "auc"]
    assert row["difference"] == pytest.approx(0.01)
    assert row["high"] - row["low"] == pytest.approx(0, abs=1e-9)
    assert row["seed_deviation"] == pytest.approx(0.1)
    assert found["label", "coarse", "logloss"]["difference"] == 0
