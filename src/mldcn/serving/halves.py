"""A request's two halves: the features that all its candidates share, and each candidate's own."""

from __future__ import annotations

from collections.abc import Sequence

from mldcn import schema as spec
from mldcn.data.encoder import Encoder
from mldcn.serving.encoding import RawEncoder
from mldcn.serving.values import constant_names, inputs_of


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


def halves(encoder: Encoder, missing: Sequence[str]) -> tuple[RawEncoder, RawEncoder] | None:
    """What the candidates of a request share, and their own; None where one of the two is empty."""
    shared = shared_features(encoder.schema)
    own = {feature.name for feature in encoder.schema.features} - shared
    if not shared or not own:
        return None
    return RawEncoder(encoder, shared, missing), RawEncoder(encoder, own, missing)
