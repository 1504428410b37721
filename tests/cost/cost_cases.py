"""Logs of the cost tests."""

from mldcn.config import ModelConfig, parse
from mldcn.cost import log_layout, plain_schema
from mldcn.errors import UserError
from mldcn.schema import (
    Categorical,
    EmbeddingFeature,
    Hashing,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
)


def plain(fields=8, rows=500, tasks=1):
    """A schema of categorical features, and its layout."""
    schema = plain_schema(fields, tasks)
    return schema, log_layout(schema, rows=rows)[0]


# A feature of every kind, two tasks, positions.
RICH = Schema(
    features=(
        Categorical(name="ad", kind="categorical"),
        Categorical(name="user", kind="categorical", encoding=Hashing(kind="hash", rows=900, hashes=2)),
        Numeric(name="age", kind="numeric", missing_indicator=True),
        MultiCategorical(name="tags", kind="multi", max_length=5),
        EmbeddingFeature(name="image", kind="embedding", width=6, project_to=4),
        Sequence(
            name="seen",
            kind="sequence",
            max_length=7,
            share="ad",
            actions="acts",
            times="times",
            pooling="attention",
            target="ad",
        ),
    ),
    labels=(Label(name="click"), Label(name="save")),
    position="place",
    max_position=9,
    time="when",
)


def rich():
    return RICH, log_layout(RICH, {"ad": 400, "tags": 60, "seen.actions": 5})[0]


def model(name, **parts):
    interaction = {"name": name, **parts.pop("options", {})}
    return parse(ModelConfig, {"interaction": interaction, "embedding": {"dim": 8}, **parts}, "model")


def outcome(call):
    """What a call gives, and the message of its refusal: one of them None."""
    try:
        return call(), None
    except UserError as error:
        return None, str(error)
