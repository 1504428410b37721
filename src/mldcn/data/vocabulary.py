"""Vocabularies: which ids have a row of their own, built in one streaming pass and looked up by 64-bit keys.

Two ids whose keys agree would share a row: among 50 million ids, that happens at all with probability 7e-5.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mldcn.data.batch import MISSING, OUT_OF_VOCABULARY, RESERVED_ROWS
from mldcn.data.hashing import NO_KEY, Keys, hash_texts, splitmix64
from mldcn.errors import UserError
from mldcn.run import atomic

FORMAT = 1
Rows = NDArray[np.int32]

# Keys that the builder does not know yet are merged once there are this many, or a quarter of the known ones.
_MERGE_AT = 65_536


class KeyIndex:
    """Finds keys among ``n`` known ones with a few memory reads each.

    Keys are uniform 64-bit hashes, so their first bits say nearly where each lies among the sorted ones; a
    search walks on from there, all queries at once.

    Args:
        keys: distinct keys, sorted, ``(n,)``.
    """

    def __init__(self, keys: Keys) -> None:
        bits = max(1, (2 * len(keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        counts = np.bincount((keys >> self._shift).astype(np.int64), minlength=1 << bits)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)[:-1]]).astype(np.int32)
        # A last key that ends every walk.
        self._keys = np.append(keys, np.uint64(2**64 - 1))

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The places of the given keys, -1 where unknown; ``(m,)``."""
        places = self._starts[(keys >> self._shift).astype(np.int64)].astype(np.int64)
        here = self._keys[places]
        behind = np.flatnonzero(here < keys)
        while len(behind):
            places[behind] += 1
            behind = behind[self._keys[places[behind]] < keys[behind]]
        places[(self._keys[places] != keys) | (places == len(self._keys) - 1)] = -1
        return places


class Vocabulary:
    """Rows of a table: 0 missing, 1 out of vocabulary, then one row an id, the most frequent first.

    Args:
        values: the ids, ``(n,)`` strings.
        counts: how often each was seen in the training rows.
    """

    def __init__(self, values: pa.Array, counts: NDArray[np.int64]) -> None:
        self.values = values
        self.counts = counts
        keys = hash_texts(values)
        order = np.argsort(keys, kind="stable")
        self._index = KeyIndex(keys[order])
        # One more row at the end: place -1, an unknown key, reads it.
        self._rows = np.append(order + RESERVED_ROWS, OUT_OF_VOCABULARY).astype(np.int32)

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return RESERVED_ROWS + len(self.values)

    def lookup(self, keys: Keys) -> Rows:
        """The rows of keys, ``(m,)`` int32."""
        rows: Rows = self._rows[self._index.find(keys)]
        rows[keys == NO_KEY] = MISSING
        return rows

    def checksum(self) -> str:
        """A digest of the ids in their order."""
        keys = hash_texts(self.values)
        return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()

    def save(self, path: Path) -> None:
        """Writes an Arrow file with the columns ``value`` and ``count``."""
        table = pa.table({"value": self.values, "count": self.counts})
        table = table.replace_schema_metadata({"mldcn_vocabulary": str(FORMAT)})
        with atomic(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """The inverse of :meth:`save`.

        Raises:
            UserError: the file is missing, damaged, or of another version.
        """
        try:
            with pa.OSFile(str(path), "rb") as source:
                table = pa.ipc.open_file(source).read_all()
            found = (table.schema.metadata or {}).get(b"mldcn_vocabulary", b"none").decode()
            if found == str(FORMAT):
                return cls(_joined(table.column("value")), table.column("count").to_numpy())
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path}: no readable vocabulary ({error}); prepare the data again") from None
        raise UserError(
            f"{path}: a vocabulary of format {found}; this version of mldcn reads format {FORMAT}. "
            "Prepare the data again"
        )


class HashedRows:
    """A fixed number of rows shared by hash: 0 missing, 1 unused, then ``rows`` rows."""

    def __init__(self, rows: int, hashes: int) -> None:
        self.hashes = hashes
        self.modulus = rows
        self.rows = RESERVED_ROWS + rows

    def lookup(self, keys: Keys, which: int = 0) -> Rows:
        """The rows of keys by the first or the second hash, ``(m,)`` int32."""
        mixed = splitmix64(keys ^ np.uint64(which + 1))
        rows = (mixed % np.uint64(self.modulus)).astype(np.int32) + np.int32(RESERVED_ROWS)
        rows[keys == NO_KEY] = MISSING
        return rows


class VocabularyBuilder:
    """Counts ids block by block. Memory grows with the number of distinct ids, not with the log."""

    def __init__(self) -> None:
        self._values: list[pa.Array] = []
        self._keys = np.zeros(0, np.uint64)
        self._counts = np.zeros(0, np.int64)
        self._new: list[tuple[Keys, NDArray[np.int64], pa.Array]] = []
        self._new_size = 0
        self._reindex()

    def __len__(self) -> int:
        self._merge()
        return len(self._keys)

    def update(self, keys: Keys, texts: pa.Array, at: NDArray[np.int64] | None = None) -> None:
        """Counts some ids; missing ones are left out.

        Args:
            keys: ``(n,)``.
            texts: the texts they stand for.
            at: ``(n,)``, where in ``texts`` each stands; the same place by default.
        """
        distinct, counts = np.unique_counts(keys)
        if len(distinct) and distinct[0] == NO_KEY:
            distinct, counts = distinct[1:], counts[1:]
        places = self._index.find(distinct)
        known = places >= 0
        self._counts[self._order[places[known]]] += counts[known]
        if known.all():
            return
        new, counts = distinct[~known], counts[~known]
        number = KeyIndex(new).find(keys)
        rows = np.flatnonzero(number >= 0)
        first = np.empty(len(new), np.int64)
        # Of several rows with one key the last assignment stays: the first row's, in this order.
        first[number[rows][::-1]] = rows[::-1]
        first = first if at is None else at[first]
        self._new.append((new, counts.astype(np.int64), texts.take(pa.array(first))))
        self._new_size += len(new)
        if self._new_size >= max(_MERGE_AT, len(self._keys) // 4):
            self._merge()

    def finish(self, min_count: int, max_size: int | None, base: Vocabulary | None = None) -> Vocabulary:
        """The vocabulary: ids by falling count, then by value.

        Args:
            min_count: ids seen fewer times get no row.
            max_size: only so many ids.
            base: its ids keep their rows, however often they were seen now; new ones follow.
        """
        self._merge()
        if base is None:
            return self._ranked(min_count, max_size, np.ones(len(self._keys), bool))
        rows = base.lookup(self._keys)
        old = rows >= RESERVED_ROWS
        counts = np.zeros(len(base.values), np.int64)
        counts[rows[old] - RESERVED_ROWS] = self._counts[old]
        room = None if max_size is None else max(max_size - len(base.values), 0)
        new = self._ranked(min_count, room, ~old)
        values = pa.chunked_array([base.values, new.values], pa.string())
        return Vocabulary(_joined(values), np.concatenate([counts, new.counts]))

    def _ranked(self, min_count: int, max_size: int | None, among: NDArray[np.bool_]) -> Vocabulary:
        """Those of some ids that are frequent enough, by falling count, then by value."""
        kept = np.flatnonzero(among & (self._counts >= min_count))
        if max_size is not None and 0 < max_size < len(kept):
            least = -np.partition(-self._counts[kept], max_size - 1)[max_size - 1]
            kept = kept[self._counts[kept] >= least]
        values = pa.chunked_array(self._values, pa.string()).take(pa.array(kept))
        counts = self._counts[kept]
        order = pc.sort_indices(
            pa.table({"count": counts, "value": values}),
            sort_keys=[("count", "descending"), ("value", "ascending")],
        )[:max_size]
        return Vocabulary(_joined(values.take(order)), counts[order.to_numpy()])

    def _merge(self) -> None:
        if not self._new:
            return
        keys = np.concatenate([part[0] for part in self._new])
        distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        counts = np.zeros(len(distinct), np.int64)
        np.add.at(counts, inverse, np.concatenate([part[1] for part in self._new]))
        values = pa.chunked_array([pc.cast(part[2], pa.string()) for part in self._new])
        self._values += values.take(pa.array(first)).chunks
        self._keys = np.concatenate([self._keys, distinct])
        self._counts = np.concatenate([self._counts, counts])
        self._new, self._new_size = [], 0
        self._reindex()

    def _reindex(self) -> None:
        self._order = np.argsort(self._keys)
        self._index = KeyIndex(self._keys[self._order])


def _joined(values: pa.ChunkedArray) -> pa.Array:
    if values.num_chunks == 1:
        return values.chunk(0)
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
