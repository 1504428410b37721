"""A request's two halves: the features that all its candidates share, and each candidate's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mldcn import schema as spec
from mldcn.data.encoder import Encoder
from mldcn.serving.values import Columns, constant_names, inputs_of


def shared_features(schema: spec.Schema) -> frozenset[str]:
    """The features that all candidates of a request share: those that read columns of user and context alone."""
    constant = constant_names(inputs_of(schema))
    found = set()
    for feature in schema.features:
        read = [feature.log_column]
        if isinstance(feature, spec.Sequence):
            read += [name for name in (feature.times, feature.actions) if name is not None]
            read += [schema.time] if feature.times is not None and schema.time is not None else []
        if constant.issuperset(read):
            found.add(feature.name)
    return frozenset(found)


class Half:
    """Some of a schema's features, encoded as the whole encoder encodes them.

    Args:
        encoder: of all features.
        features: the names of those that belong to the half.
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
        self.ids = _columns([slot.columns for slot in encoder.layout.ids if slot.feature in features])
        self.dense = _columns([slot.columns for slot in encoder.layout.dense if slot.feature in features])

    def is_given(self, constant: Mapping[str, Any], candidates: Mapping[str, Any]) -> bool:
        """Whether a request gives all of it once."""
        return all(
            each.name in constant or (each.optional and each.name not in candidates)
            for each in self.columns.inputs
        )


def halves(encoder: Encoder, missing: Sequence[str]) -> tuple[Half, Half] | None:
    """What the candidates of a request share, and their own; None where one of the two is empty."""
    shared = shared_features(encoder.schema)
    own = {feature.name for feature in encoder.schema.features} - shared
    if not shared or not own:
        return None
    return Half(encoder, shared, missing), Half(encoder, own, missing)


def _columns(slices: Sequence[slice]) -> NDArray[np.int64]:
    return np.array([column for each in slices for column in range(each.start, each.stop)], np.int64)
