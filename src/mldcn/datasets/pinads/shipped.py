"""The config that goes with a ``pinads`` log: every kind of feature is used once at least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mldcn.datasets.pinads.world import EMBEDDING


def pinads_config(folder: str | Path, *, format: str = "parquet") -> dict[str, Any]:
    """The config of a log that ``write_log(folder, ...)`` wrote, as plain data for ``mldcn.config``.

    ``dwell_seconds`` is left out: it is known only after the click. ``price`` and the counters are known
    before the impression. ``user_id`` names the user for metrics but is no feature: at some tens of
    impressions a user an id is memorised, not learned (users are described by their features and history,
    as in the paper's list of features). The split is by time, 8:1:1.
    """
    return {
        "data": {
            "train": [str(Path(folder) / f"pinads.{format}")],
            "split": {"kind": "time", "valid": 0.1, "test": 0.1},
        },
        "schema": {
            "features": [*_user(), *_item(), *_user_item(), *_context()],
            "labels": [
                {"name": "click"},
                {"name": "good_click", "weight": 0.5},
                {"name": "outbound_click", "weight": 0.5},
                {"name": "save"},
            ],
            "position": "position",
            "max_position": 8,
            "request": "request_id",
            "user": "user_id",
            "time": "timestamp",
        },
    }


def _counter(name: str, source: str) -> dict[str, Any]:
    return {"name": name, "kind": "numeric", "source": source, "transform": "log"}


def _category(name: str, source: str, min_count: int = 1) -> dict[str, Any]:
    encoding = {"kind": "vocabulary", "min_count": min_count}
    return {"name": name, "kind": "categorical", "source": source, "encoding": encoding}


def _vector(name: str, source: str) -> dict[str, Any]:
    # Lengths carry signal (how strong a taste is), so the vectors are not brought to norm 1.
    return {"name": name, "kind": "embedding", "source": source, "width": EMBEDDING, "normalise": False}


def _user() -> list[dict[str, Any]]:
    return [
        _category("age_group", "user"),
        _category("gender", "user"),
        _category("country", "user"),
        _counter("tenure_days", "user"),
        _counter("sessions_28d", "user"),
        _counter("user_impressions", "user"),
        _counter("user_clicks", "user"),
        _vector("user_embedding", "user"),
        {"name": "user_topics", "kind": "multi", "source": "user", "max_length": 5},
        {
            "name": "recent_pins",
            "kind": "sequence",
            "source": "user",
            "share": "pin_id",
            "times": "recent_times",
            "actions": "recent_actions",
            "max_length": 16,
        },
    ]


def _item() -> list[dict[str, Any]]:
    return [
        _category("pin_id", "item", min_count=5),
        _category("advertiser_id", "item"),
        _category("category", "item"),
        _category("format", "item"),
        {"name": "price", "kind": "numeric", "source": "item", "transform": "log", "offset": 0.0},
        _counter("prior_impressions", "item"),
        {"name": "prior_ctr", "kind": "bucketised", "source": "item", "method": "quantile", "buckets": 32},
        _vector("content_embedding", "item"),
        {"name": "pin_topics", "kind": "multi", "source": "item", "share": "user_topics", "max_length": 4},
    ]


def _user_item() -> list[dict[str, Any]]:
    return [
        _counter("user_advertiser_impressions", "user_item"),
        _counter("user_advertiser_clicks", "user_item"),
    ]


def _context() -> list[dict[str, Any]]:
    return [_category(name, "context") for name in ("surface", "device", "hour", "weekday")]
