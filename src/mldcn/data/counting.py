"""Counting ids block by block, and ranking them by falling count: in memory, or with sorted runs on disk.

A run holds the ids that a builder had counted when it was flushed, sorted by key. At the end the runs are merged
by ranges of keys, and what comes out is ranked by a sample sort (sorted runs, cut at sampled splitters).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mldcn.data.batch import RESERVED_ROWS
from mldcn.data.hashing import NO_KEY, Keys, Texts, WordTexts, first_words
from mldcn.data.pipeline import give_memory_back
from mldcn.data.vocabulary import KeyIndex, Vocabulary, VocabularyWriter
from mldcn.files import atomic

# Keys that the builder does not know yet are merged once there are this many, and half as many as known ones.
_MERGE_AT = 4_096
# What an id takes beside its text: key, count, place, index, and their copies while they are merged.
_ID_BYTES = 80
_BATCH = 1 << 17
_MANY = 2**16 - 1
_SAMPLES = 64
_SCHEMA = pa.schema([("key", pa.uint64()), ("count", pa.int64()), ("value", pa.large_string())])
_ORDER = [("count", "descending"), ("value", "ascending")]


class VocabularyBuilder:
    """Counts ids. Memory grows with the number of distinct ids since the last flush, not with the log."""

    def __init__(self) -> None:
        self.runs: list[Path] = []
        self._distinct: int | None = None
        self._clear()

    def _clear(self) -> None:
        self._keys = np.zeros(0, np.uint64)
        self._counts = np.zeros(1, np.int64)
        # Where in ``_texts``, end to end, each id's text stands.
        self._at = np.zeros(0, np.int64)
        self._texts: list[Texts] = []
        self._new: list[tuple[Keys, NDArray[np.int64], Texts]] = []
        self._new_size = self._text_bytes = 0
        self._index = KeyIndex(self._keys)

    def __len__(self) -> int:
        """Distinct ids seen; after a flush it is known only when the vocabulary is finished."""
        self._merge()
        return len(self._keys) if self._distinct is None else self._distinct

    @property
    def bytes(self) -> int:
        """Memory that the counted ids take, and that merging them may take."""
        return (len(self._keys) + self._new_size) * _ID_BYTES + self._text_bytes

    def update(self, keys: Keys, counts: NDArray[np.int64], texts: Texts) -> None:
        """Counts some ids; missing ones are left out.

        Args:
            keys: distinct, ``(d,)``.
            counts: how often each was seen; those seen 0 times are left out.
            texts: the texts they stand for, ``(d,)``.
        """
        places = self._index.find(keys)
        new = np.flatnonzero(places < 0)
        # The last count is that of unknown ids.
        self._counts[places] += counts
        new = new[(counts[new] > 0) & (keys[new] != NO_KEY)]
        if not len(new):
            return
        # Short ids stay words, which take little and sort fast.
        if isinstance(texts, WordTexts):
            values: Texts = texts.some(new)
            self._text_bytes += 8 * len(new)
        else:
            array = texts.take(pa.array(new)).cast(pa.large_string())
            values = array
            self._text_bytes += array.nbytes
        self._new.append((keys[new], counts[new].astype(np.int64), values))
        self._new_size += len(new)
        if self._new_size >= max(_MERGE_AT, len(self._keys) // 2):
            self._merge()

    def flush(self, path: Path) -> None:
        """Moves what was counted to a file."""
        self._merge()
        table = self._table(np.arange(len(self._keys)))
        with atomic(path) as temporary:
            _write_run(temporary, table)
        self.runs.append(path)
        self._clear()

    def finish(
        self,
        min_count: int,
        max_size: int | None,
        base: Vocabulary | None = None,
        *,
        path: Path | None = None,
        memory: int = 1 << 40,
    ) -> Vocabulary:
        """The vocabulary: ids by falling count, then by value.

        Args:
            min_count: ids seen fewer times get no row.
            max_size: only so many ids.
            base: its ids keep their rows, however often they were seen now; new ones follow.
            path: the file to write, not yet flushed to the disk; without one, the vocabulary stays in memory, as
                all that was counted did.
            memory: bytes that this may take.
        """
        if path is None:
            held = _Held(base)
            self._write(held, min_count, max_size, base, self._in_memory(min_count if base is None else 1))
            return held.vocabulary()
        with VocabularyWriter(path, memory, base, flushed=False) as writer:
            tables = self._ranked(min_count if base is None else 1, memory, path)
            self._write(writer, min_count, max_size, base, tables)
        return Vocabulary.load(path)

    @staticmethod
    def _write(
        writer: VocabularyWriter | _Held,
        min_count: int,
        max_size: int | None,
        base: Vocabulary | None,
        tables: Iterator[pa.Table],
    ) -> None:
        """Writes ranked ids, those of the base into their old rows."""
        room = max_size
        if base is not None and max_size is not None:
            room = max(max_size - len(base.counts), 0)
        for table in tables:
            if base is not None:
                keys, counts = table["key"].to_numpy(), table["count"].to_numpy()
                rows = base.lookup(keys)
                old = np.flatnonzero(rows >= RESERVED_ROWS)
                writer.count_base(rows[old].astype(np.int64), counts[old])
                table = table.filter(pa.array((rows < RESERVED_ROWS) & (counts >= min_count)))
            table = table.slice(0, room).combine_chunks()
            room = None if room is None else room - table.num_rows
            values = pa.array([], pa.large_string()) if not table.num_rows else table["value"].chunk(0)
            writer.add(values, table["key"].to_numpy(), table["count"].to_numpy())
            if room == 0 and base is None:
                break

    def _in_memory(self, min_count: int) -> Iterator[pa.Table]:
        self._merge()
        self._distinct = len(self._keys)
        places = np.flatnonzero(self._counts[:-1] >= min_count)
        texts = self._joined()
        if not isinstance(texts, WordTexts):
            table = self._table(places)
            self._clear()
            yield from _in_order(table)
            return
        texts, keys, counts = texts.some(self._at[places]), self._keys[places], self._counts[places]
        self._clear()
        order = _falling(counts, texts.heads())
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            values = texts.take(part).cast(pa.large_string())
            yield pa.table([keys[part], counts[part], values], schema=_SCHEMA)

    def _ranked(self, min_count: int, memory: int, path: Path) -> Iterator[pa.Table]:
        """Tables of key, count and value: ids seen often enough, by falling count, then by value."""
        self._reload(memory)
        last = path.with_name(f"{path.name}.last-run")
        if not self.runs:
            yield from self._in_memory(min_count)
            return
        if len(self._keys) or self._new:
            self.flush(last)
        self._distinct = 0
        runs: list[Path] = []
        try:
            for number, table in enumerate(_grouped([_read_run(run) for run in self.runs], memory)):
                self._distinct += table.num_rows
                table = table.filter(pc.greater_equal(table["count"], min_count))
                runs.append(path.with_name(f"{path.name}.ranked-{number}"))
                _write_run(runs[-1], table.take(_ranks(table)))
            yield from _merged([_read_run(run) for run in runs], memory)
        finally:
            for run in (*runs, last):
                run.unlink(missing_ok=True)

    def _reload(self, memory: int) -> None:
        """Takes runs back into memory where they fit."""
        tables = [_read_run(run) for run in self.runs]
        needed = self.bytes + sum(table.nbytes + table.num_rows * _ID_BYTES for table in tables)
        if needed * 2 > memory:
            return
        for table in tables:
            for batch in table.to_batches(_BATCH):
                self.update(batch["key"].to_numpy(), batch["count"].to_numpy(), batch["value"])
        self.runs = []

    def _table(self, places: NDArray[np.int64]) -> pa.Table:
        values = self._joined().take(pa.array(self._at[places])).cast(pa.large_string())
        return pa.table([self._keys[places], self._counts[places], values], schema=_SCHEMA)

    def _joined(self) -> Texts:
        """All texts, end to end."""
        words = [texts.words for texts in self._texts if isinstance(texts, WordTexts)]
        if len(words) == len(self._texts):
            return WordTexts(np.concatenate([np.zeros(0, np.uint64), *words]))
        whole = (texts.take(pa.array(np.arange(len(texts)))) for texts in self._texts)
        joined: Texts = pa.concat_arrays(texts.cast(pa.large_string()) for texts in whole)
        return joined

    def _merge(self) -> None:
        if not self._new:
            return
        # Two blocks may have had the same id: the text of the first is taken.
        keys = np.concatenate([part[0] for part in self._new])
        order = np.argsort(keys)
        keys = keys[order]
        begins = _begins(keys)
        fresh = keys[begins]
        counts = np.add.reduceat(np.concatenate([part[1] for part in self._new])[order], begins)
        at = np.minimum.reduceat(order, begins) + sum(len(texts) for texts in self._texts)
        # None of them is known: each goes before the first known one that is larger.
        places = np.searchsorted(self._keys, fresh) + np.arange(len(fresh))
        known = np.ones(len(self._keys) + len(fresh), bool)
        known[places] = False
        self._keys = _interleaved(known, self._keys, places, fresh)
        self._counts = np.append(_interleaved(known, self._counts[:-1], places, counts), 0)
        self._at = _interleaved(known, self._at, places, at)
        self._texts += [part[2] for part in self._new]
        self._new, self._new_size = [], 0
        self._index = KeyIndex(self._keys)


def _interleaved(
    at: NDArray[np.bool_], some: NDArray[Any], places: NDArray[np.int64], others: NDArray[Any]
) -> NDArray[Any]:
    """Some numbers where ``at`` is true, others in their places."""
    joined = np.empty(len(at), some.dtype)
    joined[at] = some
    joined[places] = others
    return joined


class _Held:
    """Takes the ids that a :class:`VocabularyWriter` would take, and keeps them in memory."""

    def __init__(self, base: Vocabulary | None) -> None:
        self._values = [pa.array([], pa.large_string()) if base is None else base.values]
        self._counts = [np.zeros(len(self._values[0]), np.int64)]

    def add(self, values: pa.Array, keys: Keys, counts: NDArray[np.int64]) -> None:
        """Appends ids."""
        self._values.append(values)
        self._counts.append(counts)

    def count_base(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Says how often ids of the base were seen, by row number."""
        self._counts[0][rows - RESERVED_ROWS] = counts

    def vocabulary(self) -> Vocabulary:
        """The vocabulary."""
        return Vocabulary(pa.concat_arrays(self._values), np.concatenate(self._counts))


def _begins(keys: Keys) -> NDArray[np.int64]:
    """Where each distinct key begins among sorted keys."""
    return np.flatnonzero(np.append(np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]))


def _write_run(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(table.combine_chunks())


def _read_run(path: Path) -> pa.Table:
    """A run, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()


def _grouped(runs: Sequence[pa.Table], memory: int) -> Iterator[pa.Table]:
    """The runs' ids with their counts summed, a range of keys at a time: keys are uniform, so ranges are alike."""
    total = sum(run.nbytes + run.num_rows * _ID_BYTES for run in runs)
    ranges = max(1, -(-2 * total // memory))
    keys = [run["key"].chunk(0).to_numpy() if run.num_rows else np.zeros(0, np.uint64) for run in runs]
    starts = [0] * len(runs)
    for number in range(ranges):
        last = np.uint64(2**64 * (number + 1) // ranges - 1)
        stops = [int(np.searchsorted(run, last, side="right")) for run in keys]
        parts = [run.slice(a, b - a) for run, a, b in zip(runs, starts, stops, strict=True)]
        table = pa.concat_tables(parts).combine_chunks()
        starts = stops
        if not table.num_rows:
            continue
        joined = table["key"].to_numpy()
        order = np.argsort(joined, kind="stable")
        joined = joined[order]
        begins = _begins(joined)
        counts = np.add.reduceat(table["count"].to_numpy()[order], begins)
        values = table["value"].take(pa.array(order[begins]))
        yield pa.table([joined[begins], counts, values], schema=_SCHEMA)
        give_memory_back()


def _merged(runs: Sequence[pa.Table], memory: int) -> Iterator[pa.Table]:
    """Ranked runs as one ranked stream."""
    total = sum(run.nbytes + run.num_rows * _ID_BYTES for run in runs)
    pieces = max(1, -(-2 * total // memory))
    ranked = [_Ranked(run) for run in runs]
    samples = sorted(
        run[len(run) * i // _SAMPLES] for run in ranked if len(run) for i in range(min(_SAMPLES, len(run)))
    )
    splitters = [samples[len(samples) * i // pieces] for i in range(1, pieces)] if samples else []
    starts = [0] * len(runs)
    for splitter in [*splitters, None]:
        stops = [len(run) if splitter is None else bisect_left(run, splitter) for run in ranked]
        parts = [run.slice(a, b - a) for run, a, b in zip(runs, starts, stops, strict=True)]
        starts = stops
        if parts:
            yield from _in_order(pa.concat_tables(parts).combine_chunks())
            give_memory_back()


def _in_order(table: pa.Table) -> Iterator[pa.Table]:
    order = _ranks(table)
    for start in range(0, len(order), _BATCH):
        yield table.take(order[start : start + _BATCH])


def _ranks(table: pa.Table) -> NDArray[np.int64]:
    """The places of a table's ids by falling count, then by value."""
    counts, values = table["count"].to_numpy(), table["value"].combine_chunks()
    if not len(counts):
        return np.zeros(0, np.int64)
    values = values if isinstance(values, pa.Array) else pa.concat_arrays(values.chunks)
    # The first 8 bytes of most ids tell them apart, and numbers are sorted ten times as fast as texts.
    heads = first_words(values)
    order = _falling(counts, heads)
    heads, counts = heads[order], counts[order]
    if ((heads[1:] == heads[:-1]) & (counts[1:] == counts[:-1])).any():
        found: NDArray[np.int64] = pc.sort_indices(
            table.select(["count", "value"]), sort_keys=_ORDER
        ).to_numpy()
        return found
    return order


def _falling(counts: NDArray[np.int64], heads: Keys) -> NDArray[np.int64]:
    """The order by falling count, then by head."""
    order = np.argsort(heads)
    # Numbers of 16 bits are sorted by radix; few ids are seen more often than these can say.
    few = np.minimum(counts, _MANY)[order].astype(np.uint16)
    order = order[np.argsort(~few, kind="stable")]
    most = order[: np.count_nonzero(few == _MANY)]
    most[:] = most[np.argsort(-counts[most], kind="stable")]
    return order


class _Ranked(Sequence[Any]):
    """A ranked run as a sequence that rises: of the negative count and the value's bytes."""

    def __init__(self, run: pa.Table) -> None:
        self._counts, self._values = run["count"], run["value"]

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, index: Any) -> Any:
        return -self._counts[index].as_py(), self._values[index].as_py().encode()
