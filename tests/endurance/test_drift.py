"""endurance/drift.py on three small days: who trains on what, and what the tables say."""

import argparse
import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "endurance" / "drift.py"
spec = importlib.util.spec_from_file_location("endurance_drift", FILE)
drift = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drift)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return argparse.Namespace(
        rows=1500,
        days=3,
        drift=0.3,
        seeds=[4],
        epochs=1,
        warm_epochs=1,
        work=tmp_path_factory.mktemp("drift"),
    )


@pytest.fixture(scope="module")
def rows(options):
    return drift.one_seed(4, options)


def test_every_policy_is_scored_on_every_day_before_it_is_trained_on(rows, options):
    assert [(row["policy"], row["day"]) for row in rows] == [
        (policy, day) for day in (2, 3) for policy in (*drift.POLICIES, "truth")
    ]
    at = {(row["policy"], row["day"]): row for row in rows}
    # On day 2 all have the model of day 1; the one that is never trained again keeps it.
    assert len({at[policy, 2]["auc"] for policy in drift.POLICIES}) == 1
    assert at["never", 3]["rows"] == 0
    # Nine tenths of two days, and of one: the newest tenth of the last day is held out.
    assert at["full", 3]["rows"] == pytest.approx(2850, rel=0.05)
    for policy, (_, window) in drift.WARM.items():
        assert at[policy, 3]["rows"] == pytest.approx(1350 if window == 1 else 2850, rel=0.05)
    assert all(0.6 < at["truth", day]["auc"] < 0.95 for day in (2, 3))
    assert 0 < at["truth", 3]["new_pins"] < 0.6
    assert not list(options.work.iterdir())


def test_the_tables_hold_means_over_seeds_and_differences_seed_by_seed(rows, options):
    second = [
        {**row, "seed": 5, "auc": row["auc"] + (0.02 if row["policy"] == "never" else 0.01)} for row in rows
    ]
    two = argparse.Namespace(**{**vars(options), "seeds": [4, 5]})
    found = drift.summarise(rows + second, two)["policies"]
    at = {(row["policy"], row["day"]): row["auc"] for row in rows}
    assert found["full"]["auc_by_day"][3]["mean"] == pytest.approx(at["full", 3] + 0.005)
    difference = at["never", 3] - at["full", 3]
    assert found["never"]["minus_full"]["by_seed"] == pytest.approx([difference, difference + 0.01])
    assert found["never"]["minus_full"]["sd"] == pytest.approx(0.01 / 2**0.5)
    text = drift.markdown(drift.summarise(rows + second, two), two)
    assert all(f"| {policy} |" in text for policy in drift.POLICIES)
    assert f"{found['full']['auc_by_day'][3]['mean']:.4f}" in text
