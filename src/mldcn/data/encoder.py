"""``Encoder``: from raw rows to table rows and dense columns, by what was fitted on the training rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from mldcn.config import parse as parse_model
from mldcn.data.batch import Batch, DenseSlot, EncodedLayout, IdSlot
from mldcn.data.hashing import NO_KEY, hash_texts
from mldcn.data.parsing import Ids, ParsedBlock, actions_of, columns, parse
from mldcn.data.reading import RawBlock
from mldcn.data.transforms import (
    FittedNumeric,
    Floats,
    NumericFitter,
    RowSample,
    bucket_numbers,
    quantile_boundaries,
    row_priorities,
)
from mldcn.data.vocabulary import HashedRows, Vocabulary, VocabularyBuilder
from mldcn.errors import UserError
from mldcn.run import checksum, write_text
from mldcn.schema import (
    Bucketised,
    EmbeddingFeature,
    Hashing,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
    TableFeature,
)
from mldcn.schema import Vocabulary as VocabularyOptions

FORMAT = 1
_FILE = "encoder.json"

# What becomes of a base's transforms and boundaries.
Statistics = Literal["keep", "refresh"]


@dataclass(frozen=True)
class EncodedBlock:
    """Some encoded rows.

    ids: ``(n, C)`` int32. dense: ``(n, D)`` float32. labels: ``(n, T)`` float32, NaN where unknown.
    weight: ``(n,)`` float32. position: ``(n,)`` int32, 0 where unknown. request, user: ``(n,)`` int64 keys,
    0 where unknown. time: ``(n,)`` float64, NaN where unknown.
    """

    ids: NDArray[np.int32]
    dense: NDArray[np.float32]
    labels: NDArray[np.float32]
    weight: NDArray[np.float32]
    position: NDArray[np.int32]
    request: NDArray[np.int64]
    user: NDArray[np.int64]
    time: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: NDArray[Any]) -> EncodedBlock:
        """Some of the rows, by number or mask."""
        return EncodedBlock(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def batch(self) -> Batch:
        """The rows as tensors that share their memory."""
        names = ("ids", "dense", "labels", "weight", "position")
        return Batch(*(torch.from_numpy(getattr(self, name)) for name in names))


class Encoder:
    """The fitted encoding of one schema.

    Args:
        schema: the log's schema.
        tables: the rows of each table: its vocabulary, or a number of rows shared by hash.
        numerics: the fitted transform of each numeric feature.
        boundaries: the fitted boundaries of each feature in quantile buckets.
    """

    def __init__(
        self,
        schema: Schema,
        tables: dict[str, Vocabulary | HashedRows],
        numerics: dict[str, FittedNumeric],
        boundaries: dict[str, tuple[float, ...]],
    ) -> None:
        self.schema = schema
        self.tables = tables
        self.numerics = numerics
        self.boundaries = boundaries
        self.layout = _layout(schema, tables)

    @classmethod
    def fit(cls, schema: Schema, blocks: Iterable[RawBlock]) -> Encoder:
        """Fits vocabularies and transforms in one pass over training rows.

        Raises:
            UserError: a cell is not what the schema says, or there are no rows.
        """
        fitter = Fitter(schema)
        for block in blocks:
            fitter.update(parse(schema, block))
        return fitter.finish()

    def columns(self, *, labels: bool = True) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The log's columns that encoding needs, and those it uses where they are there."""
        return columns(self.schema, labels=labels)

    def encode(self, block: RawBlock, *, labels: bool = True) -> EncodedBlock:
        """Encodes rows.

        Args:
            block: raw rows.
            labels: false for rows to predict: labels are all NaN; weight, position, request, user and time are
                used where the log has them.

        Raises:
            UserError: a cell is not what the schema says; names file, row, column, value and remedy.
        """
        return self.assemble(parse(self.schema, block, labels=labels))

    def assemble(self, parsed: ParsedBlock) -> EncodedBlock:
        """Encodes rows that were parsed already."""
        ids = np.empty((parsed.rows, self.layout.num_id_columns), np.int32)
        features = {feature.name: feature for feature in self.schema.features}
        for slot in self.layout.ids:
            feature = features[slot.feature]
            if isinstance(feature, Bucketised):
                keys = _bucket_ids(feature, parsed.numbers, self.boundaries).keys
            else:
                keys = parsed.ids[
                    slot.feature if slot.role == "values" else actions_of(_sequence(feature))
                ].keys
            table = self.tables[slot.table]
            for which in range(slot.hashes):
                rows = (
                    table.lookup(keys.ravel(), which)
                    if isinstance(table, HashedRows)
                    else table.lookup(keys.ravel())
                )
                start = slot.start + which * slot.length
                ids[:, start : start + slot.length] = rows.reshape(keys.shape)
        dense = np.empty((parsed.rows, self.layout.num_dense_columns), np.float32)
        for place in self.layout.dense:
            if place.kind == "numeric":
                dense[:, place.columns] = self.numerics[place.feature].apply(parsed.numbers[place.feature])
            else:
                dense[:, place.columns] = parsed.vectors[place.feature]
        return EncodedBlock(
            ids=ids,
            dense=dense,
            labels=parsed.labels,
            weight=parsed.weight,
            position=parsed.position,
            request=parsed.request,
            user=parsed.user,
            time=parsed.time,
        )

    def checksum(self) -> str:
        """Tells two encoders apart: a digest of the schema, the ids in their order and what was fitted."""
        digest = hashlib.blake2b(digest_size=16)
        facts = {
            "schema": self.schema.model_dump(mode="json"),
            "numerics": {name: numeric.to_json() for name, numeric in self.numerics.items()},
            "boundaries": self.boundaries,
            "tables": {name: table.rows for name, table in self.tables.items()},
        }
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for table in self.tables.values():
            if isinstance(table, Vocabulary):
                digest.update(table.checksum().encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the encoder into a folder: ``encoder.json``, and a file a vocabulary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables: list[dict[str, Any]] = []
        for number, (name, table) in enumerate(self.tables.items()):
            if isinstance(table, HashedRows):
                tables.append({"name": name, "rows": table.modulus, "hashes": table.hashes})
                continue
            file = folder / f"vocabulary-{number:03}.arrow"
            table.save(file)
            tables.append({"name": name, "file": file.name, "crc32": checksum(file)})
        raw = {
            "format": FORMAT,
            "schema": self.schema.model_dump(mode="json"),
            "tables": tables,
            "numerics": {name: numeric.to_json() for name, numeric in self.numerics.items()},
            "boundaries": self.boundaries,
        }
        write_text(folder / _FILE, json.dumps(raw, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Encoder:
        """The inverse of :meth:`save`.

        Raises:
            UserError: a file is missing, damaged, or of another version.
        """
        path = Path(folder) / _FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version = raw["format"]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged, no encoder's file; prepare the data again") from None
        if version != FORMAT:
            raise UserError(
                f"{path}: an encoder of format {version}; this version of mldcn reads format {FORMAT}. "
                "Prepare the data again"
            )
        try:
            schema = parse_model(Schema, raw["schema"], str(path))
            tables = {table["name"]: _load_table(path.parent, table) for table in raw["tables"]}
            numerics = {name: FittedNumeric.from_json(numeric) for name, numeric in raw["numerics"].items()}
            boundaries = {name: tuple(values) for name, values in raw["boundaries"].items()}
            return cls(schema, tables, numerics, boundaries)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); prepare the data again") from None


class Fitter:
    """Fits an :class:`Encoder` block by block.

    Args:
        schema: the log's schema.
        base: an encoder of the same features whose vocabularies grow: its ids keep their rows.
        statistics: ``keep`` the base's numeric transforms and bucket boundaries, or ``refresh`` them from the
            rows given here.

    Raises:
        UserError: the base was made for other features.
    """

    def __init__(
        self, schema: Schema, *, base: Encoder | None = None, statistics: Statistics = "keep"
    ) -> None:
        if base is not None:
            _check_base(schema, base.schema)
        self._schema = schema
        self._base = base
        self._keep = base if statistics == "keep" else None
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
        """Takes in a block, or only some of its rows (by number, rising)."""
        count = parsed.rows if rows is None else len(rows)
        if not count:
            return
        priorities = row_priorities(self._rows, count)
        self._rows += count
        for feature in self._schema.features:
            if isinstance(feature, Numeric | Bucketised):
                values = parsed.numbers[feature.name]
                values = values if rows is None else values[rows]
                if isinstance(feature, Numeric):
                    self._numerics[feature.name].update(values, priorities)
                elif feature.name in self._samples:
                    self._samples[feature.name].update(values, priorities)
                else:
                    self._count(feature.name, _bucket_ids(feature, {feature.name: values}, {}))
            elif isinstance(feature, TableFeature):
                self._count(self._schema.table_of(feature), parsed.ids[feature.name], rows)
                if isinstance(feature, Sequence) and feature.actions is not None:
                    self._count(actions_of(feature), parsed.ids[actions_of(feature)], rows)

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
        tables: dict[str, Vocabulary | HashedRows] = {}
        for name, options in self._options.items():
            old = self._base.tables[name] if self._base is not None else None
            old = old if isinstance(old, Vocabulary) else None
            if isinstance(options, Hashing):
                tables[name] = HashedRows(options.rows, options.hashes)
            elif name in boundaries:
                # A base's rows stay, though refreshed boundaries may be fewer.
                buckets = max(len(boundaries[name]) + 1, len(old.values) if old is not None else 0)
                texts = pa.array([str(number) for number in range(buckets)])
                tables[name] = Vocabulary(texts, np.full(buckets, self._rows // buckets))
            else:
                tables[name] = self._builders[name].finish(options.min_count, options.max_size, old)
        numerics = {
            name: fitter.finish() if self._keep is None else self._keep.numerics[name]
            for name, fitter in self._numerics.items()
        }
        return Encoder(self._schema, tables, numerics, boundaries)

    def distinct(self, table: str) -> int | None:
        """How many ids were seen for a table; None where it has no vocabulary to fit."""
        return len(self._builders[table]) if table in self._builders else None

    def _count(self, table: str, ids: Ids, rows: NDArray[np.int64] | None = None) -> None:
        if table not in self._builders:
            return
        length = ids.keys.shape[1]
        at = ids.at
        if rows is None:
            self._builders[table].update(ids.keys.ravel(), ids.texts, at)
        else:
            at = rows if at is None else at.reshape(-1, length)[rows].ravel()
            self._builders[table].update(ids.keys[rows].ravel(), ids.texts, at)


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


def _sequence(feature: object) -> Sequence:
    assert isinstance(feature, Sequence)
    return feature


def _bucket_ids(feature: Bucketised, numbers: dict[str, Floats], fitted: dict[str, tuple[float, ...]]) -> Ids:
    """The keys of a number's bucket: those of its decimal text."""
    boundaries = fitted.get(feature.name, feature.boundaries)
    buckets = bucket_numbers(feature, numbers[feature.name], boundaries)
    missing = np.isnan(buckets)
    distinct, at = np.unique(np.where(missing, 0, buckets), return_inverse=True)
    texts = pc.cast(pa.array(distinct.astype(np.int64)), pa.string())
    keys = hash_texts(texts)[at]
    keys[missing] = NO_KEY
    return Ids(keys[:, None], texts, at)


def _table_options(schema: Schema) -> dict[str, VocabularyOptions | Hashing]:
    """How each table's rows are given out; actions beside a sequence have a vocabulary of their own."""
    options: dict[str, VocabularyOptions | Hashing] = {}
    for feature in schema.features:
        if isinstance(feature, TableFeature) and feature.share is None:
            options[feature.name] = feature.encoding
        if isinstance(feature, Sequence) and feature.actions is not None:
            options[actions_of(feature)] = VocabularyOptions()
    return options


def _layout(schema: Schema, tables: dict[str, Vocabulary | HashedRows]) -> EncodedLayout:
    ids: list[IdSlot] = []
    dense: list[DenseSlot] = []
    column = place = 0
    for feature in schema.features:
        if isinstance(feature, Numeric | EmbeddingFeature):
            numeric = isinstance(feature, Numeric)
            width = (2 if feature.missing_indicator else 1) if isinstance(feature, Numeric) else feature.width
            dense.append(
                DenseSlot(feature.name, feature.source, place, width, "numeric" if numeric else "embedding")
            )
            place += width
            continue
        table = schema.table_of(feature)
        options = tables[table]
        hashes = options.hashes if isinstance(options, HashedRows) else 1
        if isinstance(feature, Sequence):
            ids.append(
                IdSlot(feature.name, table, feature.source, column, feature.max_length, hashes, "sequence")
            )
            column += feature.max_length * hashes
            if feature.actions is not None:
                own, length = actions_of(feature), feature.max_length
                ids.append(
                    IdSlot(feature.name, own, feature.source, column, length, 1, "sequence", "actions")
                )
                column += length
            if feature.times is not None:
                dense.append(DenseSlot(feature.name, feature.source, place, feature.max_length, "sequence"))
                place += feature.max_length
        elif isinstance(feature, MultiCategorical):
            ids.append(
                IdSlot(feature.name, table, feature.source, column, feature.max_length, hashes, "multi")
            )
            column += feature.max_length * hashes
        else:
            ids.append(IdSlot(feature.name, table, feature.source, column, 1, hashes))
            column += hashes
    return EncodedLayout(
        ids=tuple(ids),
        dense=tuple(dense),
        tables={name: table.rows for name, table in tables.items()},
        tasks=schema.tasks,
        num_positions=schema.max_position if schema.position is not None else 0,
    )


def _load_table(folder: Path, raw: dict[str, Any]) -> Vocabulary | HashedRows:
    if "file" not in raw:
        return HashedRows(raw["rows"], raw["hashes"])
    path = folder / raw["file"]
    if not path.is_file():
        raise UserError(f"{path}: missing from the encoder; prepare the data again")
    if checksum(path) != raw["crc32"]:
        raise UserError(f"{path}: damaged (its checksum is another); prepare the data again")
    return Vocabulary.load(path)
