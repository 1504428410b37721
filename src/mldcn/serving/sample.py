"""A request made of what an encoder knows: its most frequent ids, its numbers' training means, vectors of ones."""

from __future__ import annotations

from typing import Any

from mldcn import schema as spec
from mldcn.data.encoder import Encoder
from mldcn.data.parsing import actions_of
from mldcn.data.vocabulary import Vocabulary
from mldcn.serving.values import Columns

CANDIDATES = 4


def sample_request(schema: spec.Schema, encoder: Encoder, columns: Columns) -> dict[str, Any]:
    """One user and context with a few candidates, as ``Engine.rank`` takes them.

    Each candidate has other ids, and the last has none at all.
    """
    rows: dict[str, list[Any]] = {}
    for feature in schema.features:
        rows.setdefault(feature.log_column, [_value(feature, encoder, i) for i in range(CANDIDATES)])
        if isinstance(feature, spec.Sequence):
            items = rows[feature.log_column]
            if feature.actions is not None:
                known = _ids(encoder, actions_of(feature))
                rows[feature.actions] = [[known[0]] * len(each) for each in items]
            if feature.times is not None and schema.time is not None:
                rows[feature.times] = [[0] * len(each) for each in items]
                rows.setdefault(schema.time, [60] * CANDIDATES)
    # Not the first candidate's, whose lists are empty.
    constant = {name: values[CANDIDATES - 2] for name, values in rows.items() if name in columns.constant}
    if len(constant) == len(rows):
        constant = {}
    return {
        "constant": constant,
        "candidates": {name: values for name, values in rows.items() if name not in constant},
    }


def _value(feature: spec.Feature, encoder: Encoder, candidate: int) -> Any:
    match feature:
        case spec.Numeric():
            return None if candidate == CANDIDATES - 1 else float(candidate)
        case spec.Bucketised():
            return None if candidate == CANDIDATES - 1 else float(candidate)
        case spec.EmbeddingFeature():
            return [1.0] * feature.width
        case spec.Categorical():
            known = _ids(encoder, encoder.schema.table_of(feature))
            return None if candidate == CANDIDATES - 1 else known[candidate % len(known)]
        case _:
            known = _ids(encoder, encoder.schema.table_of(feature))
            return known[:candidate]


def _ids(encoder: Encoder, table: str) -> list[str]:
    """Some ids of a table, the most frequent first."""
    rows = encoder.tables[table]
    known = rows.values[:CANDIDATES].to_pylist() if isinstance(rows, Vocabulary) else []
    return known or ["1", "2", "3"]
