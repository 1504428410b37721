"""A request's two halves: the features that all its candidates share, and each candidate's own."""

from __future__ import annotations

from mldcn import schema as spec
from mldcn.serving.raw import RawEncoder
from mldcn.serving.values import constant_names, inputs_of


def shared_features(schema: spec.Schema) -> frozenset[str]:
    """The features that all candidates of a request share: those that read columns of user and context alone."""
    constant = constant_names(inputs_of(schema))
    return frozenset(each.name for each in schema.features if constant.issuperset(schema.read_by(each)))


def halves(whole: RawEncoder) -> tuple[RawEncoder, RawEncoder] | None:
    """What the candidates of a request share, and their own; None where one of the two is empty."""
    shared = shared_features(whole.encoder.schema)
    own = {feature.name for feature in whole.encoder.schema.features} - shared
    if not shared or not own:
        return None
    return whole.of(shared), whole.of(own)
