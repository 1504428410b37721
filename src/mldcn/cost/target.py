"""What the command line asks the cost of: an architecture's name, a config, or a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mldcn import interactions
from mldcn.config import ModelConfig, TrainingConfig, load_config, override, parse, read_yaml
from mldcn.cost.budget import meet_budget, scorer_flops, scorer_parameters, x0_layout
from mldcn.cost.latency import LatencyMeter
from mldcn.cost.memory import Trainer, Training
from mldcn.cost.sample import PLAIN_FIELDS, PLAIN_ROWS, log_layout, parse_tables, plain_schema
from mldcn.cost.solver import Found
from mldcn.data.batch import EncodedLayout
from mldcn.errors import UserError
from mldcn.layout import FieldLayout
from mldcn.run import RunFolder
from mldcn.schema import Schema

LATENCY_TOLERANCE = 0.05
LATENCY_ATTEMPTS = 3


@dataclass(frozen=True)
class Target:
    """A model on a log.

    assumed: the tables whose size is a guess, ``rows`` of them each.
    """

    model: ModelConfig
    training: TrainingConfig
    schema: Schema
    layout: EncodedLayout
    assumed: tuple[str, ...] = ()
    rows: int = PLAIN_ROWS

    def x0(self) -> FieldLayout:
        """The fields of the model's ``x0``."""
        return x0_layout(self.model, self.schema, self.layout)

    def under(self, trainer: Trainer, device: str = "cpu") -> Training:
        """The model in training, its memory to be found."""
        size = self.training.batch_size
        return Training(self.model, self.schema, self.layout, size, trainer, device)


def load_target(
    model: str,
    settings: Sequence[str] = (),
    schema: Path | None = None,
    *,
    fields: int = PLAIN_FIELDS,
    width: int | None = None,
    rows: int = PLAIN_ROWS,
) -> Target:
    """Reads what is asked for.

    Args:
        model: an architecture's name, a config's file or a run's folder.
        settings: ``key.path=value`` of the config; ``model.`` may be left out.
        schema: a file with a ``schema``, as a config has it, or ``tables`` with the rows of each table, or both.
        fields: categorical features of the plain log that stands in where there is no schema.
        width: of each table; ``embedding.dim``.
        rows: of tables whose size nothing tells.

    Raises:
        UserError: there is no such model, or a file says something wrong.
    """
    parts = tuple(ModelConfig.model_fields)
    changes = [f"model.{each}" if each.split(".")[0] in parts else each for each in settings]
    if width is not None:
        changes.insert(0, f"model.embedding.dim={width}")
    path = Path(model)
    if path.is_dir():
        run = RunFolder.open(path)
        config = load_config(run.config, changes)
        layout = EncodedLayout.from_json(run.read_json("layout.json"))
        return Target(config.model, config.training, config.log_schema, layout)
    if path.suffix in (".yaml", ".yml"):
        config = load_config(path, changes)
        built, training, known = config.model, config.training, config.log_schema
    else:
        interactions.info(model)
        raw = {"model": {"interaction": {"name": model}}, "training": {}}
        for change in changes:
            override(raw, change)
        if extra := set(raw) - {"model", "training"}:
            raise UserError(
                f"--set {extra.pop()}: only model and training keys change an architecture's cost"
            )
        built = parse(ModelConfig, raw["model"], "model")
        training = parse(TrainingConfig, raw["training"], "training")
        known = plain_schema(fields)
    tables = {}
    if schema is not None:
        given = read_yaml(schema)
        if not {"schema", "tables"} & set(given):
            raise UserError(f"{schema}: needs a schema (as a config has it), tables with their rows, or both")
        if "schema" in given:
            known = parse(Schema, given["schema"], f"{schema}: schema")
        tables = parse_tables(given.get("tables", {}), str(schema))
    layout, assumed = log_layout(known, tables, rows)
    return Target(built, training, known, layout, assumed, rows)


def meet(target: Target, budget: str, *, device: str = "cpu") -> Target:
    """The target with its widths turned until it meets a budget.

    Args:
        target: the model to turn.
        budget: ``flops=2e6`` or ``parameters=1e6`` behind the embeddings, or ``latency=0.5`` (or
            ``latency@256=0.5``): milliseconds to score one row, or 256.
        device: where a latency is measured.

    Raises:
        UserError: it is no budget, or no width meets it.
    """
    unit, _, number = budget.partition("=")
    unit, _, rows = unit.partition("@")
    try:
        amount, batch = float(number), int(rows or 1)
    except ValueError:
        amount, batch = 0.0, 0
    if unit not in ("flops", "parameters", "latency") or amount <= 0 or batch < 1:
        raise UserError(f"--budget {budget}: expected flops=2e6, parameters=1e6 or latency@256=0.5 (in ms)")
    layout, tasks = target.x0(), target.layout.tasks
    if unit == "latency":
        found = _meet_latency(target, layout, amount, batch, device)
    elif unit == "parameters":
        found = meet_budget(
            target.model,
            layout,
            lambda each: scorer_parameters(each, layout, tasks),
            amount,
            what="parameters",
        )
    else:
        found = meet_budget(target.model, layout, lambda each: scorer_flops(each, layout, tasks), amount)
    return replace(target, model=found.subject)


def _meet_latency(
    target: Target, layout: FieldLayout, milliseconds: float, batch: int, device: str
) -> Found[ModelConfig]:
    """Searches anew with longer measurements where noise may have misled the search."""
    meter = LatencyMeter(target.schema, target.layout, batch, device=device)
    refusal = ""
    for _ in range(LATENCY_ATTEMPTS):
        try:
            return meet_budget(
                target.model,
                layout,
                lambda each: 1e3 * meter(each),
                milliseconds,
                tolerance=LATENCY_TOLERANCE,
                close=0.02,
                what="ms",
            )
        except UserError as error:
            refusal = str(error)
            meter.seconds *= 2
    raise UserError(f"{refusal}. Or measure on a machine that does nothing else")


def parse_sizes(text: str) -> tuple[int, ...]:
    """Batch sizes from a list with commas.

    Raises:
        UserError: it is something else.
    """
    try:
        sizes = tuple(int(each) for each in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch-sizes {text}: expected numbers of rows by commas, 1,64,4096 for example")
    return sizes
