"""``Fitter``: one streaming pass over the training rows that fits an :class:`Encoder`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn.data.counting import VocabularyBuilder
from mldcn.data.encoder import Encoder, bucket_ids, vocabulary_file
from mldcn.data.parsing import Ids, ParsedBlock, actions_of
from mldcn.data.pipeline import cores, give_memory_back, ordered_map
from mldcn.data.transforms import (
    Floats,
    Measured,
    NumericFitter,
    RowSample,
    quantile_boundaries,
    row_priorities,
)
from mldcn.data.vocabulary import HashedRows, Vocabulary
from mldcn.errors import UserError
from mldcn.files import atomic
from mldcn.schema import Bucketised, Hashing, Numeric, Schema, Sequence, TableFeature
from mldcn.schema import Vocabulary as VocabularyOptions

# What becomes of a base's transforms and boundaries.
Statistics = Literal["keep", "refresh"]


@dataclass(frozen=True)
class Store:
    """Where a fitter keeps what does not fit into memory, and how much does.

    runs: folder for counted ids. encoder: folder for the vocabularies' files, which the caller flushes to disk.
    memory: bytes that counted ids may take, and sorting them in the end.
    """

    runs: Path
    encoder: Path
    memory: int


@dataclass(frozen=True)
class MeasuredBlock:
    """What a fitter takes of a block: ``counts`` of each id by table, what it needs of each number."""

    rows: int
    counts: list[tuple[str, Ids, NDArray[np.int64]]]
    numbers: dict[str, Measured | Floats]


class Fitter:
    """Fits an :class:`Encoder` block by block.

    Args:
        schema: the log's schema.
        base: an encoder of the same features whose vocabularies grow: its ids keep their rows.
        statistics: ``keep`` the base's numeric transforms and bucket boundaries, or ``refresh`` them from the
            rows given here.
        store: where counted ids go when there are too many for memory; without it, all are held.

    Raises:
        UserError: the base was made for other features.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        base: Encoder | None = None,
        statistics: Statistics = "keep",
        store: Store | None = None,
    ) -> None:
        if base is not None:
            _check_base(schema, base.schema)
        self._schema = schema
        self._base = base
        self._keep = base if statistics == "keep" else None
        self.store = store
        self._rows = 0
        self._options = _table_options(schema)
        quantile = [f for f in schema.features if isinstance(f, Bucketised) and f.method == "quantile"]
        self._samples = {feature.name: RowSample() for feature in quantile}
        self._builders = {
            name: VocabularyBuilder()
            for name, options in self._options.items()
            if isinstance(options, VocabularyOptions) and name not in self._samples
        }
        self._numerics = {f.name: NumericFitter(f) for f in schema.features if isinstance(f, Numeric)}

    def update(self, parsed: ParsedBlock, rows: NDArray[np.int64] | None = None) -> None:
        """Takes in a block, or only some of its rows (by number)."""
        self.add(self.measure(parsed, rows))

    def measure(self, parsed: ParsedBlock, rows: NDArray[np.int64] | None = None) -> MeasuredBlock:
        """What :meth:`add` needs of a block, or of some of its rows. Changes nothing, so threads may do it."""
        counts: list[tuple[str, Ids, NDArray[np.int64]]] = []
        numbers: dict[str, Measured | Floats] = {}

        def count(table: str, ids: Ids, rows: NDArray[np.int64] | None = None) -> None:
            if table in self._builders:
                codes = (ids.codes if rows is None else ids.codes[rows]).ravel()
                # Code -1 is counted in the place before the first.
                seen = np.bincount(codes + 1, minlength=len(ids.keys) + 1)[1:]
                counts.append((table, ids, seen))

        for feature in self._schema.features:
            if isinstance(feature, Numeric | Bucketised):
                values = parsed.numbers[feature.name]
                values = values if rows is None else values[rows]
                if isinstance(feature, Numeric):
                    numbers[feature.name] = self._numerics[feature.name].measure(values)
                elif feature.name in self._samples:
                    numbers[feature.name] = values
                else:
                    count(feature.name, bucket_ids(feature, {feature.name: values}, {}))
            elif isinstance(feature, TableFeature):
                count(self._schema.table_of(feature), parsed.ids[feature.name], rows)
                if isinstance(feature, Sequence) and feature.actions is not None:
                    count(actions_of(feature), parsed.ids[actions_of(feature)], rows)
        return MeasuredBlock(parsed.rows if rows is None else len(rows), counts, numbers)

    def add(self, measured: MeasuredBlock) -> None:
        """Takes in a block; blocks come in the log's order."""
        priorities = row_priorities(self._rows, measured.rows)
        self._rows += measured.rows
        for name, numbers in measured.numbers.items():
            if isinstance(numbers, Measured):
                self._numerics[name].add(numbers, priorities)
            else:
                self._samples[name].update(numbers, priorities)
        for table, ids, counts in measured.counts:
            self._builders[table].update(ids.keys, counts, ids.texts)
        if self.store is not None:
            self._flush(self.store.memory)

    def _sampling(self) -> list[NumericFitter | RowSample]:
        return [*self._numerics.values(), *self._samples.values()]

    def _flush(self, memory: int) -> None:
        """Moves the largest vocabularies to disk until the others take less than so many bytes."""
        sizes = {name: builder.bytes for name, builder in self._builders.items()}
        if self.store is None or sum(sizes.values()) <= memory:
            return
        while sizes and sum(sizes.values()) > memory // 2:
            name = max(sizes, key=lambda name: sizes[name])
            if not sizes.pop(name):
                break
            builder = self._builders[name]
            number = list(self._builders).index(name)
            self.store.runs.mkdir(parents=True, exist_ok=True)
            builder.flush(self.store.runs / f"{number:03}-{len(builder.runs):05}.run")
        give_memory_back()

    def save_state(self, path: Path) -> list[str]:
        """Writes all that was seen: counted ids as runs, the rest into a file; gives the runs' names."""
        assert self.store is not None
        self._flush(-1)
        arrays: dict[str, NDArray[Any]] = {"rows": np.array([self._rows])}
        for number, fitter in enumerate(self._sampling()):
            arrays |= {f"{number}.{key}": array for key, array in fitter.state().items()}
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return [run.name for builder in self._builders.values() for run in builder.runs]

    def restore(self, path: Path, runs: Iterable[str]) -> None:
        """The inverse of :meth:`save_state`."""
        assert self.store is not None
        with np.load(path, allow_pickle=False) as arrays:
            self._rows = int(arrays["rows"][0])
            for number, fitter in enumerate(self._sampling()):
                own = f"{number}."
                fitter.restore({k.removeprefix(own): arrays[k] for k in arrays.files if k.startswith(own)})
        builders = list(self._builders.values())
        for run in sorted(runs):
            builders[int(run.partition("-")[0])].runs.append(self.store.runs / run)

    def finish(self) -> Encoder:
        """The encoder.

        Raises:
            UserError: there were no rows, or a transform has nothing to fit.
        """
        if not self._rows:
            raise UserError("there are no training rows to fit on")
        boundaries = {
            f.name: self._keep.boundaries[f.name]
            if self._keep is not None
            else quantile_boundaries(self._samples[f.name].values(), f.buckets)
            for f in self._schema.features
            if isinstance(f, Bucketised) and f.name in self._samples
        }
        numerics = {
            name: fitter.finish() if self._keep is None else self._keep.numerics[name]
            for name, fitter in self._numerics.items()
        }
        tables: dict[str, Vocabulary | HashedRows] = {}
        names = list(self._options)
        workers = cores() if self._spilled() == 0 else 1
        for name, table in zip(
            names,
            ordered_map(lambda i: self._table(i, names[i], boundaries), range(len(names)), workers),
            strict=True,
        ):
            tables[name] = table
        return Encoder(self._schema, tables, numerics, boundaries)

    def _spilled(self) -> int:
        return sum(len(builder.runs) for builder in self._builders.values())

    def _table(
        self, number: int, name: str, boundaries: dict[str, tuple[float, ...]]
    ) -> Vocabulary | HashedRows:
        options = self._options[name]
        old = self._base.tables[name] if self._base is not None else None
        old = old if isinstance(old, Vocabulary) else None
        if isinstance(options, Hashing):
            return HashedRows(options.rows, options.hashes)
        if name in boundaries:
            # A base's rows stay, though refreshed boundaries may be fewer.
            buckets = max(len(boundaries[name]) + 1, len(old.values) if old is not None else 0)
            texts = pa.array([str(bucket) for bucket in range(buckets)])
            return Vocabulary(texts, np.full(buckets, self._rows // buckets))
        path = None if self.store is None else self.store.encoder / vocabulary_file(number)
        memory = 1 << 40 if self.store is None else self.store.memory
        return self._builders[name].finish(options.min_count, options.max_size, old, path=path, memory=memory)

    def distinct(self, table: str) -> int | None:
        """How many ids were seen for a table; None where it has no vocabulary to fit."""
        return len(self._builders[table]) if table in self._builders else None


def _check_base(schema: Schema, base: Schema) -> None:
    """An encoder grows for the same features only; how rare or how many ids may be is free to change."""
    for feature in schema.features:
        old = next((f for f in base.features if f.name == feature.name), None)
        if old is None or _without_limits(old) != _without_limits(feature):
            what = "is not among the features" if old is None else "is another"
            raise UserError(
                f"feature {feature.name!r} {what} of the run to start from; use its schema, or train anew"
            )


def _without_limits(feature: object) -> object:
    if isinstance(feature, TableFeature) and isinstance(feature.encoding, VocabularyOptions):
        return feature.model_copy(update={"encoding": VocabularyOptions()})
    return feature


def _table_options(schema: Schema) -> dict[str, VocabularyOptions | Hashing]:
    """How each table's rows are given out; actions beside a sequence have a vocabulary of their own."""
    options: dict[str, VocabularyOptions | Hashing] = {}
    for feature in schema.features:
        if isinstance(feature, TableFeature) and feature.share is None:
            options[feature.name] = feature.encoding
        if isinstance(feature, Sequence) and feature.actions is not None:
            options[actions_of(feature)] = VocabularyOptions()
    return options
