"""What a schema makes of a log, by feature: coverage, cardinality, what falls out of the vocabulary, values."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mldcn.config import Config
from mldcn.data.batch import MISSING, OUT_OF_VOCABULARY, EncodedLayout, IdSlot
from mldcn.data.encoder import EncodedBlock, Encoder
from mldcn.data.fitting import Fitter
from mldcn.data.parsing import ParsedBlock
from mldcn.data.passes import LogPasses, Progress
from mldcn.data.reading import RawBlock
from mldcn.data.rejects import Reject, RejectsFile
from mldcn.data.splits import LEFT_OUT, PARTS, TRAIN, Parts
from mldcn.data.transforms import Moments, RowSample, row_priorities
from mldcn.data.vocabulary import Vocabulary
from mldcn.errors import UserError
from mldcn.schema import Bucketised, Numeric, TableFeature

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
TOP = 5


@dataclass(frozen=True)
class NumberFacts:
    """Of a number's cells that are not missing; quantiles (of ``QUANTILES``) from a sample."""

    minimum: float
    mean: float
    maximum: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class FeatureFacts:
    """One feature.

    coverage: share of rows that have a value. distinct: ids among the training rows. table_rows: of its table.
    oov_train, oov_held_out: share of the ids that have no row of their own, in training rows and in the others.
    top: the most frequent ids of the training rows, and their counts.
    """

    name: str
    kind: str
    source: str
    column: str
    coverage: float
    distinct: int | None = None
    table_rows: int | None = None
    oov_train: float | None = None
    oov_held_out: float | None = None
    top: tuple[tuple[str, int], ...] = ()
    numbers: NumberFacts | None = None


@dataclass(frozen=True)
class LabelFacts:
    """One task: rows with a known label, and the share of positives among them, by part of the log."""

    name: str
    known: dict[str, int]
    rate: dict[str, float]


@dataclass(frozen=True)
class Description:
    """A described log: rows by part, features, labels; how many bad rows were left out, and the first of them."""

    rows: dict[str, int]
    features: tuple[FeatureFacts, ...]
    labels: tuple[LabelFacts, ...]
    rejected: int = 0
    first_reject: Reject | None = None


def describe(config: Config, progress: Progress | None = None) -> Description:
    """Describes the log that a config names, in two streaming passes.

    Raises:
        UserError: the log cannot be read or is not what the schema says, all its rows are bad, or a split comes
            out empty.
    """
    schema = config.log_schema
    rejects = RejectsFile(None)
    passes = LogPasses(config, progress, lambda found: rejects.add(found))
    fitter, seen = Fitter(schema), _Seen(config)
    with tempfile.TemporaryDirectory() as folder:
        rule = passes.rule(Path(folder))
    try:
        encoder = passes.fit(rule, fitter, seen.raw)
    except UserError:
        rejects.refuse_all(int(seen.rows.sum()))
        raise
    # The next pass sees the training rows again.
    rejects = RejectsFile(None)

    def encoded(block: RawBlock, parts: Parts) -> tuple[ParsedBlock, EncodedBlock]:
        parsed = passes.parse(block, rule)
        return parsed, encoder.assemble(parsed)

    for part in PARTS:
        for (parsed, block), parts in passes.run("describe", part, rule, encoded):
            if part != "train":
                seen.raw(parsed, parts)
            seen.encoded(block, parts, encoder.layout)
    described = seen.description(encoder, fitter)
    return replace(described, rejected=rejects.count, first_reject=rejects.first)


@dataclass
class _Seen:
    """Sums over the log."""

    config: Config
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LEFT_OUT + 1, np.int64))
    present: dict[str, int] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    extremes: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: dict[str, RowSample] = field(default_factory=dict)
    # For each label: rows where it is known, and where it is 1, by part.
    labels: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    # For each feature: ids and ids out of vocabulary, in training rows and in the others.
    ids: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def raw(self, parsed: ParsedBlock, parts: Parts) -> None:
        """Takes in what a block says."""
        priorities = row_priorities(int(self.rows.sum()), parsed.rows)
        self.rows += np.bincount(parts, minlength=LEFT_OUT + 1)
        for name, values in parsed.numbers.items():
            there = values[~np.isnan(values)]
            self.present[name] = self.present.get(name, 0) + len(there)
            self.moments.setdefault(name, Moments()).update(there)
            low, high = self.extremes.get(name, (np.inf, -np.inf))
            self.extremes[name] = (float(there.min(initial=low)), float(there.max(initial=high)))
            self.samples.setdefault(name, RowSample()).update(values, priorities)
        for name, ids in parsed.ids.items():
            count = int((ids.codes[:, 0] >= 0).sum())
            self.present[name] = self.present.get(name, 0) + count
        for name, vectors in parsed.vectors.items():
            if name not in parsed.ids:
                self.present[name] = self.present.get(name, 0) + int(vectors.any(axis=1).sum())
        for number, label in enumerate(self.config.log_schema.labels):
            targets = parsed.labels[:, number]
            sums = self.labels.setdefault(label.name, np.zeros((2, LEFT_OUT + 1), np.int64))
            sums[0] += np.bincount(parts[~np.isnan(targets)], minlength=LEFT_OUT + 1)
            sums[1] += np.bincount(parts[targets == 1], minlength=LEFT_OUT + 1)

    def encoded(self, block: EncodedBlock, parts: Parts, layout: EncodedLayout) -> None:
        """Takes in what became of a block."""
        train = parts == TRAIN
        for slot in layout.ids:
            if slot.role == "values":
                sums = self.ids.setdefault(slot.feature, np.zeros((2, 2), np.int64))
                for which, rows in enumerate((train, ~train & (parts != LEFT_OUT))):
                    sums[which] += _ids_and_unknown(block.ids[rows], slot)

    def description(self, encoder: Encoder, fitter: Fitter) -> Description:
        """The facts."""
        schema = self.config.log_schema
        parts: dict[str, int] = {
            part: int(self.rows[number]) for number, part in enumerate(PARTS) if self.rows[number]
        }
        total = max(int(self.rows.sum()), 1)
        features = []
        for feature in schema.features:
            facts = FeatureFacts(
                feature.name,
                feature.kind,
                feature.source,
                feature.log_column,
                self.present[feature.name] / total,
            )
            changes: dict[str, Any] = {}
            if isinstance(feature, Numeric | Bucketised):
                changes["numbers"] = self._numbers(feature.name)
            if isinstance(feature, TableFeature):
                name = schema.table_of(feature)
                table = encoder.tables[name]
                changes |= {"distinct": fitter.distinct(name), "table_rows": table.rows}
                if isinstance(table, Vocabulary):
                    (ids, unknown), (held_ids, held_unknown) = self.ids[feature.name].tolist()
                    changes["oov_train"] = unknown / ids if ids else None
                    changes["oov_held_out"] = held_unknown / held_ids if held_ids else None
                    tops = zip(table.values[:TOP].to_pylist(), table.counts[:TOP].tolist(), strict=True)
                    changes["top"] = tuple(tops)
            features.append(replace(facts, **changes))
        labels = []
        for label in schema.labels:
            sums = {
                part: self.labels[label.name][:, PARTS.index(part)].tolist()
                for part in PARTS
                if part in parts
            }
            known: dict[str, int] = {part: counts[0] for part, counts in sums.items()}
            rate: dict[str, float] = {
                part: counts[1] / counts[0] for part, counts in sums.items() if counts[0]
            }
            labels.append(LabelFacts(label.name, known, rate))
        return Description(parts, tuple(features), tuple(labels))

    def _numbers(self, name: str) -> NumberFacts | None:
        if not self.moments[name].count:
            return None
        low, high = self.extremes[name]
        sample = self.samples[name].values()
        quantiles = np.quantile(sample, QUANTILES, method="inverted_cdf")
        return NumberFacts(low, self.moments[name].mean, high, tuple(quantiles.tolist()))


def _ids_and_unknown(ids: NDArray[np.int32], slot: IdSlot) -> tuple[int, int]:
    columns = ids[:, slot.columns]
    return int((columns != MISSING).sum()), int((columns == OUT_OF_VOCABULARY).sum())
