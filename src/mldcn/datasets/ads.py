"""Public ad logs: Criteo (Kaggle's file and the 1 TB day files) and Avazu."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import polars as pl

from mldcn.datasets.source import Prepared, Source, categorical, sink, text
from mldcn.errors import UserError

NUMERIC = tuple(f"I{number}" for number in range(1, 14))
CATEGORICAL = tuple(f"C{number}" for number in range(1, 27))
CRITEO_COLUMNS = ("label", *NUMERIC, *CATEGORICAL)
# Below this size a file is somebody's sample, in which few ids are seen ten times.
SAMPLE_BYTES = 100_000_000

AVAZU_IDS = (
    "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category",
    "device_id", "device_ip", "device_model", "device_type", "device_conn_type",
    "C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21",
)  # fmt: skip


def prepare_criteo_kaggle(path: Path, out: Path) -> Prepared:
    """``train.txt`` (or a ``.tsv``, or either gzipped) is read where it lies; only a config is made."""
    if path.is_file() and not path.name.endswith((".tar.gz", ".tgz", ".zip")):
        file = path
    else:
        file = Source(path, out / "raw").need("train.txt", "train.txt.gz", "train.tsv", "train.tsv.gz")
    return _criteo([file])


def prepare_criteo_1tb(path: Path, out: Path) -> Prepared:
    """The day files ``day_0`` … ``day_23`` (plain or gzipped) in a folder, or one of them, read in place."""
    if path.is_file():
        return _criteo([path])
    days: dict[int, Path] = {}
    for file in Source(path, out / "raw").all("day_*"):
        found = re.fullmatch(r"day_(\d+)(\.gz)?", file.name)
        if found:
            days.setdefault(int(found.group(1)), file)
    if not days:
        raise UserError(f"{path}: holds no day_0 … day_23 (plain or .gz)")
    return _criteo([days[day] for day in sorted(days)])


def _criteo(files: list[Path]) -> Prepared:
    files = [file.resolve() for file in files]
    for file in files:
        _check_criteo(file)
    sample = sum(file.stat().st_size for file in files) < SAMPLE_BYTES
    numeric: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": "numeric",
            "transform": "log",
            # I2 goes down to -3; DCN V2 takes log(x + 4) of it and log(x + 1) of the others.
            "offset": 4.0 if name == "I2" else 1.0,
            "missing_indicator": True,
        }
        for name in NUMERIC
    ]
    config = {
        "data": {
            "train": [str(file) for file in files],
            "format": "tsv",
            "header": False,
            "column_names": list(CRITEO_COLUMNS),
            "split": {"kind": "order", "valid": 0.1, "test": 0.1},
        },
        "schema": {
            "features": [*numeric, *categorical(CATEGORICAL, "context", min_count=2 if sample else 10)],
            "labels": [{"name": "label"}],
        },
    }
    return files, config


def _check_criteo(file: Path) -> None:
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            line = lines.readline(1 << 16)
    except (OSError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    found = line.count(b"\t") + 1
    if found != len(CRITEO_COLUMNS):
        raise UserError(
            f"{file}: row 1 has {found} tab-separated columns where Criteo's label, I1-I13 and C1-C26 make "
            f"{len(CRITEO_COLUMNS)}"
        )


def prepare_avazu(path: Path, out: Path) -> Prepared:
    """``train.csv`` (or ``train.gz``) of the Kaggle contest; ``hour`` (YYMMDDHH) becomes hour and weekday."""
    if path.is_file() and not path.name.endswith((".zip", ".tar.gz")):
        file = path
    else:
        file = Source(path, out / "raw").need("train.csv", "train.csv.gz", "train.gz", "train")
    frame = text(file)
    missing = [name for name in ("click", "hour", *AVAZU_IDS) if name not in frame.collect_schema().names()]
    if missing:
        raise UserError(f"{file}: has no column {', '.join(missing)}")
    moment = pl.format("20{}00", "hour").str.to_datetime("%Y%m%d%H%M")
    log = sink(
        frame.select(
            pl.col("click").cast(pl.Int8),
            *AVAZU_IDS,
            time=moment.dt.epoch("s"),
            hour_of_day=moment.dt.hour().cast(pl.String),
            weekday=moment.dt.weekday().cast(pl.String),
        ),
        out / "avazu.parquet",
        file,
    )
    of_site = ("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category")
    of_user = ("device_id", "device_ip", "device_model", "device_type", "device_conn_type")
    rest = [name for name in AVAZU_IDS if name not in of_site + of_user]
    min_count = 2 if file.stat().st_size < SAMPLE_BYTES else 10
    config = {
        "data": {"train": [str(log)], "split": {"kind": "order", "valid": 0.1, "test": 0.1}},
        "schema": {
            "features": [
                *categorical(of_user, "user", min_count),
                *categorical((*of_site, *rest, "hour_of_day", "weekday"), "context", min_count),
            ],
            "labels": [{"name": "click"}],
            "time": "time",
        },
    }
    return [log], config
