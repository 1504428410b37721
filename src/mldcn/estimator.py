"""``CTRModel``: the whole pipeline as a scikit-learn-like estimator on Polars, pandas and Arrow tables."""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from mldcn.config import Config, dump_config, parse
from mldcn.data.prepare import prepare
from mldcn.errors import UserError
from mldcn.files import scratch
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.schema import Schema


class CTRModel(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A ranking model trained on a table of impressions.

    >>> import polars as pl
    >>> log = pl.DataFrame({"ad": ["a", "b"] * 500, "hour": list(range(10)) * 100, "click": [1, 0] * 500})
    >>> model = CTRModel(label="click", training={"epochs": 2}).fit(log)
    >>> model.predict_proba(log.head(3)).shape
    (3, 2)

    Args:
        interaction: an architecture's name, or a mapping of its name and options.
        label: the label's column; inferred when not given. Not with ``schema``.
        schema: what the columns mean (a :class:`mldcn.schema.Schema` or plain data); inferred when not given.
        model: other parts of the config's ``model``: embedding, deep, heads.
        training: parts of the config's ``training``: epochs, batch_size, optimiser ...
        valid: share of the rows held out for early stopping.
        seed: of the initialisation, the shuffling and the hold-out.
        verbose: show progress.
    """

    def __init__(
        self,
        interaction: str | Mapping[str, Any] = "mldcn",
        *,
        label: str | None = None,
        schema: Schema | Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        valid: float = 0.1,
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        self.interaction = interaction
        self.label = label
        self.schema = schema
        self.model = model
        self.training = training
        self.valid = valid
        self.seed = seed
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, *, warm_start: str | Path | None = None) -> CTRModel:
        """Trains on a table.

        To go on with an earlier model on newer rows: ``CTRModel.load(run).fit(rows, warm_start=run)``.

        Args:
            X: a Polars or pandas frame or an Arrow table, with the label columns unless ``y`` is given.
            y: the label of each row, in place of the column of the (first) label.
            warm_start: a run's folder whose weights and vocabularies to begin with; schema and model must agree.

        Raises:
            UserError: the table or the options say something that cannot be.
        """
        from mldcn.training.fit import fit
        from mldcn.training.warm_start import WarmStart

        start = WarmStart.open(warm_start) if warm_start is not None else None
        table = as_arrow(X)
        if y is not None:
            name = self._label_column()
            if name in table.column_names:
                raise UserError(f"the table has a column {name!r} already; drop it, or leave y out")
            table = table.append_column(name, pa.array(np.asarray(y)))
        stack = contextlib.ExitStack()
        home = stack.enter_context(scratch("model"))
        log = home / "log.parquet"
        pyarrow.parquet.write_table(table, log)
        config = self._config(table, log, y is not None)
        if start is not None:
            config = start.adapt(config)
        observers = []
        progress = None
        if self.verbose:
            from mldcn.console import EncodingProgress, FitProgress
            from mldcn.training.identity import monitored

            progress = EncodingProgress()
            observers = [FitProgress(monitored(config))]
        base = start.encoder() if start is not None else None
        data = prepare(config, home / "encoded", progress, base=base)
        if progress is not None:
            progress.close()
        run = RunFolder.create(home / "run", dump_config(config))
        self.summary_ = fit(config, run, data, warm_start=start, observers=observers)
        log.unlink()
        shutil.rmtree(home / "encoded")
        trained = self._adopt(Predictor.load(run.path))
        weakref.finalize(trained.predictor_, stack.close)  # the folder goes with the model that reads it
        return trained

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities ``(n, 2)`` of the first task's label being 0 and 1."""
        positive = self.predict_tasks(X)[:, 0].astype(np.float64)
        return np.stack([1.0 - positive, positive], axis=1)

    def predict_tasks(self, X: Any) -> NDArray[np.float32]:
        """Probabilities ``(n, T)`` of every task, in the order of ``tasks_``."""
        if not hasattr(self, "predictor_"):
            raise UserError("this CTRModel is not trained yet: call fit, or CTRModel.load(run)")
        return self.predictor_.predict_table(as_arrow(X))

    def predict(self, X: Any) -> NDArray[np.int64]:
        """1 where the first task's probability is at least one half."""
        return (self.predict_proba(X)[:, 1] >= 0.5).astype(np.int64)

    def save(self, path: str | Path) -> None:
        """Writes the run's folder: what ``mldcn fit`` writes, for ``mldcn predict`` and :meth:`load`.

        Raises:
            UserError: something is there already.
        """
        if not hasattr(self, "predictor_"):
            raise UserError("this CTRModel is not trained yet: call fit first")
        target = Path(path)
        if target.exists():
            raise UserError(f"{target}: exists already; name another folder")
        shutil.copytree(self.predictor_.run.path, target)

    @classmethod
    def load(cls, path: str | Path) -> CTRModel:
        """An estimator from a run's folder, written by :meth:`save` or by ``mldcn fit``."""
        predictor = Predictor.load(path)
        config = predictor.config
        estimator = cls(
            dict(config.model.interaction),
            schema=config.log_schema,
            model=config.model.model_dump(exclude={"interaction"}),
            training=config.training.model_dump(exclude={"seed"}),
            seed=config.training.seed,
        )
        return estimator._adopt(predictor)

    def _adopt(self, predictor: Predictor) -> CTRModel:
        self.predictor_ = predictor
        self.tasks_ = predictor.tasks
        self.classes_ = np.array([0, 1])
        return self

    def _label_column(self) -> str:
        if self.schema is None:
            return self.label or "label"
        return parse(Schema, _plain(self.schema), "CTRModel: schema").labels[0].log_column

    def _config(self, table: pa.Table, log: Path, labels_given: bool) -> Config:
        if self.schema is None:
            from mldcn.data.inference import infer, to_yaml

            label = self.label or ("label" if labels_given else None)
            schema: Any = yaml.safe_load(to_yaml(infer(table, label=label), log))["schema"]
        else:
            schema = _plain(self.schema)
        interaction = {"name": self.interaction} if isinstance(self.interaction, str) else self.interaction
        raw = {
            "data": {"train": [str(log)], "split": {"kind": "hash", "valid": self.valid, "test": 0.0}},
            "schema": schema,
            "model": {**(self.model or {}), "interaction": dict(interaction)},
            "training": {**(self.training or {}), "seed": self.seed},
        }
        return parse(Config, raw, "CTRModel")


def _plain(schema: Schema | Mapping[str, Any]) -> dict[str, Any]:
    return schema.model_dump(mode="json") if isinstance(schema, Schema) else dict(schema)


def as_arrow(table: Any) -> pa.Table:
    """A Polars or pandas frame, or an Arrow table, as an Arrow table.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(table, pa.Table):
        return table
    if hasattr(table, "collect_schema") and hasattr(table, "collect"):
        table = table.collect()
    if hasattr(table, "to_arrow"):
        return table.to_arrow()
    if type(table).__module__.startswith("pandas"):
        return pa.Table.from_pandas(table, preserve_index=False)
    raise UserError(f"expected a Polars or pandas frame or an Arrow table, found {type(table).__name__}")
