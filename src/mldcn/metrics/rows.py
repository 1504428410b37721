"""Labels, scores and weights as every metric wants them: checked once, rows without a label left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mldcn.errors import UserError

Array = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Labelled rows.

    positive: ``(n,)`` bool. scores: ``(n,)`` float32 or float64 without NaN. weights: ``(n,)``, or None where
    every row weighs 1. kept: which of the given rows these are, or None where all of them had a label.
    """

    positive: Array
    scores: Array
    weights: Array | None
    kept: Array | None

    def __len__(self) -> int:
        return int(self.positive.shape[0])

    @property
    def weight(self) -> float:
        """What the rows weigh together."""
        return float(len(self)) if self.weights is None else float(self.weights.sum(dtype=np.float64))

    def select(self, column: ArrayLike, name: str) -> Array:
        """The labelled rows of a further column of the given rows."""
        array = np.asarray(column)
        given = len(self) if self.kept is None else len(self.kept)
        if array.shape != (given,):
            raise UserError(f"{name}: expected shape ({given},) as the scores, found {array.shape}")
        return array if self.kept is None else array[self.kept]


def check_rows(
    labels: ArrayLike,
    scores: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    probabilities: bool = False,
    name: str = "scores",
) -> Rows:
    """Checks labels, scores and weights and leaves out rows whose label is null (NaN).

    Args:
        labels: ``(n,)``: 0, 1 or NaN.
        scores: ``(n,)`` real numbers; infinities are scores like others.
        weights: ``(n,)`` finite and not negative; 1 by default.
        probabilities: whether the scores must lie in [0, 1].
        name: what error messages call the scores.

    Raises:
        UserError: shapes differ, or a value is none of these; names the number of such rows and the first.
    """
    scores = _floats(scores, name)
    if scores.ndim != 1:
        raise UserError(f"{name}: expected one dimension, found shape {scores.shape}")
    positive, kept = _labels(labels, scores.shape)
    if scores.size:
        low, high = scores.min(), scores.max()  # NaN wins in both
        if np.isnan(low):
            raise _bad_rows(name, scores, np.isnan(scores), "are NaN", "has the model diverged?")
        if probabilities and (low < 0 or high > 1):
            outside = (scores < 0) | (scores > 1)
            raise _bad_rows(name, scores, outside, "lie outside [0, 1]", "give probabilities, not logits")
    weights = None if weights is None else _weights(weights, scores.shape)
    if kept is not None:
        positive, scores = positive[kept], scores[kept]
        weights = None if weights is None else weights[kept]
    return Rows(positive, scores, weights, kept)


def _floats(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values)
    if array.dtype in (np.float32, np.float64):
        return array
    try:
        return array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name}: expected numbers, found {array.dtype}") from None


def _labels(labels: ArrayLike, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    array = np.asarray(labels)
    if array.shape != shape:
        raise UserError(f"labels have shape {array.shape}, scores {shape}: give one label a score")
    if array.dtype == np.bool_:
        return array, None
    if array.dtype.kind not in "iuf":
        array = _floats(array, "labels")
    positive = array == 1
    binary = positive | (array == 0)
    if binary.all():
        return positive, None
    odd = ~binary & ~np.isnan(array)
    if odd.any():
        raise _bad_rows("labels", array, odd, "are neither 0 nor 1", "NaN marks a row without a label")
    return positive, binary


def _weights(weights: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = _floats(weights, "weights")
    if array.shape != shape:
        raise UserError(f"weights have shape {array.shape}, scores {shape}: give one weight a score")
    bad = ~((array >= 0) & (array < np.inf))
    if bad.any():
        raise _bad_rows(
            "weights", array, bad, "are not finite numbers of at least 0", "mend or drop the rows"
        )
    return array


def _bad_rows(name: str, values: Array, bad: Array, what: str, remedy: str) -> UserError:
    first = int(np.argmax(bad))
    count = int(np.count_nonzero(bad))
    return UserError(
        f"{name}: {count} of {len(values)} {what}, the first at index {first} ({values[first]}); {remedy}"
    )
