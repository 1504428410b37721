"""Going on from a finished run on newer data: what is taken over, row by row, and what is refused.

Tables lie stacked in one weight a width, so that a table that grew moves the rows of those behind it: weights
and the optimiser's state are copied table by table. Rows of new ids stay as the new model drew them.

The state that ``training.keep_optimiser`` leaves in a run is that of the step whose weights the run keeps (the
best on validation), not of its last step: moments that belong to other weights would push the wrong way.
Where the kept weights are an average (``training.ema``), the weights that were averaged are kept as well, since
the moments are theirs: training goes on from them, and the average from itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mldcn import interactions
from mldcn.config import Config, ModelConfig, load_config
from mldcn.data.batch import EncodedLayout
from mldcn.data.encoder import Encoder
from mldcn.data.fitting import Statistics
from mldcn.embedding.embedder import table_widths
from mldcn.errors import UserError
from mldcn.files import checksum
from mldcn.model import Ranker, save_tensors
from mldcn.run import RunFolder
from mldcn.schema import Hashing, Label, Schema, TableFeature
from mldcn.training.ema import WeightAverage
from mldcn.training.table_optim import lazy_zeros

OptimiserState = Literal["keep", "restart"]
# Parameter -> where the rows of each of its tables were, and where they are.
Moves = Mapping[str, Sequence[tuple[slice, slice]]]

STATE = "optimiser.safetensors"
_MANIFEST = "manifest.json"
# A label's weight in the loss and its sampling change nothing that a run has learned to read.
_FREE_OF_LABELS = {"weight", "negative_sampling_rate"}
_ROWS = 1 << 18  # copied at a time
_ANEW = "or train without --warm-start"


@dataclass(frozen=True)
class WarmStart:
    """A finished run to go on from.

    Args:
        run: the run; it is only read.
        statistics: ``keep`` its numeric transforms and bucket boundaries, or ``refresh`` them from the new log.
        optimiser: ``keep`` its optimisers' moments and step counts, or ``restart`` them at zero.
    """

    run: RunFolder
    statistics: Statistics = "keep"
    optimiser: OptimiserState = "restart"

    @classmethod
    def open(
        cls, path: str | Path, statistics: Statistics = "keep", optimiser: OptimiserState = "restart"
    ) -> WarmStart:
        """A run's folder, checked.

        Raises:
            UserError: it is no finished run, or is damaged.
        """
        return cls(RunFolder.open(path), statistics, optimiser)

    @classmethod
    def reopen(cls, noted: Mapping[str, Any]) -> WarmStart:
        """What :meth:`note` gave to an interrupted run.

        Raises:
            UserError: the run that it started from is gone, or is another by now.
        """
        try:
            start = cls.open(noted["run"], noted["statistics"], noted["optimiser"])
        except UserError as error:
            raise UserError(f"the run that this one was started from: {error}") from None
        if start.checksum() != noted["crc32"]:
            raise UserError(
                f"{noted['run']}: is not the run any more that this one was started from; put it back, or "
                "train anew"
            )
        return start

    def checksum(self) -> str:
        """Of the run's manifest, which holds those of all its files."""
        return checksum(self.run.path / _MANIFEST)

    def encoder(self) -> Encoder:
        """The run's encoder, whose vocabularies the new one's extend."""
        return Encoder.load(self.run.encoder)

    def adapt(self, config: Config) -> Config:
        """The config with the run's widths where it says ``auto``; refused where it cannot go on from the run.

        Raises:
            UserError: another schema or model than the run's, or there is no optimiser state to keep.
        """
        old = load_config(self.run.config)
        self._refuse(_schema_difference(config.log_schema, old.log_schema))
        had = table_widths(self._layout(), old.log_schema, old.model.embedding)
        asked = _dims(config)
        # A table that grew would get another width from "auto".
        auto = {name: had[name] for name, dim in asked.items() if dim == "auto"}
        theirs = {name: had[name] for name in asked}
        self._refuse(_model_difference(config.model, {**asked, **auto}, old.model, theirs))
        if self.optimiser == "keep":
            self._check_state(config, old)
        embedding = config.model.embedding.model_copy(
            update={"dims": {**config.model.embedding.dims, **auto}}
        )
        return config.model_copy(update={"model": config.model.model_copy(update={"embedding": embedding})})

    def note(self) -> dict[str, Any]:
        """What a run started from this notes, so that :meth:`reopen` finds it again."""
        return {
            "run": str(self.run.path.resolve()),
            "crc32": self.checksum(),
            "statistics": self.statistics,
            "optimiser": self.optimiser,
        }

    def describe(self, layout: EncodedLayout) -> dict[str, Any]:
        """:meth:`note`, and how the tables grew."""
        had = self._layout().tables
        grown = {name: {"had": had[name], "has": rows} for name, rows in layout.tables.items()}
        return {**self.note(), "tables": grown}

    def load_weights(self, model: Ranker) -> None:
        """Gives a new model the run's weights; rows of new ids stay as they are.

        Raises:
            UserError: the weights do not fit the model.
        """
        with _reading(self.run.weights) as file:
            _copy(file, "", model.state_dict(), self._moves(model))

    @torch.no_grad()
    def load_state(
        self, model: Ranker, optimisers: Sequence[torch.optim.Optimizer], average: WeightAverage | None
    ) -> None:
        """Gives optimisers (and an average) that were built for the new model the run's state, if it is kept.

        Raises:
            UserError: the state does not fit the model.
        """
        if self.optimiser == "restart":
            return
        moves = self._moves(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        with _reading(self.run.path / STATE) as file:
            for optimiser in optimisers:
                parameters = [p for group in optimiser.param_groups for p in group["params"]]
                state = {
                    i: found
                    for i, parameter in enumerate(parameters)
                    if (found := _row_state(file, names[id(parameter)], parameter, moves))
                }
                optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
            if average is not None and "average/step" in file.keys():  # noqa: SIM118 (a file is no mapping)
                average.step = int(file.get_tensor("average/step"))
                _copy(file, "raw/", dict(model.named_parameters()), moves)

    def _moves(self, model: Ranker) -> Moves:
        config = load_config(self.run.config)
        with torch.device("meta"):  # nothing is allocated
            before = Ranker(config.model, config.log_schema, self._layout())
        after = model.spans()
        return {
            name: [
                (rows, slice(after[name][table].start, after[name][table].start + rows.stop - rows.start))
                for table, rows in tables.items()
            ]
            for name, tables in before.spans().items()
        }

    def _layout(self) -> EncodedLayout:
        return EncodedLayout.from_json(self.run.read_json("layout.json"))

    def _check_state(self, config: Config, old: Config) -> None:
        if not (self.run.path / STATE).is_file():
            raise UserError(
                f"{self.run.path}: kept no optimiser state ({STATE}); use --optimiser restart, or train it "
                "again with training.keep_optimiser: true"
            )
        mine, theirs = config.training.optimiser.table, old.training.optimiser.table
        if mine != theirs:
            self._refuse(
                f"training.optimiser.table is {mine} here and {theirs} there, whose state is another; use "
                "--optimiser restart"
            )

    def _refuse(self, difference: str | None) -> None:
        if difference is not None:
            raise UserError(f"{self.run.path}: cannot go on from this run: {difference}")


def save_state(
    path: Path, model: Ranker, optimisers: Sequence[torch.optim.Optimizer], average: WeightAverage | None
) -> None:
    """Writes what :meth:`WarmStart.load_state` reads: the optimisers' state by parameter, atomically.

    With LazyAdam it is twice the size of the weights, with row-wise Adagrad one number a row and twice the
    dense weights; with an average, the size of the weights more.

    Args:
        path: the file.
        model: holds the weights that the optimisers move, not their average.
        optimisers: all of the model's.
        average: the weights' average, where there is one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"state/{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for optimiser in optimisers
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
    }
    if average is not None:
        tensors |= {f"raw/{name}": parameter for name, parameter in model.named_parameters()}
        tensors["average/step"] = torch.tensor(average.step)
    save_tensors(tensors, path)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one, so that no second copy of the model is held."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the run, {_ANEW}") from None


@torch.no_grad()
def _copy(file: Any, prefix: str, targets: Mapping[str, Tensor], moves: Moves) -> None:
    """Fills tensors from those of a file, tables row by row.

    Raises:
        UserError: one is not there, or has another shape.
    """
    known = set(file.keys())
    for name, target in targets.items():
        if f"{prefix}{name}" not in known:
            raise UserError(f"the run to start from has no weights {name!r}; {_ANEW}")
        saved = file.get_slice(f"{prefix}{name}")
        if name in moves:
            _move(saved, target, moves[name])
            continue
        if tuple(saved.get_shape()) != tuple(target.shape):
            raise UserError(
                f"weights {name!r} are of shape {tuple(saved.get_shape())} in the run to start from and "
                f"{tuple(target.shape)} here; {_ANEW}"
            )
        target.copy_(file.get_tensor(f"{prefix}{name}"))


def _move(saved: Any, target: Tensor, moves: Sequence[tuple[slice, slice]]) -> None:
    for old, new in moves:
        for first in range(old.start, old.stop, _ROWS):
            last = min(first + _ROWS, old.stop)
            target[new][first - old.start : last - old.start].copy_(saved[first:last])


def _row_state(file: Any, name: str, parameter: Tensor, moves: Moves) -> dict[str, Tensor]:
    """A parameter's state: what has an entry a row goes where the row went, all else is taken as it is."""
    rows = max((old.stop for old, _ in moves.get(name, ())), default=None)
    state: dict[str, Tensor] = {}
    prefix = f"state/{name}/"
    for key in file.keys():  # noqa: SIM118 (a file is no mapping)
        if not key.startswith(prefix):
            continue
        saved = file.get_slice(key)
        shape = tuple(saved.get_shape())
        if rows is not None and shape[:1] == (rows,):
            value = lazy_zeros((len(parameter), *shape[1:]), parameter)
            _move(saved, value, moves[name])
        else:
            value = file.get_tensor(key)
        state[key.removeprefix(prefix)] = value
    return state


def _dims(config: Config) -> dict[str, int | Literal["auto"]]:
    """The width that a config asks for, of each feature with a table of its own."""
    embedding = config.model.embedding
    owners = [f.name for f in config.log_schema.features if isinstance(f, TableFeature) and f.share is None]
    return {name: embedding.dims.get(name, embedding.dim) for name in owners}


def _schema_difference(new: Schema, old: Schema) -> str | None:
    """Why a model of one schema cannot read another, or None."""
    mine, theirs = ({f.name: f for f in schema.features} for schema in (new, old))
    for name in mine:
        if name not in theirs:
            return f"feature {name!r} is none of its features; leave it out, {_ANEW}"
    for name in theirs:
        if name not in mine:
            return f"its feature {name!r} is missing from the schema; put it back, {_ANEW}"
    if list(mine) != list(theirs):
        return f"its features stand in another order: {', '.join(theirs)}"
    for name, feature in mine.items():
        one, other = _plain_feature(feature), _plain_feature(theirs[name])
        if (difference := _difference(one, other)) is not None:
            key, here, there = difference
            hashed = " (a hashed table cannot grow)" if key == "encoding.rows" else ""
            return (
                f"feature {name!r}: {key} is {here!r} here and {there!r} there{hashed}; set it back, {_ANEW}"
            )
    if new.tasks != old.tasks:
        return f"its tasks are {', '.join(old.tasks)}, not {', '.join(new.tasks)}"
    for label, known in zip(new.labels, old.labels, strict=True):
        if (difference := _difference(_plain_label(label), _plain_label(known))) is not None:
            key, here, there = difference
            return f"label {label.name!r}: {key} is {here!r} here and {there!r} there"
    positions = [s.max_position if s.position is not None else 0 for s in (new, old)]
    if positions[0] != positions[1]:
        return f"its positions go to {positions[1]}, here to {positions[0]} (schema.position, max_position)"
    return None


def _plain_feature(feature: Any) -> dict[str, Any]:
    """A feature without what is free to change: how rare or how many its ids may be."""
    raw: dict[str, Any] = feature.model_dump(mode="json")
    if isinstance(feature, TableFeature) and not isinstance(feature.encoding, Hashing):
        raw["encoding"] = {"kind": "vocabulary"}
    return raw


def _plain_label(label: Label) -> dict[str, Any]:
    return label.model_dump(mode="json", exclude=_FREE_OF_LABELS)


def _model_difference(
    new: ModelConfig, dims: Mapping[str, Any], old: ModelConfig, old_dims: Mapping[str, Any]
) -> str | None:
    """The first key in which two models differ, or None; widths of tables are given apart."""
    plain = []
    for model, widths in ((new, dims), (old, old_dims)):
        raw = model.model_dump(mode="json")
        raw["interaction"] = interactions.parse(model.interaction).model_dump(mode="json")
        raw["embedding"] = {**raw["embedding"], "dim": None, "dims": dict(widths)}
        plain.append(raw)
    difference = _difference(*plain)
    if difference is None:
        return None
    key, here, there = difference
    return f"model.{key} is {here!r} here and {there!r} there; set it back, {_ANEW}"


def _difference(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key, dotted, in which two nested mappings differ, and both values."""
    for key in dict.fromkeys([*new, *old]):
        here, there = new.get(key), old.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            if (inner := _difference(here, there)) is not None:
                return f"{key}.{inner[0]}", *inner[1:]
        elif here != there:
            return key, here, there
    return None
