"""Public recommendation logs with rich context: Frappe (app usage) and KuaiRand (short videos)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mldcn.datasets.source import Prepared, Source, categorical, sink, text
from mldcn.errors import UserError

FRAPPE_CONTEXT = ("daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
FRAPPE_NEGATIVES = 2
FRAPPE_SEED = 0

KUAIRAND_LABELS = ("is_click", "long_view", "is_like")
KUAIRAND_USER = (
    "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", "follow_user_num_range",
    "fans_user_num_range", "friend_user_num_range", "register_days_range",
    *(f"onehot_feat{number}" for number in range(18)),
)  # fmt: skip
KUAIRAND_VIDEO = ("author_id", "video_type", "upload_type", "music_id", "music_type")


def prepare_frappe(path: Path, out: Path) -> Prepared:
    """``frappe.csv`` (tab separated), with sampled negatives.

    The publisher's file holds app launches only, so every row is a positive. As He and Chua (Neural
    Factorization Machines, 2017) did, each launch is followed by two rows with the same user and context
    and an app the user never launched, drawn evenly (seed 0). Figures depend on that choice.
    """
    file = Source(path, out / "raw").need("frappe.csv")
    frame = text(file, separator="\t").collect()
    missing = [name for name in ("user", "item", *FRAPPE_CONTEXT) if name not in frame.columns]
    if missing:
        raise UserError(f"{file}: has no column {', '.join(missing)} (is it tab separated?)")
    log = sink(_with_negatives(frame.select("user", "item", *FRAPPE_CONTEXT)), out / "frappe.parquet", file)
    config = {
        # By row: a launch and its negatives fall apart, as in the published random 7:2:1 split.
        "data": {"train": [str(log)], "split": {"kind": "hash", "valid": 0.1, "test": 0.1}},
        "schema": {
            "features": [
                *categorical(("user",), "user"),
                *categorical(("item",), "item"),
                *categorical(FRAPPE_CONTEXT, "context"),
            ],
            "labels": [{"name": "label"}],
            "user": "user",
        },
    }
    return [log], config


def _with_negatives(launches: pl.DataFrame) -> pl.LazyFrame:
    rng = np.random.default_rng(FRAPPE_SEED)
    items, item = np.unique(launches["item"].to_numpy().astype(str), return_inverse=True)
    _, user = np.unique(launches["user"].to_numpy().astype(str), return_inverse=True)
    used = np.unique(user * len(items) + item)
    # A user who launched every app has nothing left to draw.
    row = np.repeat(np.flatnonzero((np.bincount(used // len(items)) < len(items))[user]), FRAPPE_NEGATIVES)
    drawn = np.full(len(row), -1)
    open_ = np.arange(len(row))
    while len(open_):
        candidate = rng.integers(len(items), size=len(open_))
        fresh = ~np.isin(user[row[open_]] * len(items) + candidate, used)
        drawn[open_[fresh]] = candidate[fresh]
        open_ = open_[~fresh]
    positives = launches.with_columns(label=pl.lit(1, pl.Int8), row=pl.int_range(pl.len()))
    negatives = launches[row].with_columns(
        item=pl.Series(items[drawn], dtype=pl.String), label=pl.lit(0, pl.Int8), row=pl.Series(row)
    )
    both = pl.concat([positives, negatives.select(positives.columns)])
    return both.sort("row", maintain_order=True).drop("row").lazy()


def prepare_kuairand(path: Path, out: Path) -> Prepared:
    """KuaiRand's standard logs (Pure, 1K or 27K) joined with user and video features, by time.

    Tasks: click, long view, like. What is known only afterwards (``play_time_ms`` and the like) is left out,
    and so are the video statistics, which were summed over the log's own weeks.
    """
    source = Source(path, out / "raw")
    logs = source.all("log_standard_*.csv")
    if not logs:
        raise UserError(f"{path}: holds no log_standard_*.csv")
    number = [pl.col(name).cast(pl.Int8) for name in KUAIRAND_LABELS]
    moment = pl.from_epoch(pl.col("time_ms").cast(pl.Int64), "ms").dt.offset_by("8h")  # the app's local time
    impressions = pl.concat([text(log) for log in logs]).select(
        "user_id",
        "video_id",
        pl.col("time_ms").cast(pl.Int64),
        pl.col("duration_ms").cast(pl.Float64),
        "tab",
        *number,
        hour=moment.dt.hour().cast(pl.String),
        weekday=moment.dt.weekday().cast(pl.String),
    )
    users = pl.concat([text(file) for file in _some(source, "user_features_*.csv")])
    videos = pl.concat([text(file) for file in _some(source, "video_features_basic_*.csv")])
    videos = videos.select("video_id", *KUAIRAND_VIDEO, "tag")
    joined = impressions.join(users.select("user_id", *KUAIRAND_USER), on="user_id", how="left")
    joined = joined.join(videos, on="video_id", how="left").sort("time_ms", "user_id", "video_id")
    log = sink(joined, out / "kuairand.parquet", logs[0])
    duration = {"name": "duration_ms", "kind": "numeric", "source": "item", "transform": "log"}
    tag: dict[str, Any] = {
        "name": "tag",
        "kind": "multi",
        "source": "item",
        "delimiter": ",",
        "max_length": 4,
    }
    config = {
        "data": {"train": [str(log)], "split": {"kind": "time", "valid": 0.1, "test": 0.1}},
        "schema": {
            "features": [
                *categorical(("user_id", *KUAIRAND_USER), "user", min_count=2),
                *categorical(("video_id", *KUAIRAND_VIDEO), "item", min_count=2),
                duration,
                tag,
                *categorical(("tab", "hour", "weekday"), "context"),
            ],
            "labels": [{"name": name} for name in KUAIRAND_LABELS],
            "user": "user_id",
            "time": "time_ms",
        },
    }
    return [log], config


def _some(source: Source, pattern: str) -> list[Path]:
    found = source.all(pattern)
    if not found:
        raise UserError(f"{source.path}: holds no {pattern}")
    return found
