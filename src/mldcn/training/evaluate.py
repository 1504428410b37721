"""Measuring a model on encoded rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mldcn.comparison import PredictionWriter
from mldcn.config import Config
from mldcn.data.hashing import splitmix64
from mldcn.data.pipeline import ahead
from mldcn.data.shards import EncodedRows
from mldcn.errors import UserError
from mldcn.metrics import Isotonic, MetricStream, Platt
from mldcn.model import Ranker
from mldcn.predict import calibrated

Calibrators = dict[str, Platt | Isotonic]
Scores = NDArray[np.float32]

SAMPLE_ROWS = 4_000_000  # that calibrators are fitted on, at most about so many
PIECE_ROWS = 1 << 16


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on some rows.

    metrics: task -> metric -> value. reliability: task -> the curve's predicted, observed and weight.
    labels, scores: ``(n, T)`` and weights ``(n,)`` of a sample of the rows, only where it was asked for.
    """

    metrics: dict[str, dict[str, float]]
    reliability: dict[str, dict[str, list[float]]]
    labels: Scores | None = None
    scores: Scores | None = None
    weights: Scores | None = None


@torch.no_grad()
def evaluate(
    model: Ranker,
    rows: EncodedRows,
    config: Config,
    *,
    device: torch.device,
    predictions: Path | None = None,
    calibrators: Mapping[str, Platt | Isotonic] | None = None,
    sample: bool = False,
) -> Evaluation:
    """Every metric of every task.

    Where the log has positions, what concerns single rows (AUC, log loss, calibration) is measured with the
    logged ones, since the labels were made there; what ranks within a request or user is measured at the
    serving position, or the old ranking would leak into the new one. The log's negative sampling is not
    corrected for here: its labels carry it too.

    Memory does not grow with the rows: of scores to be sorted, what is beyond half of ``data.memory_mb`` goes
    to the disk.

    Args:
        model: the model.
        rows: encoded rows with labels.
        config: schema, batch size and what to measure.
        device: where the model is.
        predictions: file to write labels and probabilities to.
        calibrators: fitted maps to apply to the probabilities.
        sample: also give labels, probabilities and weights: of all rows, or of about ``SAMPLE_ROWS`` of them,
            drawn by a hash of their numbers.
    """
    schema, wanted = config.log_schema, config.evaluation
    calibrators = dict(calibrators or {})
    hit_by = "request" if schema.request else None
    gauc_by = "user" if schema.user else hit_by
    ranking: dict[str, Any] = {"hit_at": wanted.hit_at, "hit_by": hit_by, "gauc_by": gauc_by}
    # Without positions both probabilities are the same, and one stream measures everything.
    apart = model.position_bias is not None and gauc_by is not None
    memory: dict[str, Any] = {"memory_rows": _memory_rows(config, len(model.tasks), streams=1 + apart)}
    by_row = MetricStream(
        model.tasks, calibration_bins=wanted.calibration_bins, **memory, **({} if apart else ranking)
    )
    by_group = MetricStream(model.tasks, **memory, **ranking) if apart else None
    kept: list[tuple[Scores, Scores, Scores]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(by_row)
        if by_group is not None:
            stack.enter_context(by_group)
        writer = stack.enter_context(PredictionWriter(predictions, model.tasks)) if predictions else None
        size = config.training.eval_batch_size
        row = 0
        columns = rows.pieces(("user", "request", "weight"), size)
        for (labels, logged, served), groups in zip(score(model, rows, size, device), columns, strict=True):
            logged, served = (calibrated(s, model.tasks, calibrators) for s in (logged, served))
            weight = groups["weight"]
            weights = weight if schema.weight else None
            by_row.update(labels, logged, weights, groups)
            if by_group is not None:
                by_group.update(labels, served, weights, groups)
            if writer is not None:
                writer.write(labels, logged, weight, groups["user"], groups["request"])
            if sample:
                drawn = _drawn(row, len(labels), len(rows))
                kept.append((labels[drawn], logged[drawn], weight[drawn]))
                row += len(labels)
        metrics = by_row.compute()
        if by_group is not None:
            for task, values in by_group.compute().items():
                ranked = {k: v for k, v in values.items() if k.startswith(("gauc", "hit"))}
                metrics[task].update(ranked)
    reliability = {
        task: {
            "predicted": curve.predicted.tolist(),
            "observed": curve.observed.tolist(),
            "weight": curve.weight.tolist(),
        }
        for task, curve in by_row.reliability().items()
    }
    arrays = [np.concatenate(parts) for parts in zip(*kept, strict=True)] if kept else [None] * 3
    return Evaluation(metrics, reliability, *arrays)


def _memory_rows(config: Config, tasks: int, *, streams: int) -> int:
    """Rows that metrics may hold in memory: half of ``data.memory_mb`` is theirs, what they need is measured."""
    return max(100_000, (config.data.memory_mb << 19) // ((110 + 30 * tasks) * streams))


def score(
    model: Ranker, rows: EncodedRows, batch_size: int, device: torch.device
) -> Iterator[tuple[Scores, Scores, Scores]]:
    """Chunks of ``(labels, probabilities at the logged position, at the serving one)``, in the log's order."""
    training = model.training
    model.eval()
    try:
        for batch in ahead(rows.batches(batch_size)):
            there = batch.to(device, non_blocking=True)
            logits = model.relevance(there.ids, there.dense).float()
            if model.position_bias is None:
                logged = served = torch.sigmoid(logits).cpu().numpy()
            else:
                at = [model.position_logit(p) for p in (there.position, None)]
                logged, served = (torch.sigmoid(logits + bias).cpu().numpy() for bias in at)
            yield batch.labels.numpy(), logged, served
    finally:
        model.train(training)


def _drawn(first: int, count: int, rows: int) -> NDArray[np.bool_]:
    """Which of ``count`` rows from ``first`` on belong to the sample of ``rows`` rows."""
    if rows <= SAMPLE_ROWS:
        return np.ones(count, np.bool_)
    numbers = np.arange(first, first + count, dtype=np.uint64)
    numbers = splitmix64(numbers * np.uint64(0x9E3779B97F4A7C15))
    return numbers < np.uint64(int(SAMPLE_ROWS / rows * 2**64))


def check_labels(rows: EncodedRows, tasks: Sequence[str], task: str, metric: str) -> None:
    """Refuses validation rows on which the monitored metric would be undefined at every evaluation.

    Raises:
        UserError: the task's label is the same in all rows where it is known.
    """
    column, known, found = tasks.index(task), 0, set[float]()
    for piece in rows.pieces(("labels",), PIECE_ROWS):
        labels = piece["labels"][:, column]
        labels = labels[~np.isnan(labels)]
        known += labels.size
        found.update(np.unique(labels).tolist())
        if len(found) > 1:
            return
    what = f"is {found.pop():g} in all {known:,}" if found else f"is unknown in all {len(rows):,}"
    raise UserError(
        f"label {task} {what} validation rows, so that {metric} is undefined; check the label's column and "
        "at_least, or the split"
    )


def fit_calibrators(kind: Literal["none", "platt", "isotonic"], valid: Evaluation) -> Calibrators:
    """A calibrator a task, fitted on the validation rows; none where a task has only one class there."""
    if kind == "none":
        return {}
    assert valid.labels is not None
    assert valid.scores is not None
    fitted: Calibrators = {}
    calibrator: Any = Platt if kind == "platt" else Isotonic
    for i, task in enumerate(valid.metrics):
        labels = valid.labels[:, i]
        known = labels[~np.isnan(labels)]
        if known.size and known.min() != known.max():
            fitted[task] = calibrator.fit(valid.scores[:, i], labels, valid.weights)
    return fitted
