"""Columns of a raw block as arrays: texts, numbers, lists, times. Every cell that cannot be read is named.

Numbers and their texts agree: the integer 123, the float 123.0 and the text ``123`` are one id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mldcn.data.reading import RawBlock
from mldcn.errors import UserError

Floats = NDArray[np.float64]

_PART = 1_024


@dataclass(frozen=True)
class Lists:
    """Lists of several rows laid end to end: row i holds ``flat[starts[i] : starts[i] + lengths[i]]``."""

    flat: pa.Array
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def row_of(self, index: int) -> int:
        """The row that holds element ``index`` of ``flat``."""
        return int(np.searchsorted(self.starts + self.lengths, index, side="right"))


def column(block: RawBlock, name: str) -> pa.Array:
    """A column of a block as one array, dictionaries decoded."""
    chunks = block.table.column(name)
    array = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else pa.concat_arrays(array.chunks)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def texts(block: RawBlock, name: str, array: pa.Array | None = None) -> pa.Array:
    """Any plain values as text; a whole float loses its fraction (123.0 is ``123``), NaN is missing.

    Args:
        block: the block, for its place in errors.
        name: the column.
        array: its values, where they are not the column itself (such as the elements of lists).

    Raises:
        UserError: the column holds no plain values.
    """
    array = column(block, name) if array is None else array
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array
    if pa.types.is_floating(kind):
        return _float_texts(array)
    if is_list(kind):
        raise UserError(
            f"{block.file}: column {name!r} holds lists; give the feature kind: multi or sequence"
        )
    try:
        return pc.cast(array, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(
            f"{block.file}: column {name!r} holds {kind}, which is no text; write it as text or numbers"
        ) from None


def _float_texts(array: pa.Array) -> pa.Array:
    values = array.to_numpy(zero_copy_only=False).astype(np.float64)
    missing = np.isnan(values)
    whole = (np.abs(values) < 2.0**63) & (np.trunc(values) == values)
    as_int = pa.array(np.where(whole, values, 0).astype(np.int64), mask=missing)
    if bool((whole | missing).all()):
        return pc.cast(as_int, pa.string())
    as_float = pa.array(values, mask=missing)
    return pc.if_else(pa.array(whole), pc.cast(as_int, pa.string()), pc.cast(as_float, pa.string()))


def numbers(block: RawBlock, name: str, array: pa.Array | None = None, lists: Lists | None = None) -> Floats:
    """Numbers of a column, NaN where missing.

    Args:
        block: the block, for its place in errors.
        name: the column.
        array: its values, where they are not the column itself (such as the elements of lists).
        lists: the lists that ``array`` was taken from.

    Raises:
        UserError: a cell is no finite number.
    """
    array = column(block, name) if array is None else array
    kind = array.type

    def fail(index: int, problem: str) -> UserError:
        row = index if lists is None else lists.row_of(index)
        return block.error(row, name, array[index].as_py(), problem)

    if is_text(kind):
        values = _parsed(array, fail)
    elif pa.types.is_boolean(kind):
        values = _floats(pc.cast(array, pa.int8()))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = _floats(array)
    elif pa.types.is_null(kind):
        return np.full(len(array), np.nan)
    else:
        raise UserError(
            f"{block.file}: column {name!r} holds {kind}, no numbers; give the feature another kind"
        )
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        raise fail(int(infinite[0]), "is infinite; replace it by a number or leave the cell empty")
    return values


def _floats(array: pa.Array) -> Floats:
    cast = pc.cast(array, pa.float64(), safe=False)
    return np.array(cast.to_numpy(zero_copy_only=False), dtype=np.float64)


def _parsed(array: pa.Array, fail: Callable[[int, str], UserError]) -> Floats:
    problem = "is not a number; mend the row, add the text to data.missing, or give the feature another kind"
    try:
        values = _floats(array)
    except pa.ArrowInvalid:
        array = pc.utf8_trim_whitespace(array)
        array = pc.replace_substring_regex(array, r"^\+([0-9.])", r"\1")
        bad = first_failure(array, lambda part: pc.cast(part, pa.float64()))
        if bad is not None:
            raise fail(bad, problem) from None
        values = _floats(array)
    odd = np.isnan(values)
    if array.null_count:
        odd &= pc.is_valid(array).to_numpy(zero_copy_only=False)
    if odd.any():
        raise fail(int(np.flatnonzero(odd)[0]), problem)
    return values


def first_failure(array: pa.Array, cast: Callable[[pa.Array], object]) -> int | None:
    """The first element on which ``cast`` fails; None if it fails on none.

    A cast makes an error of every element that fails, which is slow: so small parts are tried in turn.
    """
    low, high = 0, -1
    for start in range(0, len(array), _PART):
        if _fails(array.slice(start, _PART), cast):
            low, high = start, min(start + _PART, len(array))
            break
    if high < 0:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fails(array.slice(low, middle - low), cast) else (middle, high)
    return low


def _fails(array: pa.Array, cast: Callable[[pa.Array], object]) -> bool:
    try:
        cast(array)
    except pa.ArrowInvalid:
        return True
    return False


def times(block: RawBlock, name: str, array: pa.Array | None = None, lists: Lists | None = None) -> Floats:
    """Event times: numbers as they are, date-times (ISO text or typed) as seconds since 1970 UTC.

    Raises:
        UserError: a cell is neither.
    """
    array = column(block, name) if array is None else array
    kind = array.type
    if is_text(kind):
        try:
            return numbers(block, name, array, lists)
        except UserError:
            instants = _instants(array)
            if instants is None:
                bad = _first_no_time(array)
                row = bad if lists is None else lists.row_of(bad)
                raise block.error(
                    row, name, array[bad].as_py(), "is neither a number nor an ISO date-time; mend the row"
                ) from None
            array = instants
    elif pa.types.is_date(kind):
        array = pc.cast(array, pa.timestamp("us"))
    elif not pa.types.is_timestamp(kind):
        return numbers(block, name, array, lists)
    micros = pc.cast(pc.cast(array, pa.timestamp("us", array.type.tz), safe=False), pa.int64())
    seconds: Floats = _floats(micros) / 1e6
    return seconds


def _instants(array: pa.Array) -> pa.Array | None:
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return pc.cast(array, kind)
        except pa.ArrowInvalid:
            continue
    return None


def _first_no_time(array: pa.Array) -> int:
    """The first element that is unlike its predecessors: neither a number nor a date-time of their kind."""
    found = [
        first_failure(array, partial(pc.cast, target_type=kind))
        for kind in (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))
    ]
    return max(index for index in found if index is not None)


def lists(block: RawBlock, name: str, delimiter: str) -> Lists:
    """Lists of a list column, or of a text column cut at ``delimiter``; a missing cell is an empty list."""
    array = column(block, name)
    if is_text(array.type):
        array = pc.split_pattern(array, delimiter)
    elif not is_list(array.type):
        # A plain value is a list of one.
        lengths = pc.is_valid(array).to_numpy(zero_copy_only=False).astype(np.int64)
        return _laid(texts(block, name, array).drop_null(), lengths)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = array.flatten()
    return _laid(flat.dictionary_decode() if pa.types.is_dictionary(flat.type) else flat, lengths)


def _laid(flat: pa.Array, lengths: NDArray[np.int64]) -> Lists:
    return Lists(flat, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)[:-1]]), lengths)
