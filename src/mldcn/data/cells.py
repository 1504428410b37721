"""Columns of a raw block as arrays: texts, numbers, lists, times. Every cell that cannot be read is named.

Numbers and their texts agree: the integer 123, the float 123.0 and the texts ``123`` and ``123.0`` are one id.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mldcn.data.located import Located
from mldcn.data.reading import RawBlock
from mldcn.data.rejects import BadRows
from mldcn.errors import UserError

Floats = NDArray[np.float64]

_NO_NUMBER = "is not a number; mend the row, add the text to data.missing, or give the feature another kind"
_PART = 1_024
# Whole numbers up to here stand for themselves in a floating type.
_LARGEST_ID = {pa.float16(): 2.0**11, pa.float32(): 2.0**24}


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
    if isinstance(block.rows, Located):
        return block.rows.column(name)
    chunks = block.rows.column(name)
    array = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else pa.concat_arrays(array.chunks)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def value_at(array: pa.Array, index: int) -> object:
    """A cell as a Python value; the number behind a time that Python cannot hold."""
    try:
        return array[index].as_py()
    except (ValueError, OverflowError):
        return getattr(array[index], "value", None)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def texts(block: RawBlock, name: str, array: pa.Array | None = None, lists: Lists | None = None) -> pa.Array:
    """Any plain values as ids: as text, a whole number without its fraction (123.0 is ``123``), NaN missing.

    Args:
        block: the block, for its place in errors.
        name: the column.
        array: its values, where they are not the column itself (such as the elements of lists).
        lists: the lists that ``array`` was taken from.

    Raises:
        UserError: the column holds no plain values, or a float that is too large to be an id.
    """
    array = column(block, name) if array is None else array
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _whole_texts(array)
    if pa.types.is_floating(kind):
        return _float_texts(block, name, array, lists)
    if is_list(kind):
        raise UserError(
            f"{block.file}: column {name!r} holds lists; give the feature kind: multi or sequence"
        )
    try:
        found = pc.cast(array, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(
            f"{block.file}: column {name!r} holds {kind}, which is no text; write it as text or numbers"
        ) from None
    if pa.types.is_decimal(kind) and kind.scale:
        return pc.replace_substring_regex(found, r"^(-?[0-9]+)\.0+$", r"\1")
    return found


def _whole_texts(array: pa.Array) -> pa.Array:
    """``123.0`` as ``123``: so a column of whole numbers is written where some are missing.

    Few columns have such texts, so their last two bytes are looked at first.
    """
    _, ends, data = array.buffers()
    if data is None or len(data) < 2 or not len(array):
        return array
    stored = np.frombuffer(ends, np.int64 if pa.types.is_large_string(array.type) else np.int32)
    last = stored[array.offset + 1 : array.offset + len(array) + 1] - 1
    characters = np.frombuffer(data, np.uint8)
    zeros = last[characters[np.maximum(last, 1)] == ord("0")]
    if not (characters[np.maximum(zeros, 1) - 1] == ord(".")).any():
        return array
    whole = pc.replace_substring_regex(array, r"^(-?[0-9]+)\.0$", r"\1")
    negative_zero = pc.and_(pc.equal(whole, "-0"), pc.equal(array, "-0.0"))
    return pc.if_else(negative_zero, pa.scalar("0", whole.type), whole)


def _float_texts(block: RawBlock, name: str, array: pa.Array, lists: Lists | None) -> pa.Array:
    values = array.to_numpy(zero_copy_only=False).astype(np.float64)
    missing = np.isnan(values)
    largest = _LARGEST_ID.get(array.type, 2.0**53)
    wrong = np.flatnonzero(np.abs(values) > largest)
    if len(wrong):
        problem = (
            "is too large for an id in a floating column, which loses digits; write ids as integers or text"
        )
        raise _elements(block, name, array, lists, ((int(index), problem) for index in wrong))
    whole = np.trunc(values) == values
    as_int = pa.array(np.where(whole, values, 0).astype(np.int64), mask=missing)
    if bool((whole | missing).all()):
        return pc.cast(as_int, pa.string())
    as_float = pa.array(values, mask=missing)
    return pc.if_else(pa.array(whole), pc.cast(as_int, pa.string()), pc.cast(as_float, pa.string()))


def _elements(
    block: RawBlock,
    name: str,
    array: pa.Array,
    lists: Lists | None,
    found: Iterator[tuple[int, str]],
) -> BadRows:
    """An error of elements (index in ``array``, problem) of a column, or of its lists."""
    return block.error(
        name,
        (
            (index if lists is None else lists.row_of(index), value_at(array, index), problem)
            for index, problem in found
        ),
    )


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
    if array is None and isinstance(block.rows, Located):
        whole = block.rows.whole_numbers(name)
        if whole is not None:
            return whole
    array = column(block, name) if array is None else array
    kind = array.type
    if is_text(kind):
        found = _parsed(array)
        if not isinstance(found, np.ndarray):
            problem = _NO_NUMBER
            raise _elements(block, name, array, lists, ((index, problem) for index in found))
        values = found
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
        problem = "is infinite; replace it by a number or leave the cell empty"
        raise _elements(block, name, array, lists, ((int(index), problem) for index in infinite))
    return values


def _floats(array: pa.Array) -> Floats:
    cast = pc.cast(array, pa.float64(), safe=False)
    return np.array(cast.to_numpy(zero_copy_only=False), dtype=np.float64)


def _parsed(array: pa.Array) -> Floats | Iterator[int]:
    """Texts as numbers; or, where some are none, their indices."""
    try:
        values = _floats(array)
    except pa.ArrowInvalid:
        array = pc.utf8_trim_whitespace(array)
        array = pc.replace_substring_regex(array, r"^\+([0-9.])", r"\1")
        try:
            values = _floats(array)
        except pa.ArrowInvalid:
            return failures(array, lambda part: _not_nan(pc.cast(part, pa.float64())))
    odd = np.isnan(values)
    if array.null_count:
        odd &= pc.is_valid(array).to_numpy(zero_copy_only=False)
    return iter(np.flatnonzero(odd).tolist()) if odd.any() else values


def _not_nan(array: pa.Array) -> None:
    if pc.any(pc.is_nan(array)).as_py():
        raise pa.ArrowInvalid("NaN")


def failures(array: pa.Array, cast: Callable[[pa.Array], object]) -> Iterator[int]:
    """The elements on which ``cast`` fails, in their order.

    A cast makes an error of every element that fails, which is slow: so small parts are tried in turn.
    """
    for start in range(0, len(array), _PART):
        yield from _failures(array, cast, start, min(start + _PART, len(array)))


def _failures(array: pa.Array, cast: Callable[[pa.Array], object], start: int, stop: int) -> Iterator[int]:
    try:
        cast(array.slice(start, stop - start))
    except pa.ArrowInvalid:
        if stop - start == 1:
            yield start
        else:
            middle = (start + stop) // 2
            yield from _failures(array, cast, start, middle)
            yield from _failures(array, cast, middle, stop)


def times(block: RawBlock, name: str, array: pa.Array | None = None, lists: Lists | None = None) -> Floats:
    """Event times: numbers as they are, date-times (ISO text or typed) as seconds since 1970 UTC.

    A date-time of no zone is taken for UTC. The texts of a block are all numbers or all date-times: those of the
    rarer kind are bad.

    Raises:
        UserError: a cell is neither.
    """
    array = column(block, name) if array is None else array
    kind = array.type
    if is_text(kind):
        no_numbers = _parsed(array)
        if isinstance(no_numbers, np.ndarray):
            return numbers(block, name, array, lists)
        instants = _instants(array)
        if instants is None:
            no_instants = failures(array, _all_instants)
            # Of as many, the date-times are right: what is left of a damaged one may be a number.
            bad = min(list(no_instants), list(no_numbers), key=len)
            problem = "is neither a number nor an ISO date-time, as its neighbours are; mend the row"
            raise _elements(block, name, array, lists, ((index, problem) for index in bad))
        array = instants
    elif pa.types.is_date(kind):
        array = pc.cast(array, pa.timestamp("us"))
    elif not pa.types.is_timestamp(kind):
        return numbers(block, name, array, lists)
    options = pc.CastOptions(pa.timestamp("us", array.type.tz), allow_time_truncate=True)
    bad_times = failures(array, lambda part: pc.cast(part, options=options))
    try:
        micros = pc.cast(pc.cast(array, options=options), pa.int64())
    except pa.ArrowInvalid:
        problem = "is beyond the times that can be held; mend the row"
        raise _elements(block, name, array, lists, ((index, problem) for index in bad_times)) from None
    seconds: Floats = _floats(micros) / 1e6
    return seconds


def known_times(block: RawBlock, name: str, found: Floats) -> Floats:
    """Times that a split goes by, none missing.

    Raises:
        UserError: a row has no time.
    """
    missing = np.flatnonzero(np.isnan(found))
    if len(missing):
        problem = "is no time, and data.split goes by time; fill it, or use another split"
        raise block.error(name, ((row, None, problem) for row in missing.tolist()))
    return found


def _instants(array: pa.Array) -> pa.Array | None:
    """Texts as date-times; None if some are none."""
    for zone in (None, "UTC"):
        with contextlib.suppress(pa.ArrowInvalid):
            return pc.cast(array, pa.timestamp("us", zone))
    # Some have a zone and some none, or more digits than are kept.
    array = pc.replace_substring_regex(array, r"([.][0-9]{6})[0-9]+", r"\1")
    zoned = pc.match_substring_regex(array, r"[T ].*[0-9](Z|[+-][0-9]{2}(:?[0-9]{2})?)$")
    nothing = pa.scalar(None, array.type)
    try:
        with_zone = pc.cast(pc.if_else(zoned, array, nothing), pa.timestamp("us", "UTC"))
        without = pc.cast(pc.if_else(zoned, nothing, array), pa.timestamp("us"))
    except pa.ArrowInvalid:
        return None
    return pc.coalesce(pc.cast(with_zone, pa.timestamp("us")), without)


def _all_instants(array: pa.Array) -> None:
    if _instants(array) is None:
        raise pa.ArrowInvalid("no date-time")


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
