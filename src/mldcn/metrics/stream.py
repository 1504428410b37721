"""All metrics of all tasks from chunks of predictions, exact and in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from mldcn.errors import UserError
from mldcn.files import scratch
from mldcn.metrics.external_sort import ExternalSort, whole_keys
from mldcn.metrics.pointwise import PointSums, ReliabilityCurve, ReliabilitySums
from mldcn.metrics.ranking import GroupBlock, GroupSums, RankSums, grouped_blocks
from mldcn.metrics.rows import Array, Rows, check_rows
from mldcn.metrics.ties import SortedBlock, descending_blocks, descending_keys, tie_groups

_NO_LABEL = -1
_LEAST_ROWS = 1 << 16  # that a buffer has room for


class _Buffer:
    """Rows in arrays that grow by doubling: labels, scores ``(n, T)``, weights and groups ``(n,)``.

    Small arrays kept chunk by chunk would lie between the large ones that come and go with every batch, and
    the allocator's heap would grow by what no longer fits between them.
    """

    def __init__(self, tasks: int, groups: Sequence[str]) -> None:
        self.rows = 0
        self._tasks, self._names = tasks, tuple(groups)
        self._columns: dict[str, Array] = {}

    @property
    def labels(self) -> Array:
        """``(n, T)``; ``_NO_LABEL`` where there is none."""
        return self._column("labels", np.empty((0, self._tasks), np.int8))

    @property
    def scores(self) -> Array:
        """``(n, T)``."""
        return self._column("scores", np.empty((0, self._tasks)))

    @property
    def weights(self) -> Array | None:
        """``(n,)``, or None where rows have none."""
        return self._columns["weights"][: self.rows] if "weights" in self._columns else None

    @property
    def groups(self) -> dict[str, Array]:
        """``(n,)`` int64 each."""
        return {name: self._column(f"group {name}", np.empty(0, np.int64)) for name in self._names}

    def append(self, labels: Array, scores: Array, weights: Array | None, groups: dict[str, Array]) -> None:
        """Copies rows in."""
        new = {"labels": labels, "scores": scores, **{f"group {name}": groups[name] for name in self._names}}
        if weights is not None:
            new["weights"] = weights
        for name, values in new.items():
            self._write(name, values)
        self.rows += len(labels)

    def clear(self) -> None:
        """Forgets the rows and keeps the memory."""
        self.rows = 0

    def _column(self, name: str, nothing: Array) -> Array:
        return self._columns[name][: self.rows] if name in self._columns else nothing

    def _write(self, name: str, values: Array) -> None:
        kept = self._columns.get(name)
        end = self.rows + len(values)
        if kept is None or len(kept) < end or kept.dtype != np.result_type(kept, values):
            kind = values.dtype if kept is None else np.result_type(kept, values)
            size = max(end, 2 * self.rows, _LEAST_ROWS)
            grown = np.empty((size, *values.shape[1:]), kind)
            if kept is not None:
                grown[: self.rows] = kept[: self.rows]
            self._columns[name] = kept = grown
        kept[self.rows : end] = values


class MetricStream:
    """Collects predictions chunk by chunk and computes every metric of every task.

    Sums over rows are kept as sums. What needs an order (AUC, average precision, calibration bins, GAUC,
    HIT@k) keeps rows: up to ``memory_rows`` in memory, beyond that as sorted runs on disk that
    :meth:`compute` merges. Both ways are exact.

    Args:
        tasks: names of the tasks, in the order of the columns.
        hit_at: the ``k`` of HIT@k.
        hit_by: the group within which HIT@k ranks (a session or request); no HIT@k by default.
        gauc_by: the group of GAUC (a user, say); no GAUC by default.
        calibration_bins: bins of equal mass for the calibration error.
        memory_rows: rows held in memory. A group larger than that is held all the same.
        workdir: where runs go, in a folder that :meth:`close` removes; the system's temporary one by default.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        hit_at: Sequence[int] = (),
        hit_by: str | None = None,
        gauc_by: str | None = None,
        calibration_bins: int = 20,
        memory_rows: int = 8_000_000,
        workdir: str | Path | None = None,
    ) -> None:
        GroupSums(hit_at=hit_at)  # refuses a bad k now, not after a day of predictions
        ReliabilitySums(0.0, calibration_bins)
        self.tasks = tuple(tasks)
        self._hit_at = tuple(hit_at) if hit_by is not None else ()
        self._hit_by = hit_by
        self._gauc_by = gauc_by
        self._group_names = sorted({name for name in (hit_by, gauc_by) if name is not None})
        self._bins = calibration_bins
        self._memory_rows = memory_rows
        self._workdir = workdir
        self._folder: Path | None = None
        self._cleanup = contextlib.ExitStack()
        self._buffer = _Buffer(len(self.tasks), self._group_names)
        self._weighted: bool | None = None
        self._sums = [PointSums() for _ in self.tasks]
        self._by_score: list[ExternalSort] = []
        self._by_group: dict[str, ExternalSort] = {}
        self._curves: dict[str, ReliabilityCurve] = {}

    def update(
        self,
        labels: ArrayLike,
        scores: ArrayLike,
        weights: ArrayLike | None = None,
        groups: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Adds a chunk of rows.

        Args:
            labels: ``(n, T)``: 0, 1, or NaN, which leaves the row out of that task.
            scores: ``(n, T)`` probabilities.
            weights: ``(n,)``; given in every chunk or in none.
            groups: ``(n,)`` integers for ``hit_by`` and ``gauc_by``; rows of group 0 (none known) are left
                out of the metrics by group. Other keys are ignored.

        Raises:
            UserError: a shape or value is none of these, or a group is missing.
        """
        labels, scores = np.asarray(labels), np.asarray(scores)
        if labels.ndim != 2 or labels.shape != scores.shape or labels.shape[1] != len(self.tasks):
            raise UserError(
                f"labels have shape {labels.shape}, scores {scores.shape}: "
                f"expected (n, {len(self.tasks)}) of both, a column for each of {', '.join(self.tasks)}"
            )
        if self._weighted not in (None, weights is not None):
            raise UserError("weights: given for some chunks only; give them for all (1 where there is none)")
        columns = self._groups(groups or {}, len(labels))
        checked = [
            check_rows(labels[:, t], scores[:, t], weights, probabilities=True, name=f"scores of {task}")
            for t, task in enumerate(self.tasks)
        ]
        # From here on nothing is refused: a chunk counts wholly or not at all.
        self._weighted = weights is not None
        for sums, rows in zip(self._sums, checked, strict=True):
            sums.add(rows)
        codes = np.full(labels.shape, _NO_LABEL, np.int8)
        for t, rows in enumerate(checked):
            codes[slice(None) if rows.kept is None else rows.kept, t] = rows.positive
        kind = np.float32 if scores.dtype in (np.float16, np.float32) else np.float64
        weights = None if weights is None else np.asarray(weights, np.float64)
        self._buffer.append(codes, scores.astype(kind, copy=False), weights, columns)
        if self._buffer.rows > self._memory_rows:
            self._spill()

    def compute(self) -> dict[str, dict[str, float]]:
        """Task -> metric -> value, NaN where undefined. More chunks may follow."""
        if self._folder is not None and self._buffer.rows:
            self._spill()
        return {task: self._compute(t) for t, task in enumerate(self.tasks)}

    def reliability(self) -> dict[str, ReliabilityCurve]:
        """Task -> reliability curve, as of the last :meth:`compute`."""
        return dict(self._curves)

    def close(self) -> None:
        """Removes the runs on disk."""
        self._cleanup.close()

    def __enter__(self) -> MetricStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _groups(self, groups: Mapping[str, ArrayLike], rows: int) -> dict[str, Array]:
        columns = {}
        for name in self._group_names:
            if name not in groups:
                raise UserError(f"groups: {name!r} is missing; known: {', '.join(sorted(groups)) or 'none'}")
            column = np.asarray(groups[name])
            if column.shape != (rows,) or column.dtype.kind not in "iu":
                raise UserError(
                    f"groups: {name!r} must be {rows} integers, found {column.dtype} of shape {column.shape}"
                )
            columns[name] = column.astype(np.int64)
        return columns

    def _compute(self, task: int) -> dict[str, float]:
        sums = self._sums[task]
        spilled = self._folder is not None
        blocks = self._merged_scores(task) if spilled else descending_blocks(_rows(self._buffer, task))
        ranks = RankSums(precision=True)
        reliability = ReliabilitySums(sums.weight, self._bins)
        for ties in tie_groups(blocks):
            ranks.add(ties)
            reliability.add(ties)
        curve = self._curves[self.tasks[task]] = reliability.curve()
        values = {
            "auc": ranks.auc,
            "logloss": sums.logloss,
            "ne": sums.normalised_entropy,
            "rig": 1.0 - sums.normalised_entropy,
            "calibration": sums.calibration_ratio,
            "ece": curve.error,
            "pr_auc": ranks.pr_auc,
        }
        grouped = {name: self._group_sums(task, name) for name in self._group_names}
        if self._gauc_by is not None:
            values["gauc"] = grouped[self._gauc_by].gauc
        if self._hit_by is not None:
            for k in self._hit_at:
                values[f"hit@{k}"] = grouped[self._hit_by].hits(k)
                values[f"hit_rate@{k}"] = grouped[self._hit_by].hit_rate(k)
        return values

    def _group_sums(self, task: int, name: str) -> GroupSums:
        sums = GroupSums(hit_at=self._hit_at if name == self._hit_by else ())
        if self._folder is not None:
            blocks = self._merged_groups(task, name)
        else:
            groups = self._buffer.groups[name]
            blocks = grouped_blocks(_rows(self._buffer, task, groups != 0), groups)
        for block in blocks:
            sums.add(block)
        return sums

    def _spill(self) -> None:
        """Writes the buffered rows as one sorted run a task and a group."""
        if self._folder is None:
            workdir = None if self._workdir is None else Path(self._workdir)
            folder = self._folder = self._cleanup.enter_context(scratch("metrics", workdir))
            self._by_score = [ExternalSort(folder / f"task-{t}") for t in range(len(self.tasks))]
            self._by_group = {
                name: ExternalSort(folder / f"group-{g}") for g, name in enumerate(self._group_names)
            }
        buffer = self._buffer
        width = len(self.tasks)
        weight = [("weight", np.float64)] if self._weighted else []
        for t, sort in enumerate(self._by_score):
            rows = _rows(buffer, t)
            run = np.empty(len(rows), [("key", np.uint64), ("positive", np.bool_), *weight])
            run["key"] = descending_keys(rows.scores.astype(np.float64))
            run["positive"] = rows.positive
            if rows.weights is not None:
                run["weight"] = rows.weights
            sort.add(run)
        for name, sort in self._by_group.items():
            groups = buffer.groups[name]
            known = np.flatnonzero(groups)
            run = np.empty(
                len(known),
                [("key", np.int64), ("labels", np.int8, (width,)), ("scores", np.float64, (width,)), *weight],
            )
            run["key"] = groups[known]
            run["labels"] = buffer.labels[known]
            run["scores"] = buffer.scores[known]
            if buffer.weights is not None:
                run["weight"] = buffer.weights[known]
            sort.add(run)
        buffer.clear()

    def _merged_scores(self, task: int) -> Iterator[SortedBlock]:
        # Half the rows, since a merge holds its block twice.
        for block in self._by_score[task].blocks(self._memory_rows // 2):
            yield SortedBlock(
                block["key"].copy(), block["positive"], block["weight"] if self._weighted else None
            )

    def _merged_groups(self, task: int, name: str) -> Iterator[GroupBlock]:
        for block in whole_keys(self._by_group[name].blocks(self._memory_rows // 2)):
            rows = block[block["labels"][:, task] != _NO_LABEL]
            yield GroupBlock(
                rows["key"],
                descending_keys(rows["scores"][:, task]),
                rows["labels"][:, task] == 1,
                rows["weight"] if self._weighted else None,
            )


def _rows(buffer: _Buffer, task: int, among: Array | None = None) -> Rows:
    """The rows with a label for a task, of those in the mask ``among``."""
    labels = buffer.labels[:, task]
    kept = labels != _NO_LABEL
    if among is not None:
        kept &= among
    weights = None if buffer.weights is None else buffer.weights[kept]
    return Rows(labels[kept] == 1, buffer.scores[:, task][kept], weights, kept)
