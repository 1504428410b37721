"""Measuring a model on encoded rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mldcn.comparison import PredictionWriter
from mldcn.config import Config
from mldcn.data.pipeline import ahead
from mldcn.data.shards import EncodedRows
from mldcn.metrics import Isotonic, MetricStream, Platt
from mldcn.model import Ranker
from mldcn.predict import calibrated

Calibrators = dict[str, Platt | Isotonic]
Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on some rows.

    metrics: task -> metric -> value. reliability: task -> the curve's predicted, observed and weight.
    labels, scores: ``(n, T)`` and weights ``(n,)``, only where they were asked for.
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
    keep: bool = False,
) -> Evaluation:
    """Every metric of every task.

    Where the log has positions, what concerns single rows (AUC, log loss, calibration) is measured with the
    logged ones, since the labels were made there; what ranks within a request or user is measured at the
    serving position, or the old ranking would leak into the new one. The log's negative sampling is not
    corrected for here: its labels carry it too.

    Args:
        model: the model.
        rows: encoded rows with labels.
        config: schema, batch size and what to measure.
        device: where the model is.
        predictions: file to write labels and probabilities to.
        calibrators: fitted maps to apply to the probabilities.
        keep: also give the labels, probabilities and weights.
    """
    schema, wanted = config.log_schema, config.evaluation
    calibrators = dict(calibrators or {})
    columns = {name: rows.column(name) for name in ("user", "request", "weight")}
    hit_by = "request" if schema.request else None
    gauc_by = "user" if schema.user else hit_by
    ranking: dict[str, Any] = {"hit_at": wanted.hit_at, "hit_by": hit_by, "gauc_by": gauc_by}
    # Without positions both probabilities are the same, and one stream measures everything.
    apart = model.position_bias is not None and gauc_by is not None
    by_row = MetricStream(model.tasks, calibration_bins=wanted.calibration_bins, **({} if apart else ranking))
    by_group = MetricStream(model.tasks, **ranking) if apart else None
    kept: list[tuple[Scores, Scores, Scores]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(by_row)
        if by_group is not None:
            stack.enter_context(by_group)
        writer = stack.enter_context(PredictionWriter(predictions, model.tasks)) if predictions else None
        for start, labels, logged, served in score(model, rows, config.training.eval_batch_size, device):
            part = slice(start, start + len(labels))
            logged, served = (calibrated(s, model.tasks, calibrators) for s in (logged, served))
            groups = {name: columns[name][part] for name in ("user", "request")}
            weight = columns["weight"][part]
            weights = weight if schema.weight else None
            by_row.update(labels, logged, weights, groups)
            if by_group is not None:
                by_group.update(labels, served, weights, groups)
            if writer is not None:
                writer.write(labels, logged, weight, groups["user"], groups["request"])
            if keep:
                kept.append((labels, logged, weight))
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


def score(
    model: Ranker, rows: EncodedRows, batch_size: int, device: torch.device
) -> Iterator[tuple[int, Scores, Scores, Scores]]:
    """Chunks of ``(first row, labels, probabilities at the logged position, at the serving one)``."""
    training = model.training
    model.eval()
    try:
        start = 0
        for batch in ahead(rows.batches(batch_size)):
            there = batch.to(device, non_blocking=True)
            logits = model.scorer(model.embedder(there.ids, there.dense)).float()
            if model.position_bias is None:
                logged = served = torch.sigmoid(logits).cpu().numpy()
            else:
                at = [model.position_logit(p) for p in (there.position, None)]
                logged, served = (torch.sigmoid(logits + bias).cpu().numpy() for bias in at)
            yield start, batch.labels.numpy(), logged, served
            start += len(batch)
    finally:
        model.train(training)


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
