"""The typed config tree: one YAML file holds a log's schema, the model and its training.

``load_config`` refuses an unknown key or a wrong type with the file, the key and the nearest known name.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mldcn.errors import UserError
from mldcn.schema import Schema, Strict

Model = TypeVar("Model", bound=BaseModel)


class FilesSplit(Strict):
    """Train, validation and test rows lie in files of their own (``data.train``, ``valid``, ``test``)."""

    kind: Literal["files"] = "files"


class TimeSplit(Strict):
    """The newest ``test`` share of the rows by the schema's time, the ``valid`` share before it, the rest."""

    kind: Literal["time"]
    valid: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)


class HashSplit(Strict):
    """Random by a keyed hash of one or more columns: the same rows on every run and machine.

    Without ``columns`` the row's number in the log is hashed. Rows that agree in the columns fall together.
    """

    kind: Literal["hash"]
    columns: tuple[str, ...] = ()
    seed: int = 0
    valid: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)


class ColumnSplit(Strict):
    """A column of the log says it: its values name the split; rows with another value are left out."""

    kind: Literal["column"]
    column: str
    train: str = "train"
    valid: str = "val"
    test: str = "test"


class OrderSplit(Strict):
    """By place in the log: the last ``test`` share of the rows, the ``valid`` share before it, the rest."""

    kind: Literal["order"]
    valid: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)


Split = Annotated[FilesSplit | TimeSplit | HashSplit | ColumnSplit | OrderSplit, Field(discriminator="kind")]


class DataConfig(Strict):
    """Where the log is and how it is cut."""

    train: tuple[str, ...] = Field((), description="files of the log (all of it unless split.kind is files)")
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    format: Literal["auto", "csv", "tsv", "parquet"] = "auto"
    header: bool = Field(True, description="whether the first line of a text log names its columns")
    column_names: tuple[str, ...] = Field((), description="the columns of a text log without a header")
    delimiter: str | None = Field(
        None, description="one character between the columns of a text log; a comma in .csv, a tab in .tsv"
    )
    missing: tuple[str, ...] = Field(("",), description="texts that mean a missing value")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="at a bad row: stop, or leave it out, count it and write it to a rejects file"
    )
    split: Split = HashSplit(kind="hash")
    encoded: str | None = Field(None, description="folder for the encoded rows; the run's own by default")
    block_rows: int = Field(65_536, ge=1, description="rows encoded and shuffled together")
    memory_mb: int = Field(
        2_048, ge=256, description="what encoding may hold in memory; the result does not depend on it"
    )

    @model_validator(mode="after")
    def _names_without_header(self) -> DataConfig:
        if self.column_names and self.header:
            raise ValueError("column_names go with header: false")
        return self

    @field_validator("delimiter")
    @classmethod
    def _delimits(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 1 or not value.isascii() or value in '"\r\n\0'):
            raise ValueError("delimiter must be one ASCII character, and no quote or line end")
        return value


class EmbeddingConfig(Strict):
    """How ids become vectors, and what is done to ``x0``."""

    dim: int | Literal["auto"] = Field(16, description="of every table; auto is 6 * rows ** 0.25")
    dims: dict[str, int | Literal["auto"]] = Field({}, description="of single tables, by feature name")
    init_std: float = Field(0.05, gt=0)
    normalise: Literal["none", "l2", "layer", "batch"] = Field(
        "none", description="of x0: each field to L2 norm 1, or one LayerNorm or BatchNorm at the entry"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on x0")


class DeepConfig(Strict):
    """The MLP behind (stacked) or beside (parallel) the interaction."""

    hidden: tuple[int, ...] = (64,)
    structure: Literal["stacked", "parallel"] = "stacked"
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = False


class HeadConfig(Strict):
    """One head a task: an MLP of these widths (none: linear) on the shared part."""

    hidden: tuple[int, ...] = ()


class ModelConfig(Strict):
    """The ranking model. ``interaction`` holds ``name`` and that architecture's own options."""

    embedding: EmbeddingConfig = EmbeddingConfig()
    interaction: dict[str, Any] = Field({"name": "mldcn"})
    deep: DeepConfig = DeepConfig()
    heads: HeadConfig = HeadConfig()

    @field_validator("interaction")
    @classmethod
    def _named(cls, interaction: dict[str, Any]) -> dict[str, Any]:
        return {"name": "mldcn", **interaction}


class OptimiserConfig(Strict):
    """Dense parameters and tables have an optimiser each."""

    dense: Literal["adam", "adamw"] = "adam"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    table: Literal["lazy_adam", "rowwise_adagrad"] = "lazy_adam"
    table_lr: float | None = Field(None, gt=0, description="of the tables; lr by default")
    table_l2: float = Field(0.0, ge=0, description="L2 on the rows that a batch touched")
    clip_norm: float | None = Field(10.0, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    final_lr: float = Field(0.0, ge=0, le=1, description="of a decaying schedule, as a share of lr")


class RecoveryConfig(Strict):
    """What is done where the loss is not finite, or a spike: back to a checkpoint, slower, past that batch."""

    tries: int = Field(3, ge=0, description="roll-backs before a run gives up; 0 gives up at once")
    lr_factor: float = Field(0.3, gt=0, le=1, description="of the learning rate, at each roll-back")
    spike: float | None = Field(
        20.0, gt=1, description="times the median of recent losses, and times log 2, that a loss must exceed"
    )


class PruningConfig(Strict):
    """DeepLight's pruning by magnitude: k steps after the warm-up, a share s (1 - 0.99^(k / span)) is zero.

    The best weights are chosen among those with 95 % of s; before these, and without them, the last are kept.
    """

    sparsity: float = Field(0.9, gt=0, lt=1, description="s, that the share of zeros grows to")
    warmup_epochs: int = Field(2, ge=0, description="epochs before the first weight is pruned")
    every: int = Field(
        10, ge=1, description="steps from one pruning to the next; between them weights regrow"
    )
    span: float = Field(
        100.0, gt=0, description="100 as published: half of s after 6,900 steps; less for a shorter run"
    )
    dense: float = Field(
        1.0, ge=0, le=1, description="times s: of each matrix of interaction, deep part, towers"
    )
    field_pairs: float = Field(1.0, ge=0, le=1, description="times s: of the weights R of field pairs (FwFM)")
    embedding: float = Field(0.444, ge=0, le=1, description="times s: of all tables of x0 together")


class TrainingConfig(Strict):
    """The training loop."""

    seed: int = 0
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    threads: int | None = Field(None, ge=1)
    batch_size: int = Field(2048, ge=1)
    eval_batch_size: int = Field(8192, ge=1)
    epochs: int = Field(10, ge=1)
    optimiser: OptimiserConfig = OptimiserConfig()
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the weights' average, 0.9999 in DCN V2")
    monitor: str = Field("auc", description="validation metric for early stopping: a name, or task/name")
    patience: int = Field(2, ge=1, description="evaluations without a gain before stopping")
    min_delta: float = Field(0.0, ge=0)
    eval_steps: int | None = Field(
        None, ge=1, description="evaluate every so many steps; each epoch by default"
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="write a checkpoint every so many steps, beside those at evaluations"
    )
    checkpoint_minutes: float = Field(10.0, gt=0, description="at most this long without a checkpoint")
    keep_checkpoints: int = Field(2, ge=1)
    keep_optimiser: bool = Field(
        False, description="keep the optimisers' state in the run, for fit --warm-start --optimiser keep"
    )
    recovery: RecoveryConfig = RecoveryConfig()
    pruning: PruningConfig | None = None
    amp: Literal["off", "bf16"] = "off"
    compile: bool = False
    tensorboard: bool = False
    mlflow: bool = False


class EvaluationConfig(Strict):
    """What is measured on validation and test rows."""

    hit_at: tuple[int, ...] = (3,)
    calibration: Literal["none", "platt", "isotonic"] = Field("none", description="fitted on validation rows")
    calibration_bins: int = Field(20, ge=2)


class Config(Strict):
    """Everything that makes a run."""

    data: DataConfig = DataConfig()
    log_schema: Schema = Field(..., alias="schema")
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a config file. ``overrides`` are ``key.path=value`` with YAML values.

    Raises:
        UserError: the file is unreadable or says something that no config says.
    """
    raw = read_yaml(path)
    for each in overrides:
        override(raw, each)
    return parse(Config, raw, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: there is no such file, or it holds no mapping.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {_not_yaml(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of keys; 'mldcn init LOG' writes a config for a log")
    return raw


def _not_yaml(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What a parser of YAML found and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"not YAML ({' '.join(str(error).split())}); 'mldcn init LOG' writes a config for a log"
    mark, begun = error.problem_mark, error.context_mark
    where = f", {error.context} that begins in line {begun.line + 1}" if begun and error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: not YAML: {error.problem}{where}"


def dump_config(config: Config) -> str:
    """The config as YAML, every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def parse(model: type[Model], raw: Any, where: str) -> Model:
    """Builds a strict model from plain data.

    Raises:
        UserError: names ``where``, the key and the nearest known name or the expected type.
    """
    try:
        return model.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        # A list whose items are wrong is also reported as too short: only the items' errors say something.
        items = [e for e in error.errors(include_url=False) if e["type"] != "too_short" or not e["input"]]
        lines = [_explain(model, raw, item) for item in items]
        raise UserError("\n".join(f"{where}: {line}" for line in lines)) from None


def override(raw: dict[str, Any], change: str) -> None:
    """Changes a tree of plain data as ``key.path=value`` says, whose value is YAML.

    Raises:
        UserError: it says something else, or there is a value where the path needs keys.
    """
    path, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"--set {change}: expected key.path=value")
    *parents, last = path.split(".")
    node = raw
    for key in parents:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {change}: {key!r} holds no keys")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {change}: not a YAML value ({' '.join(str(error).split())})") from None


def _explain(model: type[BaseModel], raw: Any, item: Any) -> str:
    loc: tuple[int | str, ...] = item["loc"]
    shown, known = _walk(model, raw, loc)
    if item["type"] == "extra_forbidden":
        return f"{shown}: no such key{suggest(str(loc[-1]), known)}"
    if item["type"] == "missing":
        return f"{shown}: missing"
    if item["type"] == "union_tag_invalid":
        found = item["ctx"]
        return f"{shown}.kind: no kind is called {found['tag']!r}; known: {found['expected_tags']}"
    if item["type"] == "union_tag_not_found":
        return f"{shown}.kind: missing"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    if isinstance(value, str | int | float | bool) or value is None:
        return f"{shown}: {message} (found {value!r})"
    return f"{shown}: {message}" if shown else message


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """``; did you mean X?``, or the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _walk(model: Any, raw: Any, loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The dotted key of an error, without pydantic's union tags, and the keys known where it is.

    An item of a list that has a name is shown with it.
    """
    shown: list[str] = []
    here: list[Any] = [model]
    known: list[str] = []
    for part in loc:
        models = [m for m in _models(here) if isinstance(m, type) and issubclass(m, BaseModel)]
        tagged = [m for m in models if _tag(m) == part]
        if tagged:
            here = list(tagged)
            continue
        if isinstance(part, int):
            raw = raw[part] if isinstance(raw, list) and part < len(raw) else None
            name = raw.get("name") if isinstance(raw, dict) else None
            shown.append(f"{part} ({name})" if isinstance(name, str) else str(part))
            here = [arg for t in here for arg in _arguments(t)]
            continue
        shown.append(part)
        raw = raw.get(part) if isinstance(raw, dict) else None
        fields = {(f.alias or name): f for m in models for name, f in m.model_fields.items()}
        known = list(fields)
        here = [fields[part].annotation] if part in fields else []
    return ".".join(shown), known


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    arguments = typing.get_args(field.annotation) if field else ()
    return str(arguments[0]) if arguments else None


def _arguments(annotation: Any) -> list[Any]:
    return [a for a in typing.get_args(annotation) if a is not Ellipsis]


def _models(annotations: list[Any]) -> list[Any]:
    found: list[Any] = []
    for annotation in annotations:
        origin = typing.get_origin(annotation)
        if origin is Annotated:
            found += _models([typing.get_args(annotation)[0]])
        elif origin in (typing.Union, types.UnionType):
            found += _models(list(typing.get_args(annotation)))
        else:
            found.append(annotation)
    return found
