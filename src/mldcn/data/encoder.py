"""``Encoder``: from raw rows to table rows and dense columns, by what was fitted on the training rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from mldcn.config import parse as parse_model
from mldcn.data.batch import MISSING, Batch, DenseSlot, EncodedLayout, IdSlot
from mldcn.data.hashing import hash_texts
from mldcn.data.parsing import Ids, ParsedBlock, actions_of, columns, parse
from mldcn.data.reading import RawBlock
from mldcn.data.transforms import (
    FittedNumeric,
    Floats,
    bucket_numbers,
)
from mldcn.data.vocabulary import HashedRows, Vocabulary
from mldcn.errors import UserError
from mldcn.files import checksum, write_text
from mldcn.schema import (
    Bucketised,
    EmbeddingFeature,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
)

FORMAT = 2
_FILE = "encoder.json"


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
        from mldcn.data.fitting import Fitter

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
        # By column, which is faster to fill.
        ids = np.empty((self.layout.num_id_columns, parsed.rows), np.int32)
        features = {feature.name: feature for feature in self.schema.features}
        for slot in self.layout.ids:
            feature = features[slot.feature]
            if isinstance(feature, Bucketised):
                cells = bucket_ids(feature, parsed.numbers, self.boundaries)
            else:
                cells = parsed.ids[slot.feature if slot.role == "values" else actions_of(_sequence(feature))]
            table = self.tables[slot.table]
            for which in range(slot.hashes):
                # Each distinct id is looked up once; the last row is that of code -1.
                rows = np.full(len(cells.keys) + 1, MISSING, np.int32)
                if isinstance(table, HashedRows):
                    rows[:-1] = table.lookup(cells.keys, which)
                else:
                    rows[:-1] = table.lookup(cells.keys)
                start = slot.start + which * slot.length
                rows.take(cells.codes.T, out=ids[start : start + slot.length], mode="wrap")
        dense = np.empty((parsed.rows, self.layout.num_dense_columns), np.float32)
        for place in self.layout.dense:
            if place.kind == "numeric":
                dense[:, place.columns] = self.numerics[place.feature].apply(parsed.numbers[place.feature])
            else:
                dense[:, place.columns] = parsed.vectors[place.feature]
        return EncodedBlock(
            ids=np.ascontiguousarray(ids.T),
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
            file = folder / vocabulary_file(number)
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
    def load(cls, folder: str | Path, *, check: bool = True) -> Encoder:
        """The inverse of :meth:`save`.

        Args:
            folder: the folder.
            check: compare the vocabularies' checksums, which reads them whole.

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
            tables = {table["name"]: _load_table(path.parent, table, check) for table in raw["tables"]}
            numerics = {name: FittedNumeric.from_json(numeric) for name, numeric in raw["numerics"].items()}
            boundaries = {name: tuple(values) for name, values in raw["boundaries"].items()}
            return cls(schema, tables, numerics, boundaries)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); prepare the data again") from None


def vocabulary_file(number: int) -> str:
    """The name of a table's file, by the table's place among all."""
    return f"vocabulary-{number:03}.ids"


def _sequence(feature: object) -> Sequence:
    assert isinstance(feature, Sequence)
    return feature


def bucket_ids(feature: Bucketised, numbers: dict[str, Floats], fitted: dict[str, tuple[float, ...]]) -> Ids:
    """The keys of a number's bucket: those of its decimal text."""
    boundaries = fitted.get(feature.name, feature.boundaries)
    buckets = bucket_numbers(feature, numbers[feature.name], boundaries)
    missing = np.isnan(buckets)
    distinct, codes = np.unique(np.where(missing, 0, buckets), return_inverse=True)
    texts = pc.cast(pa.array(distinct.astype(np.int64)), pa.string())
    return Ids(np.where(missing, -1, codes)[:, None], hash_texts(texts), texts)


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


def _load_table(folder: Path, raw: dict[str, Any], check: bool) -> Vocabulary | HashedRows:
    if "file" not in raw:
        return HashedRows(raw["rows"], raw["hashes"])
    path = folder / raw["file"]
    if not path.is_file():
        raise UserError(f"{path}: missing from the encoder; prepare the data again")
    if check and checksum(path) != raw["crc32"]:
        raise UserError(f"{path}: damaged (its checksum is another); prepare the data again")
    return Vocabulary.load(path)
