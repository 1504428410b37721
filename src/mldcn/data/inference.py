"""Guesses a schema from the head of a log, for ``mldcn init``: a start to edit, with its reasons beside it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from numpy.typing import NDArray

from mldcn.config import DataConfig, ModelConfig, TrainingConfig
from mldcn.data.profile import LABEL, OUTCOME, USER, ColumnFacts, Look, as_truth, is_readable, judge, look_at
from mldcn.data.reading import LogReader, RawBlock, expand
from mldcn.errors import UserError
from mldcn.schema import Strict

SAMPLE_ROWS = 100_000
# Files of one log that are looked at.
_FILES = 8
# Ids seen once teach nothing, and where there are this many, they are most of the table.
_MANY_IDS = 10_000
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}


@dataclass(frozen=True)
class Inferred:
    """A guessed schema.

    labels: the chosen task. at_least: the threshold that makes it binary. alternatives: other columns that
    could be tasks. user: also a feature. positives: the share of positive labels.
    """

    columns: tuple[ColumnFacts, ...]
    label: str
    at_least: float | None
    alternatives: tuple[str, ...]
    rows: int
    time: str | None
    request: str | None
    user: str | None
    position: str | None
    weight: str | None
    positives: float
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def leaks(self) -> tuple[ColumnFacts, ...]:
        """The columns taken for leaks, each with its reason."""
        return tuple(column for column in self.columns if column.role == "leak")


def infer(
    log: Sequence[str | Path] | pa.Table,
    data: DataConfig | None = None,
    *,
    label: str | None = None,
    rows: int = SAMPLE_ROWS,
) -> Inferred:
    """Guesses what the columns of a log mean, from the first rows of a few of its files.

    Args:
        log: files, or an Arrow table.
        data: the log's format.
        label: the column to predict; guessed by default.
        rows: how many rows to look at.

    Raises:
        UserError: the log cannot be read, its first line is no header, or no column looks like a label.
    """
    data = _delimited(log, data or DataConfig())
    block = _head(log, data, rows)
    names = block.table.column_names
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{block.file}: column {twice[0]!r} is there twice; rename or drop one of them")
    looks = {name: look_at(block, name) for name in names if is_readable(block, name)}
    binary = [name for name, look in looks.items() if as_truth(look) is not None]
    chosen, at_least = _choose_label(block, label, binary, looks)
    target = _target(looks[chosen], at_least)
    columns = [judge(look, chosen, binary, target) for look in looks.values()]
    columns = _shared(_paired(_one_each(columns), looks), looks)
    roles = {column.role: column.name for column in reversed(columns)}
    user = next((c.name for c in columns if c.role == "feature" and USER.search(c.name)), None)
    return Inferred(
        columns=tuple(columns),
        label=chosen,
        at_least=at_least,
        alternatives=tuple(c.name for c in columns if c.role == "outcome"),
        rows=len(block),
        time=roles.get("time"),
        request=roles.get("request"),
        user=user,
        position=roles.get("position"),
        weight=roles.get("weight"),
        positives=float(np.nanmean(target)),
        data=data,
    )


def _head(log: Sequence[str | Path] | pa.Table, data: DataConfig, rows: int) -> RawBlock:
    if isinstance(log, pa.Table):
        if not log.num_rows:
            raise UserError("table: holds no rows")
        return RawBlock(log.slice(0, rows).combine_chunks(), "table", 1)
    files = expand(log)
    reader = LogReader(files[:1], data)
    names = reader.names(files[0], reader.formats[0])
    if data.header and reader.formats[0] != "parquet" and any(not name or _is_number(name) for name in names):
        raise UserError(
            f"{files[0]}: its first line looks like a row, not a header ({', '.join(names[:5])} ...); "
            "name its columns with --columns, or set data.header to false and data.column_names"
        )
    # Some of each of a few files: a log's first day need not be like its last.
    chosen = [files[i] for i in sorted(set(np.linspace(0, len(files) - 1, _FILES).astype(int).tolist()))]
    tables = [table for path in chosen for table in _first_rows(path, data, names, rows // len(chosen))]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        table = tables[0]
    return RawBlock(table.combine_chunks(), str(files[0]), 1)


def _first_rows(path: Path, data: DataConfig, names: list[str], rows: int) -> Iterator[pa.Table]:
    for block in LogReader([path], data).blocks(names):
        yield block.table.slice(0, rows)
        rows -= len(block)
        if rows <= 0:
            return


def _delimited(log: Sequence[str | Path] | pa.Table, data: DataConfig) -> DataConfig:
    """The format with its delimiter, where the header has one that the file's ending does not say."""
    if isinstance(log, pa.Table) or not data.header or data.delimiter is not None:
        return data
    reader = LogReader(expand(log)[:1], data)
    if reader.formats[0] == "parquet":
        return data
    names = reader.names(reader.files[0], reader.formats[0])
    marks = [mark for mark in (";", "|", "\t", ",") if len(names) == 1 and mark in names[0]]
    return data.model_copy(update={"delimiter": max(marks, key=names[0].count)}) if marks else data


def _choose_label(
    block: RawBlock, label: str | None, binary: list[str], looks: dict[str, Look]
) -> tuple[str, float | None]:
    if label is not None:
        if label not in looks:
            raise UserError(f"{block.file}: has no column {label!r}; it has {', '.join(looks)}")
        if label in binary:
            return label, None
        return label, _threshold(block, looks[label])
    named = [name for name in binary if re.fullmatch(LABEL, name, re.IGNORECASE)]
    if named:
        return named[0], None
    ratings = [name for name, look in looks.items() if re.search(r"rating|stars|score", name, re.IGNORECASE)]
    ratings = [name for name in ratings if looks[name].numbers is not None and 2 < looks[name].distinct <= 11]
    if ratings:
        return ratings[0], _threshold(block, looks[ratings[0]])
    outcomes = [name for name in binary if OUTCOME.search(name)]
    if outcomes:
        return outcomes[0], None
    named = [name for name in looks if re.fullmatch(LABEL, name, re.IGNORECASE)]
    if named:
        return named[0], _threshold(block, looks[named[0]])
    if binary:
        return binary[0], None
    raise UserError(
        f"{block.file}: no column of zeros and ones, so none looks like a label; name the column to predict "
        f"with --label (it has {', '.join(looks)})"
    )


def _threshold(block: RawBlock, look: Look) -> float:
    """The upper part of a rating counts as positive; of a count that is mostly 0 or 1, all but 0."""
    values = look.numbers
    if values is None or look.distinct < 2:
        there = pc.unique(look.texts.drop_null()).slice(0, 3).to_pylist()
        raise UserError(
            f"{block.file}: column {look.name!r} holds no two numbers ({', '.join(there) or 'empty'}), so it "
            "makes no label; write it as 0 and 1, or name another column with --label"
        )
    known = values[~np.isnan(values)]
    if {0.0, 1.0} <= set(known) and known.min() == 0 and (known <= 1).mean() >= 0.9:
        return 1.0
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return float(np.ceil(low + 0.7 * (high - low)))


def _target(look: Look, at_least: float | None) -> NDArray[np.float64]:
    if at_least is None:
        truth = as_truth(look)
        if truth is not None:
            return truth
    assert look.numbers is not None
    return np.where(np.isnan(look.numbers), np.nan, look.numbers >= (at_least or 0.5))


def _paired(columns: list[ColumnFacts], looks: dict[str, Look]) -> list[ColumnFacts]:
    """Gives sequences the parallel columns that hold their elements' times and actions."""
    result = {column.name: column for column in columns}
    for sequence in [column for column in columns if column.kind == "sequence" and column.role == "feature"]:
        own = looks[sequence.name].lists
        for other in columns:
            theirs = looks[other.name].lists
            free = other.name != sequence.name and result[other.name].role in ("feature", "leak")
            if result[sequence.name].role != "feature" or not free:
                continue
            if own is None or theirs is None or not np.array_equal(own.lengths, theirs.lengths):
                continue
            facts = result[sequence.name]
            if facts.times is None and re.search(r"time|_ts|stamp|date", other.name, re.IGNORECASE):
                result[sequence.name] = replace(facts, times=other.name)
            elif facts.actions is None and re.search(r"action|event|type", other.name, re.IGNORECASE):
                result[sequence.name] = replace(facts, actions=other.name)
            else:
                continue
            result[other.name] = replace(other, role="left out", reason=f"goes with {sequence.name}")
    return list(result.values())


def _one_each(columns: list[ColumnFacts]) -> list[ColumnFacts]:
    """The first column of each of these roles keeps it."""
    seen: set[str] = set()
    result = []
    for column in columns:
        if column.role in ("time", "request", "position", "weight"):
            if column.role in seen:
                column = replace(column, role="left out", reason=f"another {column.role}")
            seen.add(column.role)
        result.append(column)
    return result


def _shared(columns: list[ColumnFacts], looks: dict[str, Look]) -> list[ColumnFacts]:
    """Lets a sequence share the table of the item feature whose ids it holds."""
    items = [c for c in columns if c.role == "feature" and c.kind == "categorical" and c.source == "item"]
    result = []
    for column in columns:
        lists = looks[column.name].lists
        if column.kind == "sequence" and column.role == "feature" and lists is not None and items:
            ids = pc.unique(looks[column.name].elements)
            found = {
                item.name: pc.sum(pc.is_in(ids, looks[item.name].elements)).as_py() or 0 for item in items
            }
            best = max(found, key=lambda name: found[name])
            if found[best] >= len(ids) / 2 and len(ids):
                column = replace(column, share=best)
        result.append(column)
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_yaml(inferred: Inferred, log: str | Path | Sequence[str | Path]) -> str:
    """A config to edit: data and schema with the reasons for each guess, model and training as comments.

    Raises:
        UserError: no column is left for a feature.
    """
    features = [column for column in inferred.columns if column.role == "feature"]
    if not features:
        raise UserError(
            "no column of the log is left for a feature; every one is a label, a key or a likely leak"
        )
    files = [log] if isinstance(log, str | Path) else list(log)
    return "\n".join(
        [
            f"# Guessed from the first {inferred.rows:,} rows. Read it, correct it; then: mldcn fit",
            "",
            *_data_lines(inferred, [str(file) for file in files]),
            "",
            "schema:",
            "  # kind: numeric, bucketised, categorical, multi, embedding or sequence.",
            "  # source: user, item, user_item or context. Serving computes user features once a request.",
            "  features:",
            *(_feature_line(column, inferred) for column in features),
            *_left_out_lines(inferred),
            *_label_lines(inferred),
            *(
                f"  {key}: {_quoted(name)}"
                for key, name in (
                    ("request", inferred.request),
                    ("user", inferred.user),
                    ("time", inferred.time),
                    ("position", inferred.position),
                    ("weight", inferred.weight),
                )
                if name is not None
            ),
            *_weight_lines(inferred),
            "",
            *_defaults("model", ModelConfig()),
            "",
            *_defaults("training", TrainingConfig()),
            "",
        ]
    )


def _data_lines(inferred: Inferred, files: list[str]) -> list[str]:
    data = inferred.data
    lines = ["data:", "  train:", *(f"    - {json.dumps(file, ensure_ascii=False)}" for file in files)]
    if data.format != "auto":
        lines.append(f"  format: {data.format}")
    if data.delimiter is not None:
        lines.append(f"  delimiter: {json.dumps(data.delimiter)}")
    if not data.header:
        names = json.dumps(list(data.column_names), ensure_ascii=False)
        lines += ["  header: false", f"  column_names: {names}"]
    if data.missing != ("",):
        lines.append(f"  missing: {json.dumps(list(data.missing), ensure_ascii=False)}")
    if inferred.time is not None:
        lines.append("  split: {kind: time, valid: 0.1, test: 0.1}  # the newest rows are for testing")
    else:
        lines.append(
            "  split: {kind: hash, valid: 0.1, test: 0.1}  # random; order and files are other kinds"
        )
    return lines


def _feature_line(column: ColumnFacts, inferred: Inferred) -> str:
    parts = [f"kind: {column.kind}", f"name: {_quoted(column.name)}", f"source: {column.source}"]
    if column.kind == "numeric":
        if column.transform != "identity":
            parts.append(f"transform: {column.transform}")
        if column.missing > 0.01:
            parts.append("missing_indicator: true")
    elif column.kind == "embedding":
        parts.append(f"width: {column.width}")
    elif column.share is not None:
        parts.append(f"share: {_quoted(column.share)}")
    elif column.distinct > _MANY_IDS:
        parts.append("encoding: {kind: vocabulary, min_count: 2}")
    if column.delimiter is not None:
        parts.append(f"delimiter: {json.dumps(column.delimiter)}")
    if column.kind in ("multi", "sequence"):
        parts.append(f"max_length: {min(max(column.longest, 1), 64)}")
    if column.actions is not None:
        parts.append(f"actions: {_quoted(column.actions)}")
    if column.times is not None and inferred.time is not None:
        parts.append(f"times: {_quoted(column.times)}")
    return f"    - {{{', '.join(parts)}}}  # {_facts(column)}"


def _left_out_lines(inferred: Inferred) -> list[str]:
    lines: list[str] = []
    if inferred.leaks:
        lines.append(
            "    # These look like leaks: known only after the label. Use one only if you know better."
        )
        for column in inferred.leaks:
            lines.append(f"    # {_feature_line(column, inferred).strip()}")
            lines.append(f"    #   leak? {column.reason}")
    left = [column for column in inferred.columns if column.role == "left out"]
    lines += [f"    # left out: {_one_line(column.name)}: {column.reason}" for column in left]
    return lines


def _label_lines(inferred: Inferred) -> list[str]:
    threshold = "" if inferred.at_least is None else f", at_least: {inferred.at_least:g}"
    note = f"  # not only 0 and 1: {inferred.positives:.1%} of the rows reach this" if threshold else ""
    lines = ["  labels:", f"    - {{name: {_quoted(inferred.label)}{threshold}}}{note}"]
    if inferred.alternatives:
        lines.append("    # Other outcomes; each can be a task of its own:")
        lines += [f"    # - {{name: {_quoted(name)}, weight: 1.0}}" for name in inferred.alternatives]
    return lines


def _weight_lines(inferred: Inferred) -> list[str]:
    if inferred.weight is not None:
        return []
    if any(column.name == "weight" and column.role == "feature" for column in inferred.columns):
        return ["  # weight: weight  # if it holds the rows' weights; take it out of the features then"]
    return ["  # weight: column_of_sample_weights"]


def _facts(column: ColumnFacts) -> str:
    facts = ["vectors" if column.kind == "embedding" else f"{column.distinct:,} distinct"]
    if column.missing:
        facts.append(f"{column.missing:.1%} missing")
    if column.examples:
        facts.append("e.g. " + ", ".join(_one_line(example) for example in column.examples))
    return "; ".join(facts)


def _defaults(name: str, defaults: Strict) -> list[str]:
    text = yaml.safe_dump({name: defaults.model_dump(mode="json")}, sort_keys=False, allow_unicode=True)
    return [
        f"# The defaults of {name}; take off the marks to change them.",
        *(f"# {x}" for x in text.splitlines()),
    ]


def _quoted(name: str) -> str:
    plain = _PLAIN.fullmatch(name) and name.lower() not in _YAML_WORDS
    return name if plain else json.dumps(name, ensure_ascii=False)


def _one_line(text: str) -> str:
    """A text that cannot end its comment."""
    return "".join(c if c.isprintable() else "?" for c in text)
