"""The rows that a model is looked at with: a sample that fits in memory, and the probabilities of any rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mldcn.comparison import clusters_of
from mldcn.data.batch import Batch
from mldcn.data.shards import EncodedRows
from mldcn.errors import UserError
from mldcn.predict import Predictor, calibrated

Array = NDArray[Any]
_PIECE = 1 << 16
_COLUMNS = ("ids", "dense", "labels", "weight", "position", "user", "request")


@dataclass(frozen=True)
class Sample:
    """Encoded rows in memory.

    numbers: of the rows in the log they were drawn from, which has ``total``. clusters: users, requests or
    single rows, as ``unit`` says. The other columns are those of :class:`mldcn.data.shards.EncodedRows`.
    """

    numbers: NDArray[np.int64]
    total: int
    ids: Array
    dense: Array
    labels: Array
    weight: Array
    position: Array
    clusters: NDArray[np.int64]
    unit: str

    def __len__(self) -> int:
        return len(self.numbers)


def draw_sample(rows: EncodedRows, count: int, seed: int) -> Sample:
    """At most ``count`` rows, drawn without replacement, in the log's order.

    Raises:
        UserError: there are no rows.
    """
    total = len(rows)
    if not total:
        raise UserError(f"{rows.folder}: holds no rows to look at; name a log with rows with --log")
    chosen = range(total) if total <= count else sorted(random.Random(seed).sample(range(total), count))
    numbers = np.fromiter(chosen, np.int64, len(chosen))
    parts: dict[str, list[Array]] = {name: [] for name in _COLUMNS}
    start = 0
    for piece in rows.pieces(_COLUMNS, _PIECE):
        first, last = np.searchsorted(numbers, [start, start + _PIECE])
        for name, column in piece.items():
            parts[name].append(column[numbers[first:last] - start])
        start += _PIECE
    columns = {name: np.concatenate(found) for name, found in parts.items()}
    clusters, unit = clusters_of(columns.pop("user"), columns.pop("request"))
    return Sample(numbers, total, clusters=clusters, unit=unit, **columns)


def one_row(rows: EncodedRows, number: int) -> Batch:
    """The row with this number, from 0 on.

    Raises:
        UserError: there is none.
    """
    if not 0 <= number < len(rows):
        raise UserError(f"--row {number}: the rows are numbered from 0 to {len(rows) - 1:,}")
    return next(rows.batches(1, start_batch=number))


@torch.no_grad()
def probabilities(predictor: Predictor, sample: Sample, ids: Array, dense: Array) -> NDArray[np.float32]:
    """Probabilities ``(n, T)`` at the logged positions, calibrated as the run's are, batch by batch.

    Args:
        predictor: the model.
        sample: the rows, for their positions.
        ids: ``(n, C)``, the sample's or others.
        dense: ``(n, D)``.
    """
    model, device = predictor.model, predictor.device
    parts = []
    for start, stop in _pieces(len(ids), predictor.config.training.eval_batch_size):
        tensors = [torch.from_numpy(a[start:stop]).to(device) for a in (ids, dense, sample.position)]
        logits = model.relevance(tensors[0], tensors[1]).float()
        if model.position_bias is not None:
            logits = logits + model.position_logit(tensors[2])
        parts.append(torch.sigmoid(logits).cpu().numpy())
    return calibrated(np.concatenate(parts), predictor.tasks, predictor.calibrators)


def _pieces(rows: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, size):
        yield start, min(start + size, rows)
