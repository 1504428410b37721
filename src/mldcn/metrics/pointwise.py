"""Metrics that are sums over rows: log loss and its kin, and calibration.

Scores are probabilities. Rows with a null (NaN) label are left out. What is undefined (no rows, one class
only where both are needed) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mldcn.errors import UserError
from mldcn.metrics.rows import Array, Rows, check_rows
from mldcn.metrics.ties import BLOCK, Ties, descending_blocks, scores_of_keys, tie_groups

# So many probabilities, each at least 2**-52, have a product that no float64 rounds to 0.
_FACTORS = 16


def logloss(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of ``-log(p if y else 1 - p)``, in nats.

    Probabilities are kept the machine epsilon of the scores' type away from 0 and 1, as scikit-learn does.
    """
    return PointSums.of(check_rows(labels, scores, weights, probabilities=True)).logloss


def normalised_entropy(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Log loss over that of predicting the mean label for every row (He et al. 2014, sec. 2)."""
    return PointSums.of(check_rows(labels, scores, weights, probabilities=True)).normalised_entropy


def rig(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Relative information gain, ``1 - normalised_entropy``."""
    return 1.0 - normalised_entropy(labels, scores, weights)


def calibration_ratio(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Predicted positives over observed ones, ``sum p / sum y``; NaN where none was observed."""
    return PointSums.of(check_rows(labels, scores, weights, probabilities=True)).calibration_ratio


@dataclass
class PointSums:
    """Sums over rows that can be added up chunk by chunk."""

    weight: float = 0.0
    positive: float = 0.0
    predicted: float = 0.0
    loss: float = 0.0

    @classmethod
    def of(cls, rows: Rows) -> PointSums:
        """The sums of some rows."""
        sums = cls()
        sums.add(rows)
        return sums

    def add(self, rows: Rows) -> None:
        """Adds rows whose scores are probabilities."""
        self.weight += rows.weight
        if rows.weights is None:
            self.positive += float(np.count_nonzero(rows.positive))
        else:
            self.positive += float(rows.weights.sum(where=rows.positive, dtype=np.float64))
        floor = float(np.finfo(rows.scores.dtype).eps)
        for start in range(0, len(rows), BLOCK):
            block = slice(start, start + BLOCK)
            scores = rows.scores[block].astype(np.float64)
            likelihood = np.maximum(np.where(rows.positive[block], scores, 1.0 - scores), floor)
            if rows.weights is None:
                self.predicted += float(scores.sum())
                self.loss -= _sum_of_logs(likelihood)
            else:
                weights = rows.weights[block].astype(np.float64)
                self.predicted += float((scores * weights).sum())
                self.loss -= float((np.log(likelihood) * weights).sum())

    @property
    def logloss(self) -> float:
        """Mean log loss in nats."""
        return _ratio(self.loss, self.weight)

    @property
    def normalised_entropy(self) -> float:
        """Log loss over the entropy of the mean label."""
        rate = _ratio(self.positive, self.weight)
        if not 0 < rate < 1:
            return math.nan
        return self.logloss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))

    @property
    def calibration_ratio(self) -> float:
        """Predicted positives over observed ones."""
        return _ratio(self.predicted, self.positive)


def _sum_of_logs(values: Array) -> float:
    """``log(values).sum()`` with one logarithm per 16 values: the logarithm of their product."""
    whole = len(values) // _FACTORS * _FACTORS
    products = np.multiply.reduce(values[:whole].reshape(_FACTORS, -1), axis=0)
    return float(np.log(products).sum() + np.log(values[whole:]).sum())


@dataclass(frozen=True)
class ReliabilityCurve:
    """Bins of equal mass in ascending order of score.

    ``predicted`` is a bin's mean score, ``observed`` its mean label, ``weight`` its mass; each ``(bins,)``,
    empty bins left out.
    """

    predicted: Array
    observed: Array
    weight: Array

    @property
    def error(self) -> float:
        """Expected calibration error: the mean of ``|predicted - observed|``, weighted by mass."""
        if not len(self.weight):
            return math.nan
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.weight))


def reliability_curve(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, bins: int = 20
) -> ReliabilityCurve:
    """Mean score against mean label in bins of equal mass.

    Rows of equal score share the bin in which the middle of their mass falls, so that the curve does not
    depend on the order of rows; with few distinct scores there are fewer bins.

    Raises:
        UserError: ``bins`` is below 1, or as :func:`mldcn.metrics.rows.check_rows`.
    """
    rows = check_rows(labels, scores, weights, probabilities=True)
    return reliability_of_ties(tie_groups(descending_blocks(rows)), rows.weight, bins)


def expected_calibration_error(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None, bins: int = 20
) -> float:
    """:attr:`ReliabilityCurve.error` of :func:`reliability_curve`."""
    return reliability_curve(labels, scores, weights, bins).error


def reliability_of_ties(groups: Iterable[Ties], weight: float, bins: int) -> ReliabilityCurve:
    """The curve of rows that come in descending order and weigh ``weight`` together."""
    sums = ReliabilitySums(weight, bins)
    for ties in groups:
        sums.add(ties)
    return sums.curve()


class ReliabilitySums:
    """Collects a :class:`ReliabilityCurve` from ties in descending order of score."""

    def __init__(self, weight: float, bins: int) -> None:
        if bins < 1:
            raise UserError(f"bins: expected at least 1, found {bins}")
        self._bins = bins
        self._weight = weight
        self._seen = 0.0
        self._sums = np.zeros((3, bins))

    def add(self, ties: Ties) -> None:
        """Adds distinct scores below those already added."""
        mass = ties.positive + ties.negative
        upto = np.cumsum(mass) + self._seen
        self._seen = float(upto[-1])
        if self._weight == 0:
            return
        bins = ((upto - mass / 2) * self._bins / self._weight).astype(np.intp)
        np.minimum(bins, self._bins - 1, out=bins)
        for total, column in zip(
            self._sums, (mass, mass * scores_of_keys(ties.keys), ties.positive), strict=True
        ):
            total += np.bincount(bins, column, self._bins)

    def curve(self) -> ReliabilityCurve:
        """The curve of all that was added."""
        mass, predicted, observed = self._sums[:, ::-1]
        filled = mass > 0
        mass = mass[filled]
        return ReliabilityCurve(predicted[filled] / mass, observed[filled] / mass, mass)


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
