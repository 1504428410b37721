"""Raw values by column become encoded rows; the ids of values that came before are remembered.

To find out what a text means as an id takes Arrow and NumPy some hundred calls a column, whatever the number of
rows, and requests have few rows. Most of their values were met in other requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn.data.batch import MISSING, OUT_OF_VOCABULARY, IdSlot
from mldcn.data.encoder import Encoder
from mldcn.data.parsing import ParsedBlock, parse
from mldcn.data.reading import RawBlock
from mldcn.data.vocabulary import HashedRows
from mldcn.errors import UserError
from mldcn.serving.values import Columns

REMEMBERED = 1 << 16  # values of a feature; then it begins anew
LONGEST = 64  # characters of a text that is remembered
FEW = 4096  # rows; of more than that the columns' own work is the greater part
_PLAIN = {str, int, type(None)}  # of equal values all are of one type: 1 is no True and no 1.0


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
        ids: which of all id columns are theirs, in order.
        dense: which of all dense columns.
    """

    def __init__(self, encoder: Encoder, features: Collection[str], missing: Sequence[str]) -> None:
        kept = tuple(feature for feature in encoder.schema.features if feature.name in features)
        schema = encoder.schema.model_copy(update={"features": kept})
        self.encoder = Encoder(schema, encoder.tables, encoder.numerics, encoder.boundaries)
        self.columns = Columns(schema, missing)
        self.ids = _places([slot.columns for slot in encoder.layout.ids if slot.feature in features])
        self.dense = _places([slot.columns for slot in encoder.layout.dense if slot.feature in features])

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
        missing = _missing_ids(self.encoder, block.ids) | _missing_numbers(self.encoder, parsed)
        return Rows(block.ids, block.dense, _unseen(self.encoder, block.ids), missing)


class RawEncoder(Part):
    """A part that remembers the ids of single categorical values. Threads may share it."""

    def __init__(self, encoder: Encoder, features: Collection[str], missing: Sequence[str]) -> None:
        super().__init__(encoder, features, missing)
        single = [each for each in self.encoder.schema.features if each.kind == "categorical"]
        self._memories = [_Memory(self.encoder, each.name, each.log_column, missing) for each in single]
        names = {memory.part.encoder.schema.features[0].name for memory in self._memories}
        self._rest = Part(self.encoder, {each.name for each in self.encoder.schema.features} - names, missing)

    def encode(self, values: Mapping[str, Sequence[Any]]) -> Rows:
        """Encodes rows, as :meth:`Part.encode` does."""
        found = self._recalled(values)
        return super().encode(values) if found is None else found

    def _recalled(self, values: Mapping[str, Sequence[Any]]) -> Rows | None:
        """The rows with the help of memory; None where something is unusual or wrong."""
        if not self._memories or any(memory.column not in values for memory in self._memories):
            return None
        count = len(values[self._memories[0].column])
        if count > FEW or any(len(each) != count for each in values.values()):
            return None
        self.columns.check_names(values)
        ids = np.empty((count, self.encoder.layout.num_id_columns), np.int32)
        dense = np.empty((count, self.encoder.layout.num_dense_columns), np.float32)
        missing: dict[str, int] = {}
        try:
            for memory in self._memories:
                rows = memory.recall(values[memory.column])
                if rows is None:
                    return None
                ids[:, memory.part.ids] = rows
            if self._rest.columns.inputs:
                read = {each.name for each in self._rest.columns.inputs}
                rest = self._rest.encode({name: each for name, each in values.items() if name in read})
                if len(rest) != count:
                    return None
                ids[:, self._rest.ids] = rest.ids
                dense[:, self._rest.dense] = rest.dense
                missing = rest.missing
        except UserError:
            return None  # said anew of the whole, with the row's number
        return Rows(ids, dense, _unseen(self.encoder, ids), _missing_ids(self.encoder, ids) | missing)


class _Memory:
    """The ids of one feature's values."""

    def __init__(self, encoder: Encoder, feature: str, column: str, missing: Sequence[str]) -> None:
        self.part = Part(encoder, {feature}, missing)
        self.column = column
        self._known: dict[str | int | None, tuple[int, ...]] = {}

    def recall(self, values: Sequence[Any]) -> NDArray[np.int32] | None:
        """Ids ``(n, hashes)``; None where values are of unusual types."""
        given: list[Any] = values.to_pylist() if isinstance(values, pa.Array) else list(values)
        if not set(map(type, given)) <= _PLAIN:
            return None
        known = self._known
        new = list(dict.fromkeys(value for value in given if value not in known))
        if new:
            learnt = self.part.encode({self.column: new}).ids.tolist()
            fresh = dict(zip(new, map(tuple, learnt), strict=True))
            rows = [fresh[value] if value in fresh else known[value] for value in given]
            # A dictionary is only ever added to, since another thread may be reading it.
            kept = self._known = {} if len(known) + len(new) > REMEMBERED else known
            kept.update((key, row) for key, row in fresh.items() if len(str(key)) <= LONGEST)
        else:
            rows = [known[value] for value in given]
        return np.array(rows, np.int32).reshape(len(given), len(self.part.ids))


def _unseen(encoder: Encoder, ids: NDArray[np.int32]) -> dict[str, int]:
    return {
        slot.feature: int((ids[:, slot.columns] == OUT_OF_VOCABULARY).sum())
        for slot in _values(encoder)
        if not isinstance(encoder.tables[slot.table], HashedRows)
    }


def _missing_ids(encoder: Encoder, ids: NDArray[np.int32]) -> dict[str, int]:
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


def _places(slices: Sequence[slice]) -> NDArray[np.int64]:
    return np.array([column for each in slices for column in range(each.start, each.stop)], np.int64)
