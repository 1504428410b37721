"""From a raw block to arrays that hold no text: keys of ids, numbers, vectors, labels. Needs no fitted state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mldcn.config import suggest
from mldcn.data import cells
from mldcn.data.hashing import WORD_MASKS, Keys, Texts, WordTexts, hash_texts, hash_words
from mldcn.data.located import Located
from mldcn.data.reading import RawBlock
from mldcn.data.rejects import BadRows, Reject
from mldcn.data.transforms import LARGEST
from mldcn.errors import UserError
from mldcn.schema import (
    Bucketised,
    Categorical,
    EmbeddingFeature,
    Feature,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
)

Out = TypeVar("Out")

_LARGEST_WEIGHT = float(np.finfo(np.float32).max)
_TRUTHS: Mapping[str, float] = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}


# The last bytes of a text that may be a whole number with a fraction.
_FRACTION = np.uint64(int.from_bytes(b".0", "little"))


@dataclass(frozen=True)
class Ids:
    """Ids of one slot: each cell of ``codes`` ``(n, length)`` is a place in ``keys`` and ``texts``, ``(d,)`` each.

    Missing ids and padding have the code -1.
    """

    codes: NDArray[np.signedinteger]
    keys: Keys
    texts: Texts

    @classmethod
    def of(cls, texts: pa.Array, meant: Callable[[pa.Array], pa.Array] = lambda texts: texts) -> Ids:
        """One id a row, ``(n,)`` texts, nulls missing.

        Args:
            texts: as they were read.
            meant: the ids that they stand for; it is given each distinct text once.
        """
        coded = texts.dictionary_encode()
        codes = (pc.fill_null(coded.indices, -1) if coded.null_count else coded.indices).to_numpy()
        return cls.meaning(codes, coded.dictionary, meant)

    @classmethod
    def meaning(
        cls, codes: NDArray[np.signedinteger], texts: pa.Array, meant: Callable[[pa.Array], pa.Array]
    ) -> Ids:
        """The same of texts that are given once each, and the code of each row's."""
        distinct = meant(texts)
        if distinct is not texts:
            # Two texts may stand for one id. The last code is that of a missing one, -1.
            again = distinct.dictionary_encode()
            distinct = again.dictionary
            codes = np.append(pc.fill_null(again.indices, -1).to_numpy(), np.int32(-1))[codes]
        return cls(codes[:, None], hash_texts(distinct), distinct)


# By column; and whether no text ends like a whole number with a fraction, so that each text is an id of its own.
ShortIds = dict[str, tuple[Ids, bool]]


@dataclass(frozen=True)
class ParsedBlock:
    """What a block says, by feature; see :func:`parse`."""

    rows: int
    ids: dict[str, Ids] = field(default_factory=dict)
    numbers: dict[str, cells.Floats] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    labels: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    weight: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    position: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    request: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    user: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    time: cells.Floats = field(default_factory=lambda: np.zeros(0))


def actions_of(feature: Sequence) -> str:
    """The name of the table and slot of a sequence's actions."""
    return f"{feature.name}.actions"


def columns(schema: Schema, *, labels: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that encoding needs, and those it uses where the log has them.

    Without labels (prediction), only what the features are made of is needed.
    """
    if labels:
        return schema.columns(), ()
    needed = schema.feature_columns()
    others = (schema.weight, schema.position, schema.request, schema.user, schema.time)
    optional = [name for name in others if name is not None and name not in needed]
    return needed, tuple(dict.fromkeys(optional))


def number_columns(schema: Schema) -> set[str]:
    """The columns that numeric features are made of, and nothing else."""
    numeric = {f.log_column for f in schema.features if isinstance(f, Numeric | Bucketised)}
    uses = Counter(
        [
            *(name for f in schema.features if not isinstance(f, Numeric | Bucketised) for name in f.columns),
            *(label.log_column for label in schema.labels),
            *(schema.weight, schema.position, schema.request, schema.user, schema.time),
        ]
    )
    return {name for name in numeric if not uses[name]}


def id_columns(schema: Schema) -> set[str]:
    """The columns that single ids are made of, and labels as they stand."""
    labels = {label.log_column for label in schema.labels if label.at_least is None}
    return labels | {feature.log_column for feature in schema.features if isinstance(feature, Categorical)}


def salvage(block: RawBlock, work: Callable[[RawBlock], Out]) -> tuple[Out, RawBlock]:
    """What ``work`` makes of a block, and the block it made it of.

    Where bad rows are skipped and ``work`` finds some, it is called again without them: the block that comes back
    has only good rows, and the others among its rejects.

    Raises:
        UserError: ``work`` raised it, and bad rows are not skipped, or the problem is not one of rows.
    """
    while True:
        try:
            return work(block), block
        except BadRows as bad:
            if not block.skip:
                raise
            block = block.without(bad)


class _Found:
    """The bad rows of a block, as its columns are read one after the other."""

    def __init__(self, block: RawBlock) -> None:
        self._skip = block.skip
        self._rejects: dict[int, Reject] = {}

    def read(self, work: Callable[[], Out], otherwise: Out) -> Out:
        """What ``work`` reads of one column; if bad rows are skipped, they are noted and the next can be read."""
        try:
            return work()
        except BadRows as bad:
            if not self._skip:
                raise
            for index, reject in bad.rejects.items():
                self._rejects.setdefault(index, reject)
            return otherwise

    def check(self) -> None:
        """Raises what was noted."""
        if self._rejects:
            raise BadRows(self._rejects)


def parse(schema: Schema, block: RawBlock, *, labels: bool = True, timed: bool = False) -> ParsedBlock:
    """Reads every cell that the schema names.

    Args:
        schema: what the columns mean.
        block: raw rows.
        labels: false for rows to predict, whose labels are all NaN.
        timed: a row without a time is bad, since the split goes by time.

    Raises:
        UserError: a cell is not what the schema says; names file, row, column, value and remedy. Where bad rows
            are skipped, it knows all of them (see :func:`salvage`).
    """
    there = Counter(block.rows.column_names)
    needed, _ = columns(schema, labels=labels)
    for name in needed:
        if name not in there:
            raise UserError(f"{block.file}: has no column {name!r}{suggest(name, there)}")
        if there[name] > 1:
            raise UserError(f"{block.file}: column {name!r} is there twice; rename one of them")
    rows = len(block)

    def given(name: str | None) -> str | None:
        return name if name in there else None

    found = _Found(block)
    short = _short_ids(block)
    # Of a column with bad rows, this is taken until they are left out.
    nothing, no_times = np.zeros(rows), np.full(rows, np.nan)
    time = found.read(lambda: _times(block, given(schema.time), required=timed), no_times)
    targets = [
        found.read(partial(_label, block, label, short), no_times) for label in schema.labels if labels
    ]
    parsed = ParsedBlock(
        rows=rows,
        labels=np.stack(targets or [no_times] * len(schema.labels), axis=1).astype(np.float32),
        weight=found.read(lambda: _weight(block, given(schema.weight)), nothing).astype(np.float32),
        position=found.read(
            lambda: _position(block, given(schema.position), schema.max_position), nothing
        ).astype(np.int32),
        request=found.read(lambda: _key(block, given(schema.request)), np.zeros(rows, np.int64)),
        user=found.read(lambda: _key(block, given(schema.user)), np.zeros(rows, np.int64)),
        time=time,
    )
    for feature in schema.features:
        found.read(partial(_feature, block, feature, time, short, parsed), None)
    found.check()
    return parsed


def _feature(
    block: RawBlock, feature: Feature, time: cells.Floats, short: ShortIds, parsed: ParsedBlock
) -> None:
    match feature:
        case Numeric() | Bucketised():
            parsed.numbers[feature.name] = cells.numbers(block, feature.log_column)
        case Categorical():
            parsed.ids[feature.name] = _single(block, feature.log_column, short)
        case MultiCategorical():
            lists = cells.lists(block, feature.log_column, feature.delimiter)
            parsed.ids[feature.name] = _padded(
                block, feature.log_column, lists, feature.max_length, newest_first=False
            )
        case Sequence():
            _sequence(block, feature, time, parsed)
        case EmbeddingFeature():
            parsed.vectors[feature.name] = _vectors(block, feature)


def _times(block: RawBlock, name: str | None, *, required: bool) -> cells.Floats:
    if name is None:
        return np.full(len(block), np.nan)
    times = cells.times(block, name)
    return cells.known_times(block, name, times) if required else times


def _single(block: RawBlock, name: str, short: ShortIds) -> Ids:
    def meant(distinct: pa.Array) -> pa.Array:
        return cells.texts(block, name, distinct)

    if name in short:
        ids, plain = short[name]
        return (
            ids if plain else Ids.meaning(ids.codes[:, 0], ids.texts.take(np.arange(len(ids.texts))), meant)
        )
    array = cells.column(block, name)
    return Ids.of(array, meant) if cells.is_text(array.type) else Ids.of(meant(array))


def _short_ids(block: RawBlock) -> ShortIds:
    """The ids of all columns that are only located and hold short texts, by those texts."""
    if not isinstance(block.rows, Located):
        return {}
    words = {name: block.rows.id_words(name) for name in block.rows.wanted.ids}
    coded = {name: pa.array(of).dictionary_encode() for name, of in words.items() if of is not None}
    if not coded:
        return {}
    # All at once: a few long steps leave threads more time than many short ones.
    distinct = np.concatenate([of.dictionary.to_numpy() for of in coded.values()])
    lengths = np.searchsorted(WORD_MASKS, distinct)
    keys = hash_words(distinct, lengths)
    fraction = distinct >> (8 * (lengths - 2)).view(np.uint64) == _FRACTION
    found: ShortIds = {}
    start = 0
    for name, of in coded.items():
        part = slice(start, start + len(of.dictionary))
        codes = of.indices.to_numpy()
        for word in block.rows.wanted.missing_words:
            for place in np.flatnonzero(distinct[part] == word):
                codes = np.where(codes == place, np.int32(-1), codes)
        ids = Ids(codes[:, None], keys[part], WordTexts(distinct[part]))
        found[name] = ids, not fraction[part].any()
        start = part.stop
    return found


def _key(block: RawBlock, name: str | None) -> NDArray[np.int64]:
    if name is None:
        return np.zeros(len(block), np.int64)
    return hash_texts(cells.texts(block, name)).view(np.int64)


def _places(
    lists: cells.Lists, length: int, newest_first: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where in ``lists.flat`` each of the first ``length`` elements of a row stands, and which there are."""
    steps = np.arange(length)
    there = steps < lists.lengths[:, None]
    ends = (lists.starts + lists.lengths - 1)[:, None]
    places = ends - steps if newest_first else lists.starts[:, None] + steps
    return np.where(there, places, 0), there


def _padded(block: RawBlock, name: str, lists: cells.Lists, length: int, *, newest_first: bool) -> Ids:
    texts = cells.texts(block, name, lists.flat, lists)
    # "a||b": nothing stands between the delimiters.
    flat = Ids.of(pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts))
    places, there = _places(lists, length, newest_first)
    if not len(texts):
        return Ids(np.full(places.shape, -1, np.int32), flat.keys, flat.texts)
    return Ids(np.where(there, flat.codes[places, 0], np.int32(-1)), flat.keys, flat.texts)


def _sequence(block: RawBlock, feature: Sequence, now: cells.Floats, parsed: ParsedBlock) -> None:
    lists = cells.lists(block, feature.log_column, feature.delimiter)
    parsed.ids[feature.name] = _padded(
        block, feature.log_column, lists, feature.max_length, newest_first=True
    )
    if feature.actions is not None:
        actions = _parallel(block, feature, feature.actions, lists)
        parsed.ids[actions_of(feature)] = _padded(
            block, feature.actions, actions, feature.max_length, newest_first=True
        )
    if feature.times is not None:
        events = _parallel(block, feature, feature.times, lists)
        flat = cells.times(block, feature.times, events.flat, events)
        places, there = _places(events, feature.max_length, newest_first=True)
        # Unknown times, of the event or of the row, count as no time ago.
        ages = np.zeros(places.shape) if not len(flat) else np.nan_to_num(now[:, None] - flat[places])
        parsed.vectors[feature.name] = (np.log1p(np.maximum(ages, 0)) * there).astype(np.float32)


def _parallel(block: RawBlock, feature: Sequence, name: str, ids: cells.Lists) -> cells.Lists:
    lists = cells.lists(block, name, feature.delimiter)
    wrong = np.flatnonzero(lists.lengths != ids.lengths)
    if len(wrong):
        raise _bad_cells(
            block,
            name,
            wrong,
            lambda row: (
                f"has {lists.lengths[row]} elements, but column {feature.log_column!r} has {ids.lengths[row]}; "
                "give one for each"
            ),
        )
    return lists


def _vectors(block: RawBlock, feature: EmbeddingFeature) -> NDArray[np.float32]:
    name = feature.log_column
    lists = cells.lists(block, name, feature.delimiter)
    wrong = np.flatnonzero((lists.lengths != feature.width) & (lists.lengths != 0))
    if len(wrong):
        raise _bad_cells(
            block,
            name,
            wrong,
            lambda row: (
                f"has {lists.lengths[row]} elements, expected {feature.width}; mend the row or set the width"
            ),
        )
    flat = cells.numbers(block, name, lists.flat, lists)
    missing = np.flatnonzero(np.isnan(flat))
    if len(missing):
        problem = "stands inside a vector; fill it, or leave the whole empty"
        raise block.error(name, ((lists.row_of(index), None, problem) for index in missing.tolist()))
    vectors = np.zeros((len(block), feature.width), np.float32)
    vectors[lists.lengths > 0] = np.clip(flat, -LARGEST, LARGEST).reshape(-1, feature.width)
    return vectors


def _bad_cells(
    block: RawBlock, name: str, rows: NDArray[np.integer], problem: Callable[[int], str]
) -> BadRows:
    array = cells.column(block, name)
    return block.error(name, ((row, cells.value_at(array, row), problem(row)) for row in rows.tolist()))


def _label(block: RawBlock, label: Label, short: ShortIds) -> cells.Floats:
    name = label.log_column
    if label.at_least is not None:
        values = cells.numbers(block, name)
        return np.where(np.isnan(values), np.nan, values >= label.at_least)
    ids, _ = short.get(name, (None, True))
    if ids is None and cells.is_text((array := cells.column(block, name)).type):
        ids = Ids.of(array)
    if ids is not None:
        texts = ids.texts.take(np.arange(len(ids.texts))).to_pylist()
        truths = [_TRUTHS.get(text.strip().lower(), np.inf) for text in texts]
        # The last truth is that of a missing label, whose code is -1.
        values = np.array([*truths, np.nan])[ids.codes[:, 0]]
    else:
        values = cells.numbers(block, name)
    wrong = np.flatnonzero(~np.isnan(values) & (values != 0) & (values != 1))
    if len(wrong):
        problem = (
            "is no label; labels are 0 and 1 (or false and true), empty where unknown. Mend the row, or give "
            "the label at_least to make a task of a number"
        )
        raise _bad_cells(block, name, wrong, lambda _: problem)
    return values


def _weight(block: RawBlock, name: str | None) -> cells.Floats:
    if name is None:
        return np.ones(len(block))
    values = cells.numbers(block, name)
    wrong = np.flatnonzero(~(values >= 0) | (values > _LARGEST_WEIGHT))
    if len(wrong):
        problem = "is no weight; give a number of at least 0 (0 leaves the row out) that float32 can hold"
        raise _bad_cells(block, name, wrong, lambda _: problem)
    return values


def _position(block: RawBlock, name: str | None, largest: int) -> cells.Floats:
    if name is None:
        return np.zeros(len(block))
    values = cells.numbers(block, name)
    unknown = np.isnan(values)
    wrong = np.flatnonzero(~unknown & ((values < 1) | (values != np.floor(values))))
    if len(wrong):
        problem = "is no position; positions are whole numbers, 1 the top, empty where unknown"
        raise _bad_cells(block, name, wrong, lambda _: problem)
    return np.where(unknown, 0, np.minimum(values, largest))
