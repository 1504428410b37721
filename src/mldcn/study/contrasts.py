"""Differences, slopes and interpolations of a study's metrics: sums of cells whose factors add up to 0.

A cell is a rival at a point. Of each such sum there is a value a seed, paired over the cells, and its draws over
clusters of the test rows, the same for all runs; :mod:`mldcn.metrics.replicates` makes intervals of both.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn.comparison import LABEL, PROBABILITY, read_predictions
from mldcn.metrics import metric_info
from mldcn.metrics.replicates import (
    ClusterSums,
    cluster_counts,
    cluster_sums,
    group_codes,
    minimum_detectable,
    seeds_and_rows,
    student,
    with_ranking,
)
from mldcn.metrics.rows import check_rows
from mldcn.run import RunFolder
from mldcn.study.findings import Cell, Estimate
from mldcn.study.rows import RunRow, Study

DRAWS = 400  # of clusters: a standard error is then known to 1 / sqrt(800), 3.5 %
_CHUNK = 1 << 19  # rows read at a time
_SORTED = 4_000_000  # rows that may be sorted in memory, for metrics by group
# How far a metric of the predictions may lie from the row's: scores of a small test are tied by their bins.
_SAME = {"auc": 2e-3, "logloss": 1e-4}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tested:
    """What a run's test rows come to. same: a checksum of rows and labels. unit: of the clusters."""

    same: int
    unit: str
    sums: ClusterSums


def read_tested(file: Path, task: str, metrics: tuple[str, ...] = ()) -> Tested | None:
    """Sums over the clusters of a run's test rows; None where there are no predictions of both classes.

    Read once a process, for as long as nobody writes the file again.

    Args:
        file: what a run's test wrote.
        task: whose labels and probabilities.
        metrics: wanted beside AUC and log loss: GAUC, HIT@k; those that the file cannot give are left out.

    Raises:
        UserError: the file is damaged.
    """
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    ranked = tuple(name for name in metrics if name == "gauc" or name.startswith("hit@"))
    return _tested(file, task, ranked, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)
def _tested(file: Path, task: str, ranked: tuple[str, ...], _modified: int, _size: int) -> Tested | None:
    table = read_predictions(file)  # mapped: a piece is read when it is looked at
    if f"{LABEL}{task}" not in table.column_names:
        return None
    named = [name for name in ("user", "request") if _named(table, name)]
    unit = (*named, "row")[0]
    same = 0

    def chunks() -> Iterator[tuple[Any, Any, Any, Any]]:
        nonlocal same
        same, row = 0, 0
        for batches in _pieces(table):
            labels, scores, weights = (
                np.concatenate([batch[name].to_numpy(zero_copy_only=False) for batch in batches])
                for name in (f"{LABEL}{task}", f"{PROBABILITY}{task}", "weight")
            )
            ids = np.zeros(len(labels), np.int64)
            if unit != "row":
                ids = np.concatenate([batch[unit].to_numpy(zero_copy_only=False) for batch in batches])
            codes = _codes(ids, row)
            for column in (labels, weights, codes):
                same = zlib.crc32(np.ascontiguousarray(column).tobytes(), same)
            row += len(ids)
            yield labels, scores, weights, codes

    sums = cluster_sums(chunks)
    if sums is None:
        return None
    for metric in ranked if table.num_rows <= _SORTED else ():
        by = unit if metric == "gauc" else "request"
        if by in named:
            labels, scores, weights = (
                table[name].to_numpy() for name in (f"{LABEL}{task}", f"{PROBABILITY}{task}", "weight")
            )
            rows = check_rows(labels, scores, weights, probabilities=True)
            sums = with_ranking(sums, metric, rows, table[by].to_numpy(), _codes(table[unit].to_numpy(), 0))
    return Tested(same, unit, sums)


def _codes(ids: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    """Hashed clusters; rows whose user the log does not name stand alone: they are not one user's."""
    return group_codes(np.where(ids == 0, -1 - np.arange(first, first + len(ids)), ids))


def _named(table: pa.Table, column: str) -> bool:
    return any((batch[column].to_numpy(zero_copy_only=False) != 0).any() for batch in table.to_batches())


def _pieces(table: pa.Table) -> Iterator[list[pa.RecordBatch]]:
    held: list[pa.RecordBatch] = []
    for batch in table.to_batches(max_chunksize=_CHUNK):
        held.append(batch)
        if sum(each.num_rows for each in held) >= _CHUNK:
            yield held
            held = []
    if held:
        yield held


@dataclass(frozen=True)
class Contrast:
    """A sum of cells: the seeds that all of them have, its value by seed, and what it tells of others."""

    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    over_seeds: Estimate
    over_both: Estimate


class Contrasts:
    """Sums of a study's cells.

    Args:
        study: its final runs are read, and their predictions.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.cells: dict[Cell, dict[int, RunRow]] = {}
        for row in study.final:
            if not row.diverged and row.test is not None:
                self.cells.setdefault((row.rival, row.point), {})[row.seed] = row
        self.unit: str | None = None
        self._counts: dict[bytes, Floats] = {}
        self._drawn: dict[str, tuple[Tested, dict[str, Floats]] | None] = {}

    def of(self, factors: Mapping[Cell, float], metric: str) -> Contrast | None:
        """A sum of cells, signed so that more is better; None where no seed has them all.

        Args:
            factors: of the cells; they add up to 0.
            metric: of the test rows.
        """
        rows = {cell: self._rows(cell, metric) for cell in factors}
        seeds = sorted(set.intersection(*(set(of_seed) for of_seed in rows.values())))
        if not seeds:
            return None
        sign = 1.0 if metric_info(metric).higher_is_better else -1.0
        by_seed = [
            sign * sum(f * (rows[cell][seed].test or {})[metric] for cell, f in factors.items())
            for seed in seeds
        ]
        value = float(np.mean(by_seed))
        if len(seeds) < 2:
            alone = Estimate(value, why="one seed: nothing says how far another would lie from it")
            return Contrast(tuple(seeds), tuple(by_seed), alone, alone)
        error = float(np.std(by_seed, ddof=1)) / math.sqrt(len(seeds))
        over_seeds = estimate(value, error, len(seeds) - 1)
        over_both = self._over_both(factors, metric, seeds, sign, rows, np.array(by_seed))
        return Contrast(tuple(seeds), tuple(by_seed), over_seeds, over_both)

    def _rows(self, cell: Cell, metric: str) -> dict[int, RunRow]:
        """A cell's runs, by seed, that have the metric."""
        rows = self.cells.get(cell, {})
        return {s: row for s, row in rows.items() if math.isfinite((row.test or {}).get(metric, math.nan))}

    def _over_both(
        self,
        factors: Mapping[Cell, float],
        metric: str,
        seeds: list[int],
        sign: float,
        rows: Mapping[Cell, Mapping[int, RunRow]],
        by_seed: Floats,
    ) -> Estimate:
        value = float(by_seed.mean())
        draws = np.zeros((DRAWS, len(seeds)))
        first: Tested | None = None
        for cell, factor in factors.items():
            for i, seed in enumerate(seeds):
                run = rows[cell][seed]
                found = self._run(run)
                if found is None:
                    return Estimate(value, why=f"predictions are not at hand ({run.run})")
                of_run, drawn = found
                if metric not in drawn:
                    return Estimate(value, why=f"{metric} of other test rows is not known")
                if abs(of_run.sums.value[metric] - (run.test or {})[metric]) > _SAME.get(metric, 1e-4):
                    return Estimate(
                        value, why=f"predictions have another {metric} than their row ({run.run})"
                    )
                first = first or of_run
                if of_run.same != first.same:
                    return Estimate(value, why="the runs were not tested on the same rows")
                draws[:, i] += sign * factor * drawn[metric]
        clusters = int(np.count_nonzero(first.sums.below["auc"])) if first is not None else 0
        if clusters < 2:
            return Estimate(value, why=f"all test rows are of one {self.unit}")
        return estimate(value, *seeds_and_rows(by_seed, draws, clusters))

    def _run(self, row: RunRow) -> tuple[Tested, dict[str, Floats]] | None:
        """A run's test rows, and its metrics over draws of them."""
        if row.run not in self._drawn:
            file = RunFolder(self.study.out / row.run).predictions
            found = read_tested(file, self.study.facts.task, self.study.recipe.metrics)
            if found is None:
                self._drawn[row.run] = None
            else:
                self.unit = found.unit
                used = found.sums.below["auc"] > 0
                key = used.tobytes()
                if key not in self._counts:
                    self._counts[key] = cluster_counts(used, DRAWS)
                self._drawn[row.run] = found, found.sums.drawn(self._counts[key])
        return self._drawn[row.run]


def estimate(value: float, error: float, free: float) -> Estimate:
    """A value with all that its standard error tells."""
    found = student(value, error, free)
    if found is None:
        return Estimate(value, error, free, why="all seeds have the very same difference")
    low, high, p_value = found
    return Estimate(value, error, free, low, high, p_value, minimum_detectable(error, free))
