"""Short ways from a feature's raw values to what encoding gives: for few rows, of values of the usual types.

Encoding a column takes Arrow and NumPy some hundred calls, whatever the number of rows, and requests have few.
Numbers need none of them, and most ids were met in other requests. Whatever is unusual or wrong is left to
:class:`~mldcn.serving.encoding.Part`, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn import schema as spec
from mldcn.data.batch import MISSING, IdSlot
from mldcn.data.encoder import Encoder
from mldcn.data.transforms import LARGEST, bucket_numbers
from mldcn.serving.encoding import Part

REMEMBERED = 1 << 16  # values of a column; then it begins anew
LONGEST = 64  # characters of a text that is remembered

_NOTHING = type(None)
_IDS = {str, int, _NOTHING}  # of equal values all are of one type: 1 is no True and no 1.0
_NUMBERS = {float, int, _NOTHING}

Columns = Mapping[str, Sequence[Any]]
Ids = NDArray[np.int32]
Floats = NDArray[np.float64]
Encoded = tuple[Ids | None, NDArray[np.float32] | None, int | None]


class Unusual(Exception):
    """Values that have no short way."""


class Shortcut(Protocol):
    """One feature's."""

    part: Part

    def encode(self, values: Columns) -> Encoded:
        """The feature's ids ``(n, C)``, its numbers ``(n, D)``, and how many numbers or vectors are missing.

        Raises:
            Unusual: nothing is said of the values.
            KeyError: a column is lacking.
            UserError: a value is not what the schema says; the row's number may be wrong.
        """


def shortcut(encoder: Encoder, feature: spec.Feature, missing: Sequence[str]) -> Shortcut:
    """That of a feature; threads may share it.

    Args:
        encoder: of all features.
        feature: one of them.
        missing: texts that mean a missing value.
    """
    part = Part(encoder, {feature.name}, missing)
    match feature:
        case spec.Numeric():
            return _Number(part, feature)
        case spec.Bucketised():
            return _Bucket(part, feature)
        case spec.EmbeddingFeature():
            return _Vector(part, feature)
        case spec.MultiCategorical():
            return _Multi(part, feature)
        case spec.Sequence():
            return _History(part, feature)
    return _Single(part, feature)


class _Number:
    def __init__(self, part: Part, feature: spec.Numeric) -> None:
        self.part = part
        self._column = feature.log_column
        self._numeric = part.encoder.numerics[feature.name]

    def encode(self, values: Columns) -> Encoded:
        numbers = _numbers(_given(values[self._column]))
        return None, self._numeric.apply(numbers), int(np.isnan(numbers).sum())


class _Bucket:
    def __init__(self, part: Part, feature: spec.Bucketised) -> None:
        self.part = part
        self._feature = feature
        self._boundaries = part.encoder.boundaries.get(feature.name, feature.boundaries)
        self._memory = _Memory(lambda numbers: part.encode({feature.log_column: numbers}).ids, part.ids.size)

    def encode(self, values: Columns) -> Encoded:
        numbers = _numbers(_given(values[self._feature.log_column]))
        buckets = bucket_numbers(self._feature, numbers, self._boundaries).tolist()
        # NaN is equal to nothing.
        keys = [None if bucket != bucket else int(bucket) for bucket in buckets]
        return self._memory.recall(keys, numbers.tolist()), None, None


class _Vector:
    def __init__(self, part: Part, feature: spec.EmbeddingFeature) -> None:
        self.part = part
        self._column, self._width = feature.log_column, feature.width

    def encode(self, values: Columns) -> Encoded:
        lists = _Lists(self.part, values, self._column)
        lengths = lists.lengths
        if not ((lengths == self._width) | (lengths == 0)).all():
            raise Unusual
        flat = _numbers(lists.flat)
        if np.isnan(flat).any():
            raise Unusual
        vectors = np.zeros((len(lengths), self._width), np.float32)
        vectors[lengths > 0] = np.clip(flat, -LARGEST, LARGEST).reshape(-1, self._width)
        return None, vectors, int((~vectors.any(axis=1)).sum())


class _Single:
    def __init__(self, part: Part, feature: spec.Categorical) -> None:
        self.part = part
        self._column = feature.log_column
        self._memory = _Memory(lambda ids: part.encode({feature.log_column: ids}).ids, part.ids.size)

    def encode(self, values: Columns) -> Encoded:
        return self._memory.recall(_given(values[self._column])), None, None


class _Multi:
    def __init__(self, part: Part, feature: spec.MultiCategorical) -> None:
        self.part = part
        self._column, self._length = feature.log_column, feature.max_length
        (slot,) = part.encoder.layout.ids
        # The first place of a list of one, for each hash.
        self._memory = _Memory(
            lambda ids: part.encode({feature.log_column: _each(ids)}).ids[:, :: slot.length], slot.hashes
        )

    def encode(self, values: Columns) -> Encoded:
        lists = _Lists(self.part, values, self._column)
        return lists.laid(self._memory.recall(lists.flat), self._length, MISSING), None, None


class _History:
    """A sequence: ids, the newest first; their actions; the logarithms of their ages."""

    def __init__(self, part: Part, feature: spec.Sequence) -> None:
        self.part = part
        self._length, self._column = feature.max_length, feature.log_column
        self._times, self._actions = feature.times, feature.actions
        self._now = part.encoder.schema.time if feature.times is not None else None
        given = ((self._column, ["x"]), (self._times, [0]), (self._actions, ["x"]), (self._now, 0))
        others: dict[str, Any] = {column: value for column, value in given if column is not None}

        def look_up(column: str, slot: IdSlot) -> Callable[[list[Any]], Ids]:
            def alone(ids: list[Any]) -> Ids:
                rows = {name: [value] * len(ids) for name, value in others.items()} | {column: _each(ids)}
                return part.encode(rows).ids[:, slot.columns][:, :: slot.length]

            return alone

        first, *second = part.encoder.layout.ids
        self._ids = _Memory(look_up(self._column, first), first.hashes)
        self._action_ids = [_Memory(look_up(str(self._actions), slot), slot.hashes) for slot in second]

    def encode(self, values: Columns) -> Encoded:
        lists = _Lists(self.part, values, self._column)
        ids = [self._laid(lists, self._ids.recall(lists.flat), MISSING)]
        for memory in self._action_ids:
            ids.append(self._laid(lists, memory.recall(lists.beside(values, self._actions)), MISSING))
        ages = None
        if self._times is not None:
            times = _numbers(lists.beside(values, self._times))
            now = np.nan if self._now is None else _numbers(_given(values[self._now])).repeat(lists.lengths)
            # Unknown times, of the event or of the row, count as no time ago.
            since = np.log1p(np.maximum(np.nan_to_num(now - times), 0)).astype(np.float32)
            ages = self._laid(lists, since[:, None], 0)
        return np.hstack(ids), ages, None

    def _laid(self, lists: _Lists, rows: NDArray[Any], padding: int) -> NDArray[Any]:
        return lists.laid(rows, self._length, padding, newest_first=True)


class _Lists:
    """Lists of several rows laid end to end, missing ones empty; or texts that are cut into lists."""

    def __init__(self, part: Part, values: Columns, column: str) -> None:
        self._part = part
        given = _given(values[column]) if column in values else [None] * len(next(iter(values.values())))
        kinds = set(map(type, given)) - {_NOTHING}
        lists: list[list[Any]]
        if kinds <= {list}:
            lists = [[] if each is None else each for each in given]
        elif kinds == {str}:
            (known,) = (each for each in part.columns.inputs if each.name == column)
            lists = [
                [] if each is None or each in part.missing else each.split(known.delimiter) for each in given
            ]
        else:
            raise Unusual
        self.flat = list(chain.from_iterable(lists))
        self.lengths = np.fromiter(map(len, lists), np.int64, len(lists))

    def beside(self, values: Columns, column: str | None) -> list[Any]:
        """The elements of another column, whose lists must be as long."""
        assert column is not None
        found = _Lists(self._part, values, column)
        if not np.array_equal(found.lengths, self.lengths):
            raise Unusual
        return found.flat

    def laid(
        self, rows: NDArray[Any], length: int, padding: int, *, newest_first: bool = False
    ) -> NDArray[Any]:
        """What the elements became ``(elements, k)`` in the first places of each row, ``(n, k * length)``."""
        n, k = len(self.lengths), rows.shape[1]
        if not len(rows):
            return np.full((n, k * length), padding, rows.dtype)
        steps, ends = np.arange(length), self.lengths.cumsum()[:, None]
        there = steps < self.lengths[:, None]
        places = ends - 1 - steps if newest_first else ends - self.lengths[:, None] + steps
        found = np.where(there[..., None], rows[np.where(there, places, 0)], rows.dtype.type(padding))
        return found.transpose(0, 2, 1).reshape(n, k * length)


class _Memory:
    """What values became, by value; of the usual types only.

    Args:
        look_up: rows ``(n, k)`` of values.
        width: k.
    """

    def __init__(self, look_up: Callable[[list[Any]], Ids], width: int) -> None:
        self._look_up, self._width = look_up, width
        self._known: dict[str | int | None, tuple[int, ...]] = {}

    def recall(self, keys: list[Any], values: list[Any] | None = None) -> Ids:
        """Rows ``(n, k)``.

        Args:
            keys: that tell values apart.
            values: that stand for them; the keys themselves by default.

        Raises:
            Unusual: keys are of other types.
            UserError: a value is not what the schema says.
        """
        if not set(map(type, keys)) <= _IDS:
            raise Unusual
        known = self._known
        new = {key: place for place, key in enumerate(keys) if key not in known}
        if new:
            of = keys if values is None else values
            rows = self._look_up([of[place] for place in new.values()]).tolist()
            fresh = dict(zip(new, map(tuple, rows), strict=True))
            found = [fresh[key] if key in fresh else known[key] for key in keys]
            # A dictionary is only ever added to, since another thread may be reading it.
            kept = self._known = {} if len(known) + len(new) > REMEMBERED else known
            kept.update((key, row) for key, row in fresh.items() if len(str(key)) <= LONGEST)
        else:
            found = [known[key] for key in keys]
        return np.array(found, np.int32).reshape(len(keys), self._width)


def _given(values: Sequence[Any]) -> list[Any]:
    if isinstance(values, pa.Array):
        found: list[Any] = values.to_pylist()
        return found
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _numbers(values: list[Any]) -> Floats:
    """Finite numbers, NaN where missing."""
    if not set(map(type, values)) <= _NUMBERS:
        raise Unusual
    try:
        found = np.array(values, np.float64)
    except OverflowError:
        raise Unusual from None
    if np.isinf(found).any():
        raise Unusual
    return found


def _each(values: list[Any]) -> list[list[Any]]:
    return [[value] for value in values]
