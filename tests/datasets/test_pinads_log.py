"""The pinads log is what it says: reproducible, in time order, and free of anything from the future."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mldcn.config import Config, parse
from mldcn.datasets.pinads import PinadsConfig, World, batches, pinads_config, simulate, write_log
from mldcn.errors import UserError

SMALL = PinadsConfig(num_users=300, num_items=120, num_advertisers=12, chunk_requests=64)
SIZE = 12_000


def log_of(config: PinadsConfig, size: int) -> pl.DataFrame:
    table = pa.Table.from_batches([batch for batch, _ in batches(World(config), size)])
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


@pytest.fixture(scope="module")
def log() -> pl.DataFrame:
    return log_of(SMALL, SIZE)


def test_same_seed_and_size_give_the_same_log(log):
    assert log.equals(log_of(SMALL, SIZE))
    assert not log.equals(log_of(SMALL.model_copy(update={"seed": 1}), SIZE))


def test_the_log_has_exactly_the_rows_asked_for():
    world = World(SMALL)
    for size in (1, 7, 1000):
        assert sum(batch.num_rows for batch, _ in batches(world, size)) == size
    with pytest.raises(UserError, match="at least 1"):
        next(batches(world, 0))


def test_a_request_is_one_user_at_one_time_with_distinct_pins_in_positions_from_1(log):
    request = log.group_by("request_id", maintain_order=True).agg(
        pl.col("user_id", "timestamp", "surface", "device").n_unique(),
        pins=pl.col("pin_id").n_unique(),
        rows=pl.len(),
        positions=pl.col("position"),
    )
    for name in ("user_id", "timestamp", "surface", "device"):
        assert (request[name] == 1).all()
    assert (request["pins"] == request["rows"]).all()
    assert all(p == list(range(1, len(p) + 1)) for p in request["positions"].to_list())
    assert request["request_id"].to_list() == list(range(1, request.height + 1))
    assert log["timestamp"].is_sorted()


def test_labels_that_need_a_click_are_null_without_one(log):
    clicked = log["click"] == 1
    for name in ("good_click", "outbound_click", "dwell_seconds"):
        assert (log[name].is_not_null() == clicked).all()
    clicks = log.filter(clicked)
    assert (clicks["good_click"] == (clicks["dwell_seconds"] > 30).cast(pl.Int8)).all()
    assert log["save"].null_count() == 0


def test_running_features_hold_what_was_known_before_the_chunk_and_no_more():
    # Counted again in plain Python from the log's own rows and labels.
    config = SMALL.model_copy(update={"warm_up": 0.0})
    shown, clicked = defaultdict(int), defaultdict(int)
    recent = defaultdict(list)
    checked = 0
    for batch, _ in batches(World(config), 4000):
        rows = batch.to_pylist()
        for row in rows:
            user, pin, pair = row["user_id"], ("pin", row["pin_id"]), (row["user_id"], row["advertiser_id"])
            assert row["user_impressions"] == shown[user]
            assert row["user_clicks"] == clicked[user]
            assert row["prior_impressions"] == shown[pin]
            assert row["prior_ctr"] == pytest.approx((clicked[pin] + 20 * 0.15) / (shown[pin] + 20))
            assert row["user_advertiser_impressions"] == shown[pair]
            assert row["user_advertiser_clicks"] == clicked[pair]
            last = recent[user][-config.history_length :]
            assert row["recent_pins"] == [event[0] for event in last]
            assert row["recent_times"] == [event[1] for event in last]
            assert row["recent_actions"] == [event[2] for event in last]
            assert all(time <= row["timestamp"] for time in row["recent_times"])
            checked += len(last)
        for row in rows:
            keys = (row["user_id"], ("pin", row["pin_id"]), (row["user_id"], row["advertiser_id"]))
            for key in keys:
                shown[key] += 1
                clicked[key] += row["click"]
            if row["click"] or row["save"]:
                action = "save" if row["save"] else "click"
                recent[row["user_id"]].append((row["pin_id"], row["timestamp"], action))
    assert checked > 1000
    assert max(len(events) for events in recent.values()) > config.history_length


def test_the_warm_up_fills_the_history_but_is_not_logged():
    cold = log_of(SMALL.model_copy(update={"warm_up": 0.0}), 3000)
    warm = log_of(SMALL, 3000)
    assert cold["prior_impressions"][:50].sum() == 0
    assert warm["prior_impressions"][:50].sum() > 0
    assert warm["recent_times"].list.min().min() < warm["timestamp"].min()


def test_user_and_pin_counts_follow_zipf(log):
    def slope(counts: np.ndarray) -> float:
        counts = np.sort(counts)[::-1]
        rank = np.arange(1, len(counts) + 1)
        return float(np.polyfit(np.log(rank), np.log(counts), 1)[0])

    by_user = log.group_by("user_id").len()["len"].to_numpy()
    assert slope(by_user[by_user > 5]) == pytest.approx(-SMALL.user_zipf, abs=0.2)
    # Pins there from the start; one candidate in two comes by category, which flattens the head a little.
    world = World(SMALL)
    old = world.items.pin_id[~np.isfinite(world.items.birth)]
    by_pin = log.filter(pl.col("pin_id").is_in(old.tolist())).group_by("pin_id").len()["len"].to_numpy()
    assert slope(by_pin) == pytest.approx(-SMALL.item_zipf, abs=0.3)


def test_cold_pins_arrive_over_time_and_never_before_their_birth(log):
    world = World(SMALL)
    start = log["timestamp"].min()
    rows = world.item_rows(log["pin_id"].to_numpy())
    late = np.isfinite(world.items.birth[rows])
    assert (world.items.birth[rows] <= log["timestamp"].to_numpy() - 1_704_067_200)[late].all()
    half, tail = log[: SIZE // 2], log[-SIZE // 10 :]
    new = set(tail["pin_id"]) - set(half["pin_id"])
    assert len(new) >= 5
    share = late[-SIZE // 10 :].mean()
    assert 0.1 < share < 0.7
    assert late[: SIZE // 10].mean() < share / 2
    assert log["timestamp"].max() - start == pytest.approx(SMALL.days * 86_400, rel=0.01)


def test_written_files_hold_the_log_and_the_truth_row_by_row(tmp_path, log):
    seen = []
    told = write_log(
        tmp_path, 3000, SMALL, with_truth=True, progress=lambda done, size: seen.append((done, size))
    )
    written = pl.read_parquet(tmp_path / "pinads.parquet")
    truth = pl.read_parquet(tmp_path / "truth.parquet")
    assert written.equals(log_of(SMALL, 3000))
    assert truth.columns == ["click", "good_click", "outbound_click", "save"]
    assert truth.height == written.height
    expected = np.concatenate([p.probability for p, _ in simulate(World(SMALL), 3000)])
    assert np.array_equal(truth.to_numpy(), expected)
    assert json.loads((tmp_path / "truth.json").read_text()) == told
    assert told["bayes"]["whole"]["click"]["rows"] == 3000
    assert told["bayes"]["newest_tenth"]["click"]["rows"] == 300
    assert seen[-1] == (3000, 3000)
    assert not list(tmp_path.glob("*.part"))
    again = tmp_path / "again"
    write_log(again, 3000, SMALL)
    assert (again / "pinads.parquet").read_bytes() == (tmp_path / "pinads.parquet").read_bytes()
    assert not (again / "truth.parquet").exists()


def test_csv_holds_what_parquet_holds(tmp_path):
    write_log(tmp_path, 500, SMALL, format="csv")
    frame = pl.read_csv(tmp_path / "pinads.csv", infer_schema_length=None)
    log = log_of(SMALL, 500)
    assert frame.columns == log.columns
    joined = log.select(pl.col("recent_pins").cast(pl.List(pl.String)).list.join("|"))[
        "recent_pins"
    ].to_list()
    assert [value or "" for value in frame["recent_pins"].cast(pl.String).to_list()] == joined
    assert frame["click"].to_list() == log["click"].to_list()
    assert frame["good_click"].to_list() == log["good_click"].to_list()
    assert frame["age_group"].to_list() == log["age_group"].to_list()


def test_a_failed_write_leaves_no_log_behind(tmp_path):
    def stop(done: int, size: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_log(tmp_path, 500, SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_config_reads_the_log_and_uses_no_leak(log):
    config = parse(Config, pinads_config("folder"), "pinads")
    schema = config.log_schema
    assert set(schema.columns()) <= set(log.columns)
    used = {feature.log_column for feature in schema.features}
    assert used.isdisjoint({"click", "good_click", "outbound_click", "save", "dwell_seconds", "request_id"})
    kinds = {feature.kind for feature in schema.features}
    assert kinds == {"numeric", "bucketised", "categorical", "multi", "embedding", "sequence"}
    assert {feature.source for feature in schema.features} == {"user", "item", "user_item", "context"}
