"""Numeric transforms, fitted in one streaming pass over the training rows.

Means and deviations are merged block by block (Chan, Golub and LeVeque 1983, Eq. 1.5); quantiles come from a
uniform sample of rows that depends on the row's number only, not on how the log is cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mldcn.data.hashing import Keys, hash_numbers
from mldcn.errors import UserError
from mldcn.schema import Bucketised, Numeric

Floats = NDArray[np.float64]

SAMPLE_ROWS = 100_000
GRID_POINTS = 1_000
# A finite number stays finite in float32.
LARGEST = float(np.finfo(np.float32).max)


@dataclass
class Moments:
    """Number, mean and sum of squared deviations of values seen in parts."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Floats) -> None:
        """Merges some values, ``(n,)``."""
        if len(values):
            # Sums that overflow become infinite, and are reported when the fit ends.
            with np.errstate(over="ignore", invalid="ignore"):
                mean = float(values.mean())
                self.merge(Moments(len(values), mean, float(np.square(values - mean).sum())))

    def merge(self, other: Moments) -> None:
        """Merges the moments of other values."""
        total = self.count + other.count
        if total:
            shift = other.mean - self.mean
            self.mean += shift * other.count / total
            self.squares += other.squares + shift * shift * self.count * other.count / total
            self.count = total

    @property
    def deviation(self) -> float:
        """The population's standard deviation."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


class RowSample:
    """A uniform sample of the values of a stream: those whose row numbers have the smallest keyed hashes."""

    def __init__(self, size: int = SAMPLE_ROWS, seed: int = 0) -> None:
        self._size, self._seed = size, seed
        self._priorities = np.zeros(0, np.uint64)
        self._values = np.zeros(0, np.float64)
        self._limit = np.uint64(2**64 - 1)

    def update(self, values: Floats, priorities: Keys) -> None:
        """Offers some values with the priorities of their rows, ``(n,)`` each."""
        taken = (priorities <= self._limit) & ~np.isnan(values)
        self._priorities = np.concatenate([self._priorities, priorities[taken]])
        self._values = np.concatenate([self._values, values[taken]])
        if len(self._values) > 2 * self._size:
            self._shrink()

    def state(self) -> dict[str, NDArray[Any]]:
        """All that was seen, as arrays."""
        return {"priorities": self._priorities, "values": self._values, "limit": np.array([self._limit])}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`."""
        self._priorities, self._values = state["priorities"], state["values"]
        self._limit = np.uint64(state["limit"][0])

    def values(self) -> Floats:
        """The sample, sorted."""
        self._shrink()
        return np.sort(self._values)

    def _shrink(self) -> None:
        if len(self._values) > self._size:
            kept = np.argpartition(self._priorities, self._size - 1)[: self._size]
            self._priorities, self._values = self._priorities[kept], self._values[kept]
            self._limit = self._priorities.max()


def row_priorities(first: int, count: int) -> Keys:
    """The sampling priorities of training rows ``first .. first + count``."""
    return hash_numbers(np.arange(first, first + count), seed=1)


@dataclass(frozen=True)
class FittedNumeric:
    """``x -> (f(x) - shift) / scale``; a missing x gives ``(fill - shift) / scale``.

    low: x is clipped from below to it (log only). grid, ranks: the distribution function (quantile only).
    """

    transform: str
    offset: float
    low: float | None
    grid: tuple[float, ...]
    ranks: tuple[float, ...]
    fill: float
    shift: float
    scale: float
    indicator: bool

    @property
    def width(self) -> int:
        """Columns that the feature takes."""
        return 2 if self.indicator else 1

    def apply(self, values: Floats) -> NDArray[np.float32]:
        """Encodes numbers, NaN where missing: ``(n,)`` to ``(n, width)``."""
        missing = np.isnan(values)
        if self.transform == "quantile":
            result = _rank(values, np.array(self.grid), np.array(self.ranks))
        else:
            result = _transformed(values, self.transform, self.offset, self.low)
        result[missing] = self.fill
        result -= self.shift
        result /= self.scale
        np.clip(result, -LARGEST, LARGEST, out=result)
        encoded = np.empty((len(values), self.width), np.float32)
        encoded[:, 0] = result
        if self.indicator:
            encoded[:, 1] = missing
        return encoded

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> FittedNumeric:
        """The inverse of :meth:`to_json`."""
        return cls(**{**raw, "grid": tuple(raw["grid"]), "ranks": tuple(raw["ranks"])})


@dataclass(frozen=True)
class Measured:
    """What a numeric fitter takes of some rows: the values where it samples them, else their moments."""

    values: Floats | None
    moments: Moments
    clipped: int
    low: float


class NumericFitter:
    """Fits one numeric feature."""

    def __init__(self, feature: Numeric) -> None:
        self._feature = feature
        self._moments = Moments()
        self._sample = RowSample() if feature.transform == "quantile" else None
        self._clipped = 0
        self._low = math.inf

    def measure(self, values: Floats) -> Measured:
        """What :meth:`add` needs of training rows, ``(n,)``, NaN where missing. Changes nothing."""
        if self._sample is not None:
            return Measured(values, Moments(), 0, math.inf)
        clipped, low = 0, math.inf
        values = values[~np.isnan(values)]
        if self._feature.transform == "log":
            inside = values[values > -self._feature.offset]
            clipped, values = len(values) - len(inside), inside
            low = float(values.min(initial=math.inf))
        moments = Moments()
        moments.update(_transformed(values, self._feature.transform, self._feature.offset, None))
        return Measured(None, moments, clipped, low)

    def add(self, measured: Measured, priorities: Keys) -> None:
        """Takes in training rows; the result depends on their order in the last digits."""
        if self._sample is not None and measured.values is not None:
            self._sample.update(measured.values, priorities)
        self._moments.merge(measured.moments)
        self._clipped += measured.clipped
        self._low = min(self._low, measured.low)

    def update(self, values: Floats, priorities: Keys) -> None:
        """Both at once."""
        self.add(self.measure(values), priorities)

    def state(self) -> dict[str, NDArray[Any]]:
        """All that was seen, as arrays."""
        facts = [self._moments.count, self._moments.mean, self._moments.squares, self._clipped, self._low]
        sample = self._sample.state() if self._sample is not None else {}
        return {"facts": np.array(facts, np.float64), **sample}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`."""
        count, mean, squares, clipped, low = state["facts"].tolist()
        self._moments = Moments(int(count), mean, squares)
        self._clipped, self._low = int(clipped), low
        if self._sample is not None:
            self._sample.restore(state)

    def finish(self) -> FittedNumeric:
        """The fitted transform.

        Raises:
            UserError: no value has a logarithm, or the values are too large to scale.
        """
        feature, moments, low = self._feature, self._moments, None
        grid: Floats = np.zeros(0)
        ranks: Floats = np.zeros(0)
        if self._sample is not None:
            sample = self._sample.values()
            grid, ranks = _distribution(sample)
            moments.update(_rank(sample, grid, ranks))
        elif feature.transform == "log" and (moments.count or self._clipped):
            if not moments.count:
                raise UserError(
                    f"column {feature.log_column!r}: no training value is above {-feature.offset:g}, so the log "
                    f"transform of feature {feature.name!r} has nothing to fit; raise its offset"
                )
            low = self._low
            moments.merge(Moments(self._clipped, math.log(low + feature.offset), 0.0))
        deviation = moments.deviation
        if not (math.isfinite(moments.mean) and math.isfinite(deviation)):
            raise UserError(
                f"column {feature.log_column!r}: its values are too large to average; "
                f"give feature {feature.name!r} transform: signed_log or quantile"
            )
        # A constant feature stays where it is.
        scale = deviation if deviation > 1e-12 * max(1.0, abs(moments.mean)) else 1.0
        shift, scale = (moments.mean, scale) if feature.standardise else (0.0, 1.0)
        return FittedNumeric(
            transform=feature.transform,
            offset=feature.offset,
            low=low,
            grid=tuple(grid.tolist()),
            ranks=tuple(ranks.tolist()),
            fill=moments.mean,
            shift=shift,
            scale=scale,
            indicator=feature.missing_indicator,
        )


def _transformed(values: Floats, transform: str, offset: float, low: float | None) -> Floats:
    if transform == "log":
        return np.log((values if low is None else np.maximum(values, low)) + offset)
    if transform == "signed_log":
        # NumPy's log is three times as fast as its log1p, which differs by less than float32 can hold.
        signed: Floats = np.copysign(np.log(np.abs(values) + 1.0), values)
        return signed
    return values.copy()


def _distribution(sample: Floats) -> tuple[Floats, Floats]:
    """Up to ``GRID_POINTS`` quantiles of a sorted sample and their mid-ranks: of tied values, the middle."""
    if not len(sample):
        return np.zeros(1), np.zeros(1)
    at = np.unique(np.round(np.linspace(0, len(sample) - 1, GRID_POINTS)).astype(np.int64))
    grid = np.unique(sample[at])
    below = np.searchsorted(sample, grid, side="left")
    through = np.searchsorted(sample, grid, side="right")
    return grid, (below + through) / (2 * len(sample))


def _rank(values: Floats, grid: Floats, ranks: Floats) -> Floats:
    result: Floats = np.interp(values, grid, ranks)
    result[values < grid[0]] = 0.0
    result[values > grid[-1]] = 1.0
    return result


def quantile_boundaries(sample: Floats, buckets: int) -> tuple[float, ...]:
    """Up to ``buckets - 1`` distinct values that cut a sorted sample into nearly equal parts."""
    if not len(sample):
        return ()
    at = np.arange(1, buckets) * len(sample) // buckets
    cuts = np.unique(sample[at])
    return tuple(cuts[cuts > sample[0]].tolist())


def bucket_numbers(feature: Bucketised, values: Floats, boundaries: tuple[float, ...]) -> Floats:
    """The bucket of each number, NaN where missing; a boundary belongs to the bucket above it. ``(n,)``."""
    missing = np.isnan(values)
    if feature.method == "log2":
        buckets = np.floor(values)
        large = values > 2
        buckets[large] = np.floor(np.square(np.log(values[large])))
    else:
        buckets = np.searchsorted(np.array(boundaries), values, side="right").astype(np.float64)
    buckets[missing] = np.nan
    return buckets
