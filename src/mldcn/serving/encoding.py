"""Raw values by column become encoded rows, as training encoded its log."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mldcn.data.batch import MISSING, OUT_OF_VOCABULARY, IdSlot
from mldcn.data.encoder import Encoder
from mldcn.data.parsing import ParsedBlock, parse
from mldcn.data.reading import RawBlock
from mldcn.data.vocabulary import HashedRows
from mldcn.serving.values import Columns


@dataclass(frozen=True)
class Rows:
    """Encoded rows of one call, and what was noticed of them.

    Attributes:
        ids: ``(n, C)`` rows of tables.
        dense: ``(n, D)``.
        unseen: ids that training did not see, counted by feature; hashed features have none.
        missing: missing values, empty lists among them, counted by feature.
        request: whether they are the candidates of one request, and so agree in the features of user and context.
    """

    ids: NDArray[np.int32]
    dense: NDArray[np.float32]
    unseen: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    request: bool = False

    def __len__(self) -> int:
        return len(self.ids)


class Part:
    """Some of a schema's features, encoded as the whole encoder encodes them.

    Args:
        encoder: of all features.
        features: the names of those that belong to the part.
        missing: texts that mean a missing value.

    Attributes:
        encoder: of these features alone.
        columns: what they read.
        missing: texts that mean a missing value.
        ids: which of all id columns are theirs, in order.
        dense: which of all dense columns.
    """

    def __init__(self, encoder: Encoder, features: Collection[str], missing: Sequence[str]) -> None:
        kept = tuple(feature for feature in encoder.schema.features if feature.name in features)
        schema = encoder.schema.model_copy(update={"features": kept})
        self.encoder = Encoder(schema, encoder.tables, encoder.numerics, encoder.boundaries)
        self.columns = Columns(schema, missing)
        self.missing = tuple(missing)
        self.ids = places([slot.columns for slot in encoder.layout.ids if slot.feature in features])
        self.dense = places([slot.columns for slot in encoder.layout.dense if slot.feature in features])

    def is_given(self, constant: Mapping[str, Any], candidates: Mapping[str, Any]) -> bool:
        """Whether a request gives all of it once."""
        return all(
            each.name in constant or (each.optional and each.name not in candidates)
            for each in self.columns.inputs
        )

    def encode(self, values: Mapping[str, Sequence[Any]]) -> Rows:
        """Encodes rows.

        Raises:
            UserError: a column is lacking or unknown, or a value is not what the schema says.
        """
        parsed = parse(self.encoder.schema, RawBlock(self.columns.table(values), "request", 1), labels=False)
        block = self.encoder.assemble(parsed)
        missing = missing_ids(self.encoder, block.ids) | _missing_numbers(self.encoder, parsed)
        return Rows(block.ids, block.dense, unseen_ids(self.encoder, block.ids), missing)


def unseen_ids(encoder: Encoder, ids: NDArray[np.int32]) -> dict[str, int]:
    """Ids that training did not see, by feature."""
    return {
        slot.feature: int((ids[:, slot.columns] == OUT_OF_VOCABULARY).sum())
        for slot in _values(encoder)
        if not isinstance(encoder.tables[slot.table], HashedRows)
    }


def missing_ids(encoder: Encoder, ids: NDArray[np.int32]) -> dict[str, int]:
    """Missing ids and empty lists, by feature."""
    # A list's first place is its padding only where it is empty.
    return {slot.feature: int((ids[:, slot.start] == MISSING).sum()) for slot in _values(encoder)}


def _missing_numbers(encoder: Encoder, parsed: ParsedBlock) -> dict[str, int]:
    found = {}
    for slot in encoder.layout.dense:
        if slot.kind == "numeric":
            found[slot.feature] = int(np.isnan(parsed.numbers[slot.feature]).sum())
        elif slot.kind == "embedding":
            found[slot.feature] = int((~parsed.vectors[slot.feature].any(axis=1)).sum())
    return found


def _values(encoder: Encoder) -> list[IdSlot]:
    return [slot for slot in encoder.layout.ids if slot.role == "values"]


def places(slices: Sequence[slice]) -> NDArray[np.int64]:
    """All columns of some slices."""
    return np.array([column for each in slices for column in range(each.start, each.stop)], np.int64)
