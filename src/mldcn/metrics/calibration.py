"""Calibrators: monotone maps from a model's probabilities to calibrated ones, fitted on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mldcn.errors import UserError
from mldcn.metrics.rows import Array, check_rows
from mldcn.metrics.ties import descending_blocks, scores_of_keys, tie_groups

_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Platt:
    """``sigmoid(slope * logit(score) + intercept)`` (Platt 1999)."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Platt:
        """Maximum likelihood, by Newton's method.

        Targets are Platt's (his section 2.2): (positives + 1) / (positives + 2) and 1 / (negatives + 2) in
        place of 1 and 0, so that separable rows do not send the slope to infinity.

        Args:
            scores: ``(n,)`` probabilities.
            labels: ``(n,)``: 0, 1 or NaN.
            weights: ``(n,)``, 1 by default.

        Raises:
            UserError: one class only, or as :func:`mldcn.metrics.rows.check_rows`.
        """
        rows = check_rows(labels, scores, weights, probabilities=True)
        mass = np.ones(len(rows)) if rows.weights is None else rows.weights.astype(np.float64)
        positive = float(mass[rows.positive].sum())
        negative = float(mass.sum()) - positive
        _need_both_classes(positive, negative)
        target = np.where(rows.positive, (positive + 1) / (positive + 2), 1 / (negative + 2))
        logits = _logit(rows.scores)
        design = np.stack([logits, np.ones(len(rows))])
        point = np.array([0.0, np.log((positive + 1) / (negative + 1))])
        loss = _logistic_loss(point @ design, target, mass)
        for _ in range(_NEWTON_STEPS):
            probability = _sigmoid(point @ design)
            gradient = design @ (mass * (probability - target))
            curvature = (design * (mass * probability * (1 - probability))) @ design.T
            # The ridge, far below any curvature that matters, keeps constant scores solvable.
            step = np.linalg.solve(curvature + 1e-9 * mass.sum() * np.eye(2), gradient)
            size = 1.0
            while (
                new := _logistic_loss((point - size * step) @ design, target, mass)
            ) > loss and size > 1e-6:
                size /= 2
            if not new < loss:
                break
            point, loss = point - size * step, new
        return cls(float(point[0]), float(point[1]))

    def transform(self, scores: ArrayLike) -> Array:
        """Calibrated probabilities, float64, of probabilities of any shape."""
        return _sigmoid(self.slope * _logit(np.asarray(scores)) + self.intercept)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers that :func:`calibrator_from_json` reads."""
        return {"kind": "platt", "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Platt:
        """The inverse of :meth:`to_json`."""
        return cls(float(raw["slope"]), float(raw["intercept"]))


@dataclass(frozen=True)
class Isotonic:
    """The non-decreasing map of least squared error (Zadrozny and Elkan 2002), linear between its knots.

    Rows pooled together tie afterwards, so that AUC can change a little.
    """

    scores: Array
    values: Array

    @classmethod
    def fit(cls, scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Isotonic:
        """Pools adjacent violators.

        Values stay 1 / (rows + 2) away from 0 and 1: no finite sample earns certainty, and one miss would
        make the log loss explode.

        Args:
            scores: ``(n,)`` probabilities.
            labels: ``(n,)``: 0, 1 or NaN.
            weights: ``(n,)``, 1 by default.

        Raises:
            UserError: one class only, or as :func:`mldcn.metrics.rows.check_rows`.
        """
        from scipy.optimize import isotonic_regression

        rows = check_rows(labels, scores, weights, probabilities=True)
        ties = list(tie_groups(descending_blocks(rows)))
        if not ties:
            _need_both_classes(0.0, 0.0)
        keys, positive, negative = (np.concatenate(columns)[::-1] for columns in zip(*ties, strict=True))
        _need_both_classes(float(positive.sum()), float(negative.sum()))
        mass = positive + negative
        kept = mass > 0
        distinct, rate, mass = scores_of_keys(keys[kept]), positive[kept] / mass[kept], mass[kept]
        fitted = isotonic_regression(rate, weights=mass).x
        margin = 1.0 / (len(rows) + 2)
        # Inside a pool only its two ends are needed.
        edge = np.ones(len(fitted), np.bool_)
        edge[1:-1] = (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:])
        return cls(distinct[edge], np.clip(fitted[edge], margin, 1 - margin))

    def transform(self, scores: ArrayLike) -> Array:
        """Calibrated probabilities, float64, of probabilities of any shape; constant beyond the end knots."""
        return np.interp(np.asarray(scores, np.float64), self.scores, self.values)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers that :func:`calibrator_from_json` reads."""
        return {"kind": "isotonic", "scores": self.scores.tolist(), "values": self.values.tolist()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Isotonic:
        """The inverse of :meth:`to_json`."""
        scores, values = np.array(raw["scores"], np.float64), np.array(raw["values"], np.float64)
        if scores.shape != values.shape or scores.ndim != 1 or not len(scores):
            raise ValueError(f"{scores.shape} scores and {values.shape} values make no map")
        return cls(scores, values)


def calibrator_from_json(raw: dict[str, Any]) -> Platt | Isotonic:
    """A calibrator from what its ``to_json`` gave.

    Raises:
        UserError: that is no calibrator.
    """
    kinds: dict[str, type[Platt] | type[Isotonic]] = {"platt": Platt, "isotonic": Isotonic}
    try:
        return kinds[raw["kind"]].from_json(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not a calibrator of kind {' or '.join(kinds)}: {error!r}") from None


def _need_both_classes(positive: float, negative: float) -> None:
    if positive == 0 or negative == 0:
        raise UserError(
            f"a calibrator needs rows of both classes; found weight {positive:g} of positives and "
            f"{negative:g} of negatives: fit it on more rows"
        )


def _logit(scores: Array) -> Array:
    edge = np.finfo(scores.dtype).eps if scores.dtype.kind == "f" else np.finfo(np.float64).eps
    inside = np.clip(scores.astype(np.float64), edge, 1 - edge)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _sigmoid(logits: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))


def _logistic_loss(logits: Array, target: Array, mass: Array) -> float:
    return float(mass @ (np.logaddexp(0, logits) - target * logits))
