"""Metrics of ranking and calibration, the significance of differences, and fitted calibrators."""

from __future__ import annotations

from typing import NamedTuple

from mldcn.errors import UserError
from mldcn.metrics.calibration import Isotonic, Platt, calibrator_from_json
from mldcn.metrics.interval import auc_intervals
from mldcn.metrics.pointwise import (
    ReliabilityCurve,
    calibration_ratio,
    expected_calibration_error,
    logloss,
    normalised_entropy,
    reliability_curve,
    rig,
)
from mldcn.metrics.ranking import auc, gauc, hit_at_k, pr_auc
from mldcn.metrics.replicates import holm, minimum_detectable
from mldcn.metrics.significance import (
    Difference,
    cluster_bootstrap,
    delong,
    non_inferior,
    paired_logloss_test,
    paired_t,
)
from mldcn.metrics.stream import MetricStream

__all__ = [
    "METRICS",
    "Difference",
    "Isotonic",
    "MetricInfo",
    "MetricStream",
    "Platt",
    "ReliabilityCurve",
    "auc",
    "auc_intervals",
    "calibration_ratio",
    "calibrator_from_json",
    "cluster_bootstrap",
    "delong",
    "expected_calibration_error",
    "gauc",
    "hit_at_k",
    "holm",
    "logloss",
    "metric_info",
    "minimum_detectable",
    "non_inferior",
    "normalised_entropy",
    "paired_logloss_test",
    "paired_t",
    "pr_auc",
    "reliability_curve",
    "rig",
]


class MetricInfo(NamedTuple):
    """Which way a metric is better (None: neither, as 1 is best) and what it is."""

    higher_is_better: bool | None
    description: str


METRICS = {
    "auc": MetricInfo(True, "chance that a positive scores above a negative"),
    "logloss": MetricInfo(False, "mean log loss in nats"),
    "ne": MetricInfo(False, "log loss over that of predicting the mean label"),
    "rig": MetricInfo(True, "relative information gain, 1 - ne"),
    "calibration": MetricInfo(None, "predicted positives over observed ones; 1 is best"),
    "ece": MetricInfo(False, "expected calibration error over bins of equal mass"),
    "pr_auc": MetricInfo(True, "average precision"),
    "gauc": MetricInfo(True, "mean AUC within a group, weighted by impressions"),
    "hit@k": MetricInfo(True, "positives among a session's k highest scores, mean over sessions"),
    "hit_rate@k": MetricInfo(True, "share of sessions with a positive among their k highest scores"),
}


def metric_info(name: str) -> MetricInfo:
    """What :data:`METRICS` says of a metric, ``hit@3`` and its like included.

    Raises:
        UserError: there is no such metric.
    """
    stem, at, k = name.partition("@")
    info = METRICS.get(f"{stem}@k" if at and (k.isdecimal() and int(k) > 0) else name)
    if info is None or name.endswith("@k"):
        raise UserError(
            f"no metric is called {name!r}; known: {', '.join(METRICS)} (k a number, as in hit@3)"
        )
    return info
