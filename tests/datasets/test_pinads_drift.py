"""A world that moves from day to day, and the log cut by day."""

import hashlib
import json

import numpy as np
import polars as pl
import pytest

from mldcn.datasets.pinads import PinadsConfig, World, batches, simulate, write_days, write_log
from mldcn.datasets.pinads.world import DAY, START, Contexts, stream

SMALL = {"num_users": 400, "num_items": 300, "days": 5.0, "seed": 2}
DRIFT = PinadsConfig(**SMALL, chunk_requests=64, drift=0.3, new_users=0.5, new_items=0.5)
SIZE = 6000


def on_day(contexts, day):
    """The same contexts so many weeks later, which changes nothing but the day's number."""
    return Contexts(contexts.time + 7 * day * DAY, contexts.surface, contexts.device, contexts.position)


def test_without_drift_the_log_is_what_it_was_before_there_was_any():
    digest = hashlib.blake2b(digest_size=8)
    for batch, _ in batches(World(PinadsConfig(**SMALL)), 2000):
        for name in ("request_id", "timestamp", "user_id", "pin_id", "position", "click", "save"):
            digest.update(np.ascontiguousarray(batch.column(name).to_numpy(), np.int64).tobytes())
    assert digest.hexdigest() == "95946aee7be1ff4e"
    assert PinadsConfig().told().keys() == PinadsConfig().model_dump().keys() - {"drift", "new_users"}


def test_what_drifts_wanders_from_the_still_worlds_first_day_and_keeps_its_deviation():
    still, moving = World(PinadsConfig(**SMALL)), World(PinadsConfig(**SMALL, drift=0.3))
    first = still.items.quality
    assert np.array_equal(moving._quality.on(0), first)
    for day, expected in ((1, np.sqrt(0.7)), (3, np.sqrt(0.7) ** 3)):
        quality = moving._quality.on(day)
        assert abs(np.corrcoef(first, quality)[0, 1] - expected) < 0.12
        assert 0.85 < quality.std() < 1.15
    loadings = [moving._gated_loadings.on(day) for day in (0, 1, 9)]
    near, far = (np.corrcoef(loadings[0].ravel(), other.ravel())[0, 1] for other in loadings[1:])
    assert near > 0.6
    assert far < near


@pytest.mark.parametrize("truth", ["mixed", "low_order", "dense"])
def test_the_truth_of_an_impression_depends_on_its_day(truth):
    world = World(PinadsConfig(**SMALL, truth=truth, drift=0.3))
    users, items, contexts = world.traffic(stream(5), 500)
    contexts = Contexts(contexts.time % DAY + START, contexts.surface, contexts.device, contexts.position)
    logits = [world.logit(users, items, on_day(contexts, week)) for week in (0, 0, 1, 2)]
    assert np.array_equal(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])
    # In one call or row by row, whatever days stand beside it.
    mixed = Contexts(
        np.where(np.arange(500) % 2, contexts.time, on_day(contexts, 1).time),
        contexts.surface,
        contexts.device,
        contexts.position,
    )
    expected = np.where(np.arange(500)[:, None] % 2, logits[0], logits[2])
    assert np.array_equal(world.logit(users, items, mixed), expected)
    still = World(PinadsConfig(**SMALL, truth=truth))
    assert np.array_equal(still.logit(users, items, contexts), still.logit(users, items, on_day(contexts, 1)))


def test_labels_come_as_often_as_the_days_true_probability_says():
    clicks, expected, variance = np.zeros(5), np.zeros(5), np.zeros(5)
    for impressions, _ in simulate(World(DRIFT), SIZE):
        p = impressions.probability[:, 0]
        for total, values in ((clicks, impressions.click), (expected, p), (variance, p * (1 - p))):
            np.add.at(total, impressions.contexts.day, values)
    assert (np.abs(clicks - expected) < 4 * np.sqrt(variance)).all()


def test_new_users_and_pins_appear_each_day_and_never_before_their_birth():
    world = World(DRIFT)
    seen_users, seen_pins, new = set(), set(), []
    by_day = {}
    for impressions, _ in simulate(world, SIZE):
        time = impressions.contexts.time - START
        assert (world.users.birth[impressions.users] <= time).all()
        assert (world.items.birth[impressions.items] <= time).all()
        for day, user, pin in zip(
            impressions.contexts.day.tolist(),
            impressions.users.tolist(),
            impressions.items.tolist(),
            strict=True,
        ):
            by_day.setdefault(day, (set(), set()))[0].add(user)
            by_day[day][1].add(pin)
    for users, pins in by_day.values():
        born_users = {u for u in users - seen_users if world.users.birth[u] > 0}
        born_pins = {p for p in pins - seen_pins if world.items.birth[p] > 0}
        new.append((len(born_users), len(born_pins)))
        seen_users |= users
        seen_pins |= pins
    assert len(new) == 5
    assert min(users for users, _ in new) > 5
    assert min(pins for _, pins in new) > 5


def test_files_by_day_hold_the_whole_log_in_order(tmp_path):
    told = write_days(tmp_path / "days", SIZE, DRIFT)
    write_log(tmp_path / "whole", SIZE, DRIFT)
    files = sorted((tmp_path / "days").glob("*.parquet"))
    assert [file.stem for file in files] == [f"day-{day:02}" for day in range(1, 6)]
    whole = pl.read_parquet(tmp_path / "whole" / "pinads.parquet")
    assert pl.concat([pl.read_parquet(file) for file in files]).equals(whole)
    for day, file in enumerate(files):
        time = pl.read_parquet(file)["timestamp"]
        assert START + day * DAY <= time.min()
        assert time.max() < START + (day + 1) * DAY
    assert json.loads((tmp_path / "days" / "truth.json").read_text()) == told
    assert sum(day["click"]["rows"] for day in told["bayes"].values()) == SIZE
    assert all(0.6 < day["click"]["auc"] < 0.95 for day in told["bayes"].values())
    assert told["config"]["drift"] == 0.3
    assert PinadsConfig.model_validate_json(json.dumps(told["config"])) == DRIFT


def test_days_as_csv_and_a_failed_write(tmp_path):
    write_days(tmp_path / "csv", 1000, DRIFT, format="csv")
    rows = sum(len(pl.read_csv(file, columns=["click"])) for file in (tmp_path / "csv").glob("day-*.csv"))
    assert rows == 1000

    def stop(done, size):
        if done > size / 2:
            raise RuntimeError("no more room")

    with pytest.raises(RuntimeError):
        write_days(tmp_path / "failed", 6000, DRIFT, progress=stop)
    assert not list((tmp_path / "failed").iterdir())
