"""Runs on the same rows: differences of two with intervals and p-values; how far copies of one lie apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn.errors import UserError
from mldcn.files import atomic
from mldcn.metrics import Difference, cluster_bootstrap, delong

LABEL, PROBABILITY = "y_", "p_"
Array = NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """All differences B - A of two runs: (task, metric, difference)."""

    names: tuple[str, str]
    rows: int
    differences: tuple[tuple[str, str, Difference], ...]

    def verdicts(self) -> Iterable[str]:
        """A sentence a difference, that claims no more than the test shows."""
        for task, metric, d in self.differences:
            what = f"{task} {metric} ({d.method})"
            if np.isnan(d.p_value):
                yield f"{what}: undefined on these rows"
            elif d.better is None:
                yield f"{what}: no difference shown; B - A lies within [{d.low:+.5f}, {d.high:+.5f}]"
            else:
                winner, loser = self.names if d.better == "a" else self.names[::-1]
                yield f"{what}: {winner} is better than {loser} by {abs(d.delta):.5f}"


class PredictionWriter:
    """Writes labels, probabilities and clusters of scored rows as an Arrow file, chunk by chunk."""

    def __init__(self, path: Path, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks
        fields = [(f"{LABEL}{task}", pa.float32()) for task in tasks]
        fields += [(f"{PROBABILITY}{task}", pa.float32()) for task in tasks]
        fields += [("weight", pa.float32()), ("user", pa.int64()), ("request", pa.int64())]
        self.schema = pa.schema(fields)
        self._atomic = atomic(path)
        self._file = pa.ipc.new_file(str(self._atomic.__enter__()), self.schema)

    def __enter__(self) -> PredictionWriter:
        return self

    def write(
        self,
        labels: NDArray[np.float32],
        scores: NDArray[np.float32],
        weight: NDArray[np.float32],
        user: NDArray[np.int64],
        request: NDArray[np.int64],
    ) -> None:
        """Appends rows: labels and scores ``(n, T)``, the others ``(n,)``."""
        columns = [np.ascontiguousarray(labels[:, i]) for i in range(len(self.tasks))]
        columns += [np.ascontiguousarray(scores[:, i]) for i in range(len(self.tasks))]
        self._file.write_batch(pa.record_batch([*columns, weight, user, request], schema=self.schema))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the file in its place, or drops it after an error."""
        try:
            self._file.close()
        except OSError as problem:
            kind, error = type(problem), problem
        self._atomic.__exit__(kind, error, trace)


def read_predictions(path: Path) -> pa.Table:
    """What a :class:`PredictionWriter` wrote, memory-mapped.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except FileNotFoundError:
        raise UserError(
            f"{path}: the run has no test rows to compare on; name a log with --log, or give data.split a "
            "test share"
        ) from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: damaged ({error}); train the run again or restore it") from None


def prediction_chunks(path: Path) -> tuple[tuple[str, ...], Iterator[tuple[Array, Array, Array]]]:
    """The tasks, and the labels ``(n, T)``, probabilities ``(n, T)`` and weights ``(n,)`` chunk by chunk.

    Raises:
        UserError: the file is missing or damaged.
    """
    table = read_predictions(path)  # mapped: a chunk is read when it is looked at
    tasks = tuple(name.removeprefix(LABEL) for name in table.column_names if name.startswith(LABEL))

    def chunks() -> Iterator[tuple[Array, Array, Array]]:
        for batch in table.to_batches():
            labels, scores = (
                np.stack([batch[f"{prefix}{task}"].to_numpy(zero_copy_only=False) for task in tasks], axis=1)
                for prefix in (LABEL, PROBABILITY)
            )
            yield labels, scores, batch["weight"].to_numpy(zero_copy_only=False)

    return tasks, chunks()


def compare_predictions(
    a: pa.Table, b: pa.Table, names: tuple[str, str], *, repeats: int = 1000, seed: int = 0
) -> Comparison:
    """Differences B - A of two models' predictions for the same rows.

    AUC by DeLong's test (rows taken as independent) where all weights are 1; AUC and log loss by a bootstrap
    that draws whole users (or requests, or rows, whichever the log names) again with their rows.

    Raises:
        UserError: the rows are not the same.
    """
    tasks = [n.removeprefix(LABEL) for n in a.column_names if n.startswith(LABEL)]
    common = [task for task in tasks if f"{LABEL}{task}" in b.column_names]
    if not common:
        raise UserError(f"{names[0]} and {names[1]} have no task in common; train them for the same label")
    same = a.num_rows == b.num_rows
    for task in common:
        name = f"{LABEL}{task}"
        same = same and np.array_equal(a[name].to_numpy(), b[name].to_numpy(), equal_nan=True)
    if not same:
        raise UserError(
            f"{names[0]} and {names[1]} were not tested on the same rows ({a.num_rows:,} and "
            f"{b.num_rows:,}); name a log for both with --log"
        )
    weight = a["weight"].to_numpy()
    if not np.array_equal(weight, b["weight"].to_numpy()):
        raise UserError(
            f"{names[0]} and {names[1]} weigh the rows differently; train both with the same schema.weight"
        )
    clusters, unit = clusters_of(a["user"].to_numpy(), a["request"].to_numpy())
    found: list[tuple[str, str, Difference]] = []
    for task in common:
        labels = a[f"{LABEL}{task}"].to_numpy()
        known = ~np.isnan(labels)
        p_a, p_b = (t[f"{PROBABILITY}{task}"].to_numpy()[known] for t in (a, b))
        y, w, c = labels[known], weight[known], clusters[known]
        if not 0 < np.count_nonzero(y) < len(y):
            continue  # one class only: no metric is defined
        weights = None if (w == 1).all() else w
        if weights is None:
            found.append((task, "auc", delong(y, p_a, p_b)))
        for metric in ("auc", "logloss"):
            d = cluster_bootstrap(metric, y, p_a, p_b, c, weights=weights, repeats=repeats, seed=seed)
            found.append((task, metric, replace(d, method=f"bootstrap by {unit}")))
    return Comparison(names, a.num_rows, tuple(found))


def clusters_of(user: Array, request: Array) -> tuple[NDArray[np.int64], str]:
    """Which rows are not independent of each other, ``(n,)``, and what they share: a user, else a request.

    Args:
        user: ``(n,)``, 0 where unknown.
        request: ``(n,)``, 0 where unknown.

    Returns:
        Clusters, and ``user``, ``request`` or, where the log names neither, ``row``.
    """
    for unit, values in (("user", user), ("request", request)):
        unknown = values == 0
        if not unknown.all():
            # Rows whose user the log does not name stand alone: they are not one user's.
            _, codes = np.unique(values, return_inverse=True)
            return np.where(unknown, -1 - np.arange(len(values)), codes), unit
    return np.arange(len(user)), "row"


@dataclass(frozen=True)
class Agreement:
    """How far one task's predictions lie apart, over all pairs of copies and all test rows.

    ``difference`` is the mean of ``|p_a - p_b|``, ``relative`` that over ``mean``, the mean prediction.
    """

    rows: int
    mean: float
    difference: float
    relative: float


def agreement(files: Sequence[Path]) -> dict[str, Agreement]:
    """How far the predictions in some files lie apart, task by task; a batch of each is in memory at a time.

    Args:
        files: what ``PredictionWriter`` wrote, at least two.

    Raises:
        UserError: a file is damaged, or they do not hold the same rows.
    """
    count, rows = len(files), 0
    total: dict[str, float] = {}
    differences: dict[str, float] = {}
    # Over sorted values p_0 <= ... <= p_{n-1}, the sum of all |p_i - p_j| is sum_k (2 k - n + 1) p_k.
    factors = 2.0 * np.arange(count) - (count - 1)
    for batches in _together(files):
        rows += batches[0].num_rows
        for name in batches[0].schema.names:
            columns = [batch[name].to_numpy() for batch in batches]
            if name.startswith(LABEL):
                if not all(np.array_equal(column, columns[0], equal_nan=True) for column in columns):
                    _refuse(files)
            elif name.startswith(PROBABILITY):
                task = name.removeprefix(PROBABILITY)
                scores = np.sort(np.stack(columns).astype(np.float64), axis=0)
                total[task] = total.get(task, 0.0) + float(scores.sum())
                differences[task] = differences.get(task, 0.0) + float(factors @ scores.sum(axis=1))
    found = {}
    for task, value in total.items():
        mean = value / (rows * count)
        difference = differences[task] / (rows * count * (count - 1) / 2)
        found[task] = Agreement(rows, mean, difference, difference / mean if mean else math.nan)
    return found


def _together(files: Sequence[Path]) -> Iterator[list[pa.RecordBatch]]:
    """The files' batches, side by side. They are cut alike: the config says where."""
    try:
        readers = [pa.ipc.open_file(pa.memory_map(str(file))) for file in files]
        if len({(reader.num_record_batches, reader.schema) for reader in readers}) > 1:
            _refuse(files)
        for i in range(readers[0].num_record_batches):
            batches = [reader.get_batch(i) for reader in readers]
            if len({batch.num_rows for batch in batches}) > 1:
                _refuse(files)
            yield batches
    except pa.ArrowInvalid as error:
        raise UserError(f"{files[0].parent.parent}: a copy's {files[0].name} is damaged ({error})") from None


def _refuse(files: Sequence[Path]) -> None:
    raise UserError(
        f"{files[0].parent.parent}: the copies were not tested on the same rows; train them again with --force"
    )
