"""Writing a ``pinads`` log to Parquet or CSV, with what is attainable on it in a file beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mldcn.datasets.pinads.bayes import BayesMeter
from mldcn.datasets.pinads.log import batches, label_matrix
from mldcn.datasets.pinads.truth import World
from mldcn.datasets.pinads.world import DAY, START, TASKS, PinadsConfig

FORMAT_VERSION = 1


def write_log(
    folder: str | Path,
    size: int,
    config: PinadsConfig | None = None,
    *,
    format: Literal["parquet", "csv"] = "parquet",
    with_truth: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes ``pinads.parquet`` (or ``.csv``) and ``truth.json``, what is attainable on it.

    Args:
        folder: is made where it does not exist.
        size: number of impressions.
        config: the world; the default one where left out.
        format: of the log. In CSV, lists are cut at ``|``.
        with_truth: also write ``truth.parquet``, the true probability of each task, row by row.
        progress: is called with (impressions done, size).

    Returns:
        What ``truth.json`` says: for each task the Bayes-optimal AUC and log loss of the whole log and of its
        newest tenth (the shipped config's test rows).
    """
    world = World(config or PinadsConfig())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    newest = size - size // 10
    meters = {"whole": BayesMeter(), "newest_tenth": BayesMeter()}
    done = 0
    with (
        _Writer(folder / f"pinads.{format}") as log,
        _Writer(folder / "truth.parquet") if with_truth else _Nothing() as truth,
    ):
        for batch, probability in batches(world, size):
            log.write(batch)
            truth.write(
                pa.RecordBatch.from_pydict(
                    {task: pa.array(p) for task, p in zip(TASKS, probability.T, strict=True)}
                )
            )
            labels = label_matrix(batch)
            meters["whole"].add(probability, labels)
            late = np.arange(done, done + len(labels)) >= newest
            if late.any():
                meters["newest_tenth"].add(probability[late], labels[late])
            done += batch.num_rows
            if progress is not None:
                progress(done, size)
    return _tell(folder, world, size, {name: meter.result() for name, meter in meters.items()})


def write_days(
    folder: str | Path,
    size: int,
    config: PinadsConfig | None = None,
    *,
    format: Literal["parquet", "csv"] = "parquet",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a file a day, ``day-01.parquet`` (or ``.csv``) and so on, and ``truth.json``.

    Together they hold the rows that :func:`write_log` writes, in the same order.

    Args:
        folder: is made where it does not exist.
        size: number of impressions, of all days.
        config: the world; the default one where left out.
        format: of the log.
        progress: is called with (impressions done, size).

    Returns:
        What ``truth.json`` says: for each task the Bayes-optimal AUC and log loss of each day.
    """
    world = World(config or PinadsConfig())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    log: _Writer | None = None
    meter, name, today, done = BayesMeter(), "", -1, 0
    with ExitStack() as stack:  # no file takes its name before all are written
        for batch, probability in batches(world, size):
            days = (batch.column("timestamp").to_numpy() - START) // DAY
            for day in np.unique(days):
                if log is None or day != today:
                    if log is not None:
                        found[name] = meter.result()
                        log.flush()
                    today, name, meter = int(day), f"day-{day + 1:02}", BayesMeter()
                    log = stack.enter_context(_Writer(folder / f"{name}.{format}"))
                rows = np.flatnonzero(days == day)
                part = batch.slice(rows[0], len(rows))
                log.write(part)
                meter.add(probability[rows], label_matrix(part))
            done += batch.num_rows
            if progress is not None:
                progress(done, size)
        found[name] = meter.result()
    return _tell(folder, world, size, found)


def _tell(folder: Path, world: World, size: int, bayes: dict[str, Any]) -> dict[str, Any]:
    """Writes ``truth.json``; gives what it says."""
    told = {
        "format_version": FORMAT_VERSION,
        "size": size,
        "config": world.config.told(),
        "bayes": bayes,
    }
    part = folder / "truth.json.part"
    part.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / "truth.json")
    return told


class _Nothing:
    """Stands in for a writer where nothing is to be written."""

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def write(self, batch: pa.RecordBatch) -> None:
        """Drops the batch."""


class _Writer:
    """Gathers batches into row groups; the file takes its name only when all of it is written."""

    rows = 65_536

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._waiting: list[pa.RecordBatch] = []
        self._file: Any = None

    def __enter__(self) -> _Writer:
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds rows."""
        self._waiting.append(batch)
        if sum(waiting.num_rows for waiting in self._waiting) >= self.rows:
            self.flush()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.flush()
        if self._file is not None:
            self._file.close()
        if kind is None:
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)

    def flush(self) -> None:
        """Writes what was gathered."""
        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting)
        self._waiting = []
        if self._path.suffix == ".parquet":
            if self._file is None:
                self._file = pq.ParquetWriter(self._part, table.schema, compression="zstd")
            self._file.write_table(table)
            return
        first = self._file is None
        if first:
            self._file = self._part.open("wb")
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        lists = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List)]
        text = [pl.col(name).cast(pl.List(pl.String)).list.join("|") for name in lists]
        # An empty list is an empty cell, not a quoted empty text.
        joined = [pl.when(column.str.len_bytes() > 0).then(column) for column in text]
        frame.with_columns(joined).write_csv(self._file, include_header=first)
