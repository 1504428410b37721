"""Logs that need not exist: layouts from table sizes, and batches of random rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mldcn.config import suggest
from mldcn.data.batch import RESERVED_ROWS, Batch, EncodedLayout
from mldcn.data.encoder import Encoder
from mldcn.data.parsing import actions_of
from mldcn.data.vocabulary import HashedRows
from mldcn.errors import UserError
from mldcn.schema import Bucketised, Categorical, Hashing, Label, Schema, Sequence, TableFeature

PLAIN_FIELDS = 26  # as many ids as a row of Criteo's logs has
PLAIN_ROWS = 100_000


def plain_schema(fields: int = PLAIN_FIELDS, tasks: int = 1) -> Schema:
    """A log of categorical features, each with a table of its own, as in most papers' ``F x e`` inputs."""
    features = [Categorical(name=f"f{i}", kind="categorical") for i in range(1, fields + 1)]
    return Schema(features=tuple(features), labels=tuple(Label(name=f"task{i}") for i in range(1, tasks + 1)))


def log_layout(
    schema: Schema, tables: Mapping[str, int] | None = None, rows: int = PLAIN_ROWS
) -> tuple[EncodedLayout, tuple[str, ...]]:
    """What the columns of a log's encoded rows are, without reading the log.

    Args:
        schema: the log's schema.
        tables: table -> its rows (reserved ones included), where they are known.
        rows: of tables whose size neither ``tables`` nor the schema tells.

    Returns:
        The layout, and the names of the tables whose size was assumed.

    Raises:
        UserError: a table is named that the schema does not have, or is smaller than a table can be.
    """
    given = dict(tables or {})
    sizes: dict[str, HashedRows] = {}
    assumed = []
    for feature in schema.features:
        if not isinstance(feature, TableFeature):
            continue
        named = [schema.table_of(feature)]
        if isinstance(feature, Sequence) and feature.actions is not None:
            named.append(actions_of(feature))
        for name in named:
            if name in sizes:
                continue
            options = feature.encoding
            hashes = options.hashes if isinstance(options, Hashing) else 1
            known = given.get(name, _known_rows(feature) if name == feature.name else None)
            if known is None:
                assumed.append(name)
                known = rows
            if known <= RESERVED_ROWS:
                raise UserError(f"tables: {name!r} has {known} rows; the least is {RESERVED_ROWS + 1}")
            sizes[name] = HashedRows(known - RESERVED_ROWS, hashes)
    for name in given:
        if name not in sizes:
            raise UserError(f"tables: no table is called {name!r}{suggest(name, sizes)}")
    return Encoder(schema, dict(sizes), {}, {}).layout, tuple(assumed)


def _known_rows(feature: TableFeature) -> int | None:
    """The rows that the schema itself tells; a vocabulary's largest size is taken to be reached."""
    if isinstance(feature, Bucketised) and feature.method != "log2":
        buckets = len(feature.boundaries) + 1 if feature.boundaries else feature.buckets
        return RESERVED_ROWS + buckets
    if isinstance(feature.encoding, Hashing):
        return RESERVED_ROWS + feature.encoding.rows
    size = feature.encoding.max_size
    return None if size is None else RESERVED_ROWS + size


def sample_batch(layout: EncodedLayout, rows: int, seed: int = 0) -> Batch:
    """Random encoded rows: ids uniform over their tables, lists full, a tenth of the labels positive."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, layout.num_id_columns, dtype=torch.int32)
    for slot in layout.ids:
        size = layout.tables[slot.table]
        shape = (rows, slot.length * slot.hashes)
        ids[:, slot.columns] = torch.randint(
            min(RESERVED_ROWS, size - 1), size, shape, generator=draw, dtype=torch.int32
        )
    return Batch(
        ids=ids,
        dense=torch.randn(rows, layout.num_dense_columns, generator=draw),
        labels=(torch.rand(rows, len(layout.tasks), generator=draw) < 0.1).float(),
        weight=torch.ones(rows),
        position=torch.zeros(rows, dtype=torch.int32),
    )


def parse_tables(raw: Any, where: str) -> dict[str, int]:
    """The mapping table -> rows of a file.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(raw, dict) or not all(
        isinstance(rows, int) and not isinstance(rows, bool) for rows in raw.values()
    ):
        raise UserError(f"{where}: tables must map the names of tables to numbers of rows")
    return {str(name): rows for name, rows in raw.items()}
