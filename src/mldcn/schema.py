"""What a log's columns mean: features by kind and source, labels, weight, position, request, user and time.

A schema is data, written by ``mldcn init`` and edited by hand. It knows nothing of tensors.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mldcn.layout import Source


class Strict(BaseModel):
    """Base of every config object: frozen, unknown keys and wrong types refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Vocabulary(Strict):
    """One row for each id seen at least ``min_count`` times in the training rows."""

    kind: Literal["vocabulary"] = "vocabulary"
    min_count: int = Field(1, ge=1, description="ids seen fewer times share the out-of-vocabulary row")
    max_size: int | None = Field(None, ge=1, description="keep only this many of the most frequent ids")


class Hashing(Strict):
    """A fixed number of rows; ids that collide share one. Two hashes are looked up and summed."""

    kind: Literal["hash"] = "hash"
    rows: int = Field(..., ge=1)
    hashes: Literal[1, 2] = 1


Encoding = Annotated[Vocabulary | Hashing, Field(discriminator="kind")]


class FeatureBase(Strict):
    """What every feature has."""

    name: str = Field(..., min_length=1)
    column: str | None = Field(None, description="the log's column; the feature's name by default")
    source: Source = "context"

    @property
    def log_column(self) -> str:
        """The column of the log that holds this feature."""
        return self.column or self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the log that are this feature's own."""
        return (self.log_column,)


class TableFeature(FeatureBase):
    """A feature that is looked up in an embedding table."""

    encoding: Encoding = Vocabulary()
    share: str | None = Field(None, description="use the vocabulary and table of this other feature")


class Numeric(FeatureBase):
    """A number, fed to the model as one column (two with ``missing_indicator``).

    transform: ``identity``: x. ``log``: log(x + offset), where x is first raised to the smallest training value
    above -offset if it is below that one. ``signed_log``: sign(x) log(1 + abs(x)).
    ``quantile``: the empirical distribution function of the training rows, in [0, 1]; of tied values, the middle.
    With ``standardise`` the result is shifted and scaled to mean 0, deviation 1 on the training rows.
    A missing value becomes the training mean (0 when standardised).
    """

    kind: Literal["numeric"]
    transform: Literal["identity", "log", "signed_log", "quantile"] = "identity"
    offset: float = Field(1.0, description="of the log transform: log(x + offset)")
    standardise: bool = True
    missing_indicator: bool = False


class Bucketised(TableFeature):
    """A number turned into a category. Quantile buckets have a row each, whatever ``min_count`` says.

    ``quantile`` buckets, given ``boundaries``, or ``log2``: floor(log(x)^2) for x > 2 and x itself below,
    as the winners of Criteo's challenge did it.
    """

    kind: Literal["bucketised"]
    method: Literal["quantile", "boundaries", "log2"] = "quantile"
    buckets: int = Field(32, ge=2, description="number of quantile buckets")
    boundaries: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _boundaries_given(self) -> Bucketised:
        if (self.method == "boundaries") != bool(self.boundaries):
            raise ValueError("boundaries go with method: boundaries, and only with it")
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError("boundaries must rise strictly")
        return self


class Categorical(TableFeature):
    """One id a row. Ids are kept as text, so large integers stay exact."""

    kind: Literal["categorical"]


class MultiCategorical(TableFeature):
    """Several ids a row: a list column, or text cut at ``delimiter``; pooled into one vector."""

    kind: Literal["multi"]
    delimiter: str = Field("|", min_length=1)
    max_length: int = Field(16, ge=1, description="ids beyond this many are dropped")
    pooling: Literal["mean", "sum", "max"] = "mean"


class EmbeddingFeature(FeatureBase):
    """A float vector of fixed length (list column, or text cut at ``delimiter``)."""

    kind: Literal["embedding"]
    width: int = Field(..., ge=1)
    delimiter: str = Field("|", min_length=1)
    project_to: int | None = Field(None, ge=1, description="learned projection to this width")
    normalise: bool = Field(True, description="scale each vector to L2 norm 1")


class Sequence(TableFeature):
    """Recent ids, newest last, with optional times and actions (parallel columns of the same length).

    ``times`` are event times in the unit of the schema's ``time`` column. ``pooling: attention`` weighs the
    items by their match with the feature named in ``target``.
    """

    kind: Literal["sequence"]
    delimiter: str = Field("|", min_length=1)
    max_length: int = Field(32, ge=1, description="only the newest this many are kept")
    times: str | None = None
    actions: str | None = None
    pooling: Literal["mean", "attention"] = "mean"
    target: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The ids' column, and those of times and actions where there are such."""
        return (self.log_column, *(name for name in (self.times, self.actions) if name is not None))

    @model_validator(mode="after")
    def _target_given(self) -> Sequence:
        if (self.pooling == "attention") != (self.target is not None):
            raise ValueError("target (a categorical feature) goes with pooling: attention, and only with it")
        return self


Feature = Annotated[
    Numeric | Bucketised | Categorical | MultiCategorical | EmbeddingFeature | Sequence,
    Field(discriminator="kind"),
]


class Label(Strict):
    """One binary task. A null label masks the task's loss and metrics for the row."""

    name: str = Field(..., min_length=1)
    column: str | None = None
    weight: float = Field(1.0, ge=0, description="of this task's loss in the sum")
    at_least: float | None = Field(None, description="positive when the column is at least this")
    negative_sampling_rate: float = Field(
        1.0, gt=0, le=1, description="share of this task's negatives that the log kept; undone at prediction"
    )

    @property
    def log_column(self) -> str:
        """The column of the log that holds this label."""
        return self.column or self.name


class Schema(Strict):
    """The meaning of one log."""

    features: tuple[Feature, ...] = Field(..., min_length=1)
    labels: tuple[Label, ...] = Field(..., min_length=1)
    weight: str | None = Field(None, description="column of non-negative sample weights")
    position: str | None = Field(None, description="column of display positions, 1 is the top")
    max_position: int = Field(50, ge=1, description="positions beyond this share one bias")
    request: str | None = Field(None, description="column that names the request or session")
    user: str | None = Field(None, description="column that names the user, for GAUC and clustered intervals")
    time: str | None = Field(None, description="column of event times (a number, or an ISO date-time)")

    @model_validator(mode="after")
    def _references_hold(self) -> Schema:
        for what, names in (
            ("feature", [f.name for f in self.features]),
            ("label", [label.name for label in self.labels]),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"{what} names must be distinct; given twice: {', '.join(twice)}")
        label_columns = {label.log_column for label in self.labels}
        for name in self.feature_columns():
            if name in label_columns and name != self.time:
                raise ValueError(f"column {name!r} is a label, so no feature may read it: remove the feature")
        tables = {f.name: f for f in self.features if isinstance(f, TableFeature)}
        for feature in tables.values():
            if feature.share is not None:
                owner = tables.get(feature.share)
                if owner is None or owner.share is not None or owner.name == feature.name:
                    raise ValueError(
                        f"feature {feature.name!r}: share names {feature.share!r}, which must be another "
                        "feature with a table of its own"
                    )
                if isinstance(feature, Bucketised) or isinstance(owner, Bucketised):
                    raise ValueError(f"feature {feature.name!r}: a bucketised feature shares no table")
            if isinstance(feature, Sequence) and feature.target is not None:
                target = tables.get(feature.target)
                if not isinstance(target, Categorical):
                    raise ValueError(
                        f"feature {feature.name!r}: target {feature.target!r} is no categorical feature"
                    )
                if self.table_of(feature) != self.table_of(target):
                    raise ValueError(
                        f"feature {feature.name!r}: pooling: attention needs the target's table; "
                        f"add share: {target.share or target.name}"
                    )
            if isinstance(feature, Sequence) and feature.times is not None and self.time is None:
                raise ValueError(f"feature {feature.name!r}: times need the schema's time column")
        return self

    @staticmethod
    def table_of(feature: TableFeature) -> str:
        """The name of the vocabulary and table that a feature uses."""
        return feature.share or feature.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """The labels' names, in order."""
        return tuple(label.name for label in self.labels)

    def feature_columns(self) -> tuple[str, ...]:
        """The columns that the features read: all that prediction needs."""
        return tuple(dict.fromkeys(name for feature in self.features for name in self.read_by(feature)))

    def read_by(self, feature: FeatureBase) -> tuple[str, ...]:
        """The columns that one feature reads: its own, and the time of the row where it has times."""
        if isinstance(feature, Sequence) and feature.times is not None and self.time is not None:
            return (*feature.columns, self.time)
        return feature.columns

    def columns(self) -> tuple[str, ...]:
        """Every column of the log that the schema reads, each once."""
        labels = [label.log_column for label in self.labels]
        rest = (self.weight, self.position, self.request, self.user, self.time)
        named = [*self.feature_columns(), *labels, *rest]
        return tuple(dict.fromkeys(name for name in named if name is not None))
