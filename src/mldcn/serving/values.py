"""Raw values, as JSON or Arrow give them, become the Arrow columns that training read from its log.

What a row's values mean must not depend on the other rows that it is scored with: where a column's values are of
several types, each is written as the text that stands for it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mldcn import schema as spec
from mldcn.config import suggest
from mldcn.data.rejects import shown
from mldcn.errors import UserError
from mldcn.layout import Source

_PLAIN = "a text, a number, true, false or null"


@dataclass(frozen=True)
class Input:
    """One column of raw values.

    Attributes:
        name: the column.
        kind: that of the feature that reads it (the first, where several do); ``times``, ``actions`` and
            ``time`` for the columns beside a sequence.
        source: whom it tells of. A column that several features read tells of the least constant of them.
        optional: whether it may be left out. A list may, which is an empty one; of a single value that is not
            known null must be said.
        delimiter: where a list's text is cut; empty for single values.
    """

    name: str
    kind: str
    source: Source
    optional: bool
    delimiter: str = ""


def inputs_of(schema: spec.Schema) -> tuple[Input, ...]:
    """The columns that the features of a schema read."""
    found: dict[str, Input] = {}

    def add(name: str | None, kind: str, source: Source, delimiter: str = "") -> None:
        if name is None:
            return
        known = found.get(name)
        if known is None:
            found[name] = Input(name, kind, source, bool(delimiter), delimiter)
        elif source not in _CONSTANT and known.source in _CONSTANT:
            found[name] = Input(name, known.kind, source, known.optional, known.delimiter)

    for feature in schema.features:
        add(feature.log_column, feature.kind, feature.source, getattr(feature, "delimiter", ""))
        if isinstance(feature, spec.Sequence):
            add(feature.times, "times", feature.source, feature.delimiter)
            add(feature.actions, "actions", feature.source, feature.delimiter)
            add(schema.time if feature.times else None, "time", "context")
    return tuple(found.values())


_CONSTANT = ("user", "context")


def constant_names(inputs: Sequence[Input]) -> frozenset[str]:
    """The columns that are the same for all candidates of a request: those of user and context."""
    return frozenset(each.name for each in inputs if each.source in _CONSTANT)


class Columns:
    """Makes tables of raw values.

    Args:
        schema: what the columns mean.
        missing: texts that mean a missing value.
    """

    def __init__(self, schema: spec.Schema, missing: Sequence[str]) -> None:
        self.inputs = inputs_of(schema)
        self.constant = constant_names(self.inputs)
        self._missing = pa.array(list(missing), pa.string())
        self._known = {each.name: each for each in self.inputs}
        self._ignored = set(schema.columns()) - set(self._known)

    def table(self, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
        """The rows of raw values by column.

        Raises:
            UserError: a column is unknown, lacking or of another length, or holds what is no value.
        """
        self.check_names(columns)
        lengths = {name: len(values) for name, values in columns.items()}
        rows = next(iter(lengths.values()), 0)
        for name, length in lengths.items():
            if length != rows:
                first = next(iter(lengths))
                raise UserError(
                    f"request: {name!r} has {length} values, but {first!r} has {rows}; give one a row to each"
                )
        made: dict[str, pa.Array] = {}
        for each in self.inputs:
            if each.name in columns:
                made[each.name] = self._column(each, columns[each.name])
            elif each.optional:
                made[each.name] = pa.nulls(rows, pa.string())
            else:
                raise UserError(
                    f"request: {each.name!r} is lacking; give its value in each row, null where it is not known"
                )
        return pa.table(made)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses a column that nothing reads.

        Raises:
            UserError: names it, and the nearest that is known.
        """
        for name in names:
            if name not in self._known and name not in self._ignored:
                raise UserError(f"request: no feature reads {name!r}{suggest(name, self._known)}")

    def check_sides(self, constant: Mapping[str, Any], candidates: Mapping[str, Sequence[Any]]) -> None:
        """Refuses a request whose two sides do not fit.

        Raises:
            UserError: a column is in both, or there are no candidates' columns to count.
        """
        twice = sorted(constant.keys() & candidates.keys())
        if twice:
            raise UserError(
                f"request: {twice[0]!r} is given once for the request and again for its candidates; leave one out"
            )
        if not candidates:
            raise UserError("request: there are no candidates; give at least one column of theirs, if empty")

    def joined(
        self, constant: Mapping[str, Any], candidates: Mapping[str, Sequence[Any]]
    ) -> dict[str, Sequence[Any]]:
        """The columns of one request's candidates, the constant values repeated.

        Raises:
            UserError: as :meth:`check_sides`.
        """
        self.check_sides(constant, candidates)
        first = np.zeros(len(next(iter(candidates.values()))), np.int64)
        repeated: dict[str, Sequence[Any]] = {}
        for name, value in constant.items():
            each = self._known.get(name)
            repeated[name] = self._column(each, [value]).take(first) if each else [value] * len(first)
        return {**repeated, **candidates}

    def _column(self, each: Input, values: Sequence[Any]) -> pa.Array:
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        if isinstance(values, pa.Array):
            array = values
        else:
            found = list(values) if not isinstance(values, np.ndarray) else values.tolist()
            array = _lists(each, found) if each.delimiter else _plain(each, found)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            empty = pc.is_in(array, value_set=self._missing.cast(array.type))
            if pc.any(empty).as_py():
                array = pc.if_else(empty, pa.scalar(None, array.type), array)
        return array


def _plain(each: Input, values: list[Any]) -> pa.Array:
    """Single values."""
    array = _inferred(values)
    if array is not None and not pa.types.is_nested(array.type):
        return array
    return pa.array([text_of(each, row, value) for row, value in enumerate(values, 1)], pa.string())


def _lists(each: Input, values: list[Any]) -> pa.Array:
    """Lists: each a list, or a text to be cut, or one element."""
    array = _inferred(values)
    if array is not None and (
        not pa.types.is_list(array.type) or not pa.types.is_nested(array.type.value_type)
    ):
        return array
    made: list[list[str | None] | None] = []
    for row, value in enumerate(values, 1):
        if isinstance(value, str):
            value = value.split(each.delimiter) if value else None
        elif value is not None and not isinstance(value, list | tuple):
            value = [value]
        made.append(None if value is None else [text_of(each, row, element) for element in value])
    return pa.array(made, pa.list_(pa.string()))


def _inferred(values: list[Any]) -> pa.Array | None:
    """The values as an array of one type that JSON knows; None where there is none."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None
    kind = array.type.value_type if pa.types.is_list(array.type) else array.type
    return array if is_plain(kind) or pa.types.is_list(kind) else None


def is_plain(kind: pa.DataType) -> bool:
    """Whether single values of an Arrow type are such as a feature reads."""
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )


def text_of(each: Input, row: int, value: Any) -> str | None:
    """The text that stands for a value alone; a log's text column would hold it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _wrong(each, row, value, "is no Unicode text; send UTF-8") from None
        return value
    if isinstance(value, bool):
        numeric = each.kind in ("numeric", "bucketised")
        return str(int(value)) if numeric else str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isinf(value) or (abs(value) > 2.0**53 and each.kind not in _NUMBERS):
            raise _wrong(each, row, value, "is no id: a float holds too few digits; send it as a text")
        if each.kind in _NUMBERS:
            return repr(value)
        return str(int(value)) if value.is_integer() else str(pc.cast(pa.scalar(value), pa.string()).as_py())
    raise _wrong(each, row, value, f"is no value; send {_PLAIN}")


_NUMBERS = ("numeric", "bucketised", "embedding", "times", "time")


def _wrong(each: Input, row: int, value: object, problem: str) -> UserError:
    return UserError(f"request: row {row}, column {each.name!r}: {shown(value)} {problem}")
