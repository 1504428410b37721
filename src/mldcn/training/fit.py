"""The training loop: plain, complete, in one file."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mldcn import __version__, interactions
from mldcn.config import Config, dump_config
from mldcn.data.batch import Batch
from mldcn.data.pipeline import ahead
from mldcn.data.prepare import EncodedData
from mldcn.data.shards import EncodedRows
from mldcn.errors import UserError
from mldcn.metrics import metric_info
from mldcn.model import Ranker, load_weights, pick_device, save_weights
from mldcn.run import RunFolder, write_text
from mldcn.training.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from mldcn.training.ema import WeightAverage
from mldcn.training.evaluate import Evaluation, evaluate, fit_calibrators
from mldcn.training.interrupt import Interrupted, stop_signals
from mldcn.training.loss import task_loss
from mldcn.training.observers import Metrics, MLflow, Observer, Progress, TensorBoard
from mldcn.training.optimisers import build_optimisers
from mldcn.training.schedule import lr_factor
from mldcn.training.table_optim import clip_grad_norm, coalesced
from mldcn.training.warm_start import STATE, WarmStart, save_state

REPORT_STEPS = 20  # the loss is read back, checked and shown this often


@dataclass
class Position:
    """How far a run has come; a checkpoint holds it."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of the current epoch that were trained on
    best: float | None = None
    best_step: int = -1  # -1: no weights are kept yet
    stale: int = 0  # evaluations since the best one
    seconds: float = 0.0  # spent training, evaluation apart


@dataclass(frozen=True)
class Summary:
    """What a finished run came to. ``metrics``: split -> task -> metric -> value."""

    metrics: dict[str, Metrics]
    best_step: int
    steps: int
    seconds: float
    rows_per_second: float
    flops: dict[str, int]
    parameters: dict[str, int]


def fit(
    config: Config,
    run: RunFolder,
    data: EncodedData,
    *,
    resume: bool = False,
    warm_start: WarmStart | None = None,
    observers: Sequence[Observer] = (),
) -> Summary:
    """Trains a model on encoded rows and leaves a finished run in its folder.

    The weights of the best validation metric are kept, not the last ones. With the same seed, data, machine
    and number of threads, two runs end with the same weights bit for bit, and so does a run that was resumed.

    Args:
        config: the whole config.
        run: a new folder, or one that an interrupted run left.
        data: the encoded rows.
        resume: go on from the newest checkpoint, if there is one.
        warm_start: the run to begin with, whose encoder ``data`` was encoded from. Its weights are measured
            before the first step, and are kept where no step betters them.
        observers: told of the progress.

    Raises:
        UserError: the loss is no longer finite, the monitored metric is not measured, a calibrator has no
            validation rows to be fitted on, or the log is not the one that the interrupted run began with.
        Interrupted: Ctrl-C or SIGTERM; the newest checkpoint holds everything up to it.
    """
    trainer = Trainer(config, run, data, observers, warm_start)
    return trainer.fit(resume)


class Trainer:
    """The state of one run: model, optimisers, average, position."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        data: EncodedData,
        observers: Sequence[Observer],
        warm_start: WarmStart | None = None,
    ) -> None:
        training = config.training
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        torch.manual_seed(training.seed)
        if data.valid is None and config.evaluation.calibration != "none":
            raise UserError(
                "evaluation.calibration: a calibrator is fitted on validation rows, and data.split gives none"
            )
        self.config, self.run, self.data, self.warm_start = spelled_out(config), run, data, warm_start
        self.device = pick_device(training.device)
        self.model = Ranker(config.model, config.log_schema, data.encoder.layout).to(self.device)
        if warm_start is not None:
            warm_start.load_weights(self.model)
        self.monitor_task, self.monitor = monitored(config)
        self._check_labels()
        if training.compile:
            self.model.scorer.compile()
        self.tables = self.model.embedder.tables()
        self.optimisers = build_optimisers(training.optimiser, self.model)
        self.peak_lrs = [[group["lr"] for group in o.param_groups] for o in self.optimisers]
        self.average = WeightAverage(self.model, training.ema, self.tables) if training.ema else None
        if warm_start is not None:
            warm_start.load_state(self.model, self.optimisers, self.average)
        self.task_weights = torch.tensor(
            [label.weight for label in config.log_schema.labels], device=self.device
        )
        self.position = Position()
        self.steps_per_epoch = math.ceil(len(data.train) / training.batch_size)
        self.total_steps = self.steps_per_epoch * training.epochs
        self.observers = [*observers, *self._trackers(run.path)]

    def fit(self, resume: bool) -> Summary:
        """Trains to the end, then measures the best weights."""
        state = load_checkpoint(self.run.checkpoints) if resume else None
        if state is not None:
            if self.run.info().get("data") != self.data.fingerprint:
                raise UserError(
                    f"{self.run.path}: the log's files are not those that this run began with; put them back, "
                    "or train anew"
                )
            self._restore(state)
        else:
            self._describe_run()
        for observer in self.observers:
            observer.started(self.run.path.name, self.total_steps, self.position.step)
        try:
            with stop_signals() as asked:
                self._train(asked)
            if self.data.valid is None:
                self._save_best()
            return self._conclude()
        except BaseException:
            for observer in self.observers:
                observer.stopped()
            raise

    def _train(self, asked: threading.Event) -> None:
        config, position = self.config.training, self.position
        if self.warm_start is not None and position.step == 0 and self.data.valid is not None:
            self._validate()
        losses: list[Tensor] = []
        started, first_step = time.perf_counter(), position.step
        while position.epoch < config.epochs:
            for batch in self._batches():
                losses.append(self._step(batch))
                position.step += 1
                position.batch += 1
                epoch_over = position.batch == self.steps_per_epoch
                if position.step % REPORT_STEPS == 0 or epoch_over:
                    rate = (position.step - first_step) * config.batch_size / (time.perf_counter() - started)
                    self._report(losses, rate)
                    losses.clear()
                due = epoch_over if config.eval_steps is None else position.step % config.eval_steps == 0
                due = due or position.step == self.total_steps
                if due and self.data.valid is not None:
                    position.seconds += time.perf_counter() - started
                    if self._validate():
                        return
                    started = time.perf_counter()
                at_checkpoint = config.checkpoint_steps and position.step % config.checkpoint_steps == 0
                if due or epoch_over or at_checkpoint or asked.is_set():
                    position.seconds += time.perf_counter() - started
                    self._checkpoint()
                    started, first_step = time.perf_counter(), position.step
                if asked.is_set():
                    raise Interrupted(f"{self.run.path}: stopped at step {position.step}")
            position.epoch, position.batch = position.epoch + 1, 0
        position.seconds += time.perf_counter() - started

    def _batches(self) -> Iterator[Batch]:
        config, position = self.config.training, self.position
        return ahead(
            self.data.train.batches(
                config.batch_size,
                shuffle=True,
                seed=config.seed,
                epoch=position.epoch,
                start_batch=position.batch,
            )
        )

    def _step(self, batch: Batch) -> Tensor:
        config = self.config.training.optimiser
        self.model.train()
        factor = lr_factor(config, self.position.step, self.total_steps)
        for optimiser, peaks in zip(self.optimisers, self.peak_lrs, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        batch = batch.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.training.amp == "bf16"):
            logits = self.model(batch.ids, batch.dense, batch.position)
        loss = task_loss(logits, batch.labels, batch.weight, self.task_weights)
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            clip_grad_norm(self.model.parameters(), config.clip_norm)
        touched = self._touched() if self.average else {}
        if self.average:
            self.average.before_step(touched)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.after_step(touched)
        return loss.detach()

    def _touched(self) -> dict[str, Tensor]:
        assert self.average is not None
        return {
            name: coalesced(table.grad).indices()[0]
            for name, table in self.average.tables.items()
            if table.grad is not None
        }

    def _report(self, losses: list[Tensor], rate: float) -> None:
        loss = float(torch.stack(losses).mean())
        position = self.position
        if not math.isfinite(loss):
            raise UserError(
                f"{self.run.path}: the loss is {loss} at step {position.step}; lower training.optimiser.lr, "
                "set training.optimiser.clip_norm, or standardise the numeric features"
            )
        lr = self.optimisers[0].param_groups[0]["lr"]
        progress = Progress(position.step, self.total_steps, position.epoch, loss, lr, rate)
        for observer in self.observers:
            observer.stepped(progress)

    def _check_labels(self) -> None:
        """Refuses validation rows on which the monitored metric would be undefined at every evaluation."""
        if self.data.valid is None or self.monitor in ("logloss", "ece"):
            return
        labels = self.data.valid.labels[:, self.model.tasks.index(self.monitor_task)]
        known = labels[~np.isnan(labels)]
        if known.size and known.min() != known.max():
            return
        found = (
            f"is {known[0]:g} in all {known.size:,}" if known.size else f"is unknown in all {len(labels):,}"
        )
        raise UserError(
            f"label {self.monitor_task} {found} validation rows, so that {self.monitor} is undefined; check the "
            "label's column and at_least, or the split"
        )

    def _validate(self) -> bool:
        """Scores the validation rows; keeps the weights if they are the best; says whether to stop."""
        assert self.data.valid is not None
        config, position = self.config.training, self.position
        with self.average.applied() if self.average else contextlib.nullcontext():
            metrics = self._evaluate(self.data.valid).metrics
            value = metrics[self.monitor_task][self.monitor]
            sign = 1.0 if metric_info(self.monitor).higher_is_better else -1.0
            better = value == value and (
                position.best is None or sign * (value - position.best) > config.min_delta
            )
            better = better or position.best_step < 0
            if better:
                position.best = value if value == value else position.best
                position.best_step, position.stale = position.step, 0
                save_weights(self.model, self.run.weights)
            else:
                position.stale += 1
        if better:
            self._keep_state()
        line = {"step": position.step, "epoch": position.epoch, "metrics": metrics}
        with self.run.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for observer in self.observers:
            observer.evaluated(position.step, metrics, best=better)
        return position.stale >= config.patience

    def _save_best(self) -> None:
        self.position.best_step = self.position.step
        with self.average.applied() if self.average else contextlib.nullcontext():
            save_weights(self.model, self.run.weights)
        self._keep_state()

    def _keep_state(self) -> None:
        """Keeps the optimisers' state beside the weights that were just kept, for a later warm start."""
        if self.config.training.keep_optimiser:
            save_state(self.run.path / STATE, self.model, self.optimisers, self.average)

    def _evaluate(self, rows: EncodedRows, **options: Any) -> Evaluation:
        return evaluate(self.model, rows, self.config, device=self.device, **options)

    def _conclude(self) -> Summary:
        load_weights(self.model, self.run.weights)
        metrics: dict[str, Metrics] = {}
        calibrators = None
        if self.data.valid is not None:
            valid = self._evaluate(self.data.valid, keep=self.config.evaluation.calibration != "none")
            metrics["valid"] = valid.metrics
            if self.config.evaluation.calibration != "none":
                calibrators = fit_calibrators(self.config.evaluation.calibration, valid)
                self.run.write_json("calibrators.json", {t: c.to_json() for t, c in calibrators.items()})
        if self.data.test is not None:
            test = self._evaluate(self.data.test, predictions=self.run.predictions, calibrators=calibrators)
            metrics["test"] = test.metrics
            self.run.write_json("reliability.json", test.reliability)
        position = self.position
        rows = position.step * self.config.training.batch_size
        summary = Summary(
            metrics=metrics,
            best_step=position.best_step,
            steps=position.step,
            seconds=position.seconds,
            rows_per_second=rows / max(position.seconds, 1e-9),
            flops=self.model.flops(),
            parameters=self.model.parameter_counts(),
        )
        self.run.write_json("metrics.json", metrics)
        self.run.write_info(
            {
                **self.run.info(),
                "steps": summary.steps,
                "best_step": summary.best_step,
                "train_seconds": round(summary.seconds, 3),
                "rows_per_second": round(summary.rows_per_second, 1),
                "flops": summary.flops,
                "parameters": summary.parameters,
            }
        )
        self.run.finish()
        for observer in self.observers:
            observer.finished(metrics)
        return summary

    def _describe_run(self) -> None:
        """Writes what the run is made of, before the first step."""
        layout, start = self.data.encoder.layout, self.warm_start
        begun = {"warm_start": start.describe(layout)} if start is not None else {}
        self.run.history.unlink(missing_ok=True)
        write_text(self.run.config, dump_config(self.config))
        self.data.encoder.save(self.run.encoder)
        self.run.write_json("layout.json", layout.to_json())
        self.run.write_info(
            {
                "status": "running",
                "versions": {"mldcn": __version__, "torch": str(torch.__version__)},
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "data": self.data.fingerprint,
                "rows": {
                    name: len(rows)
                    for name in ("train", "valid", "test")
                    if (rows := getattr(self.data, name)) is not None
                },
                **begun,
            }
        )

    def _checkpoint(self) -> None:
        state = {
            "position": vars(self.position),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "average": self.average.state_dict() if self.average else None,
            "random": random_state(self.device),
        }
        save_checkpoint(
            self.run.checkpoints, self.position.step, state, self.config.training.keep_checkpoints
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.position = Position(**state["position"])
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        if self.average:
            self.average.load_state_dict(state["average"])
        set_random_state(state["random"], self.device)
        if self.run.history.exists():  # evaluations behind the checkpoint will be made again
            lines = self.run.history.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= self.position.step]
            write_text(self.run.history, "".join(kept))

    def _trackers(self, folder: Path) -> list[Observer]:
        trackers: list[Observer] = []
        if self.config.training.tensorboard:
            trackers.append(TensorBoard(folder / "tensorboard"))
        if self.config.training.mlflow:
            name = str(self.config.model.interaction["name"])
            trackers.append(MLflow(folder.name, {"interaction": name}))
        return trackers


def spelled_out(config: Config) -> Config:
    """The config with every option of its interaction, so that a run outlives a change of defaults."""
    interaction = interactions.parse(config.model.interaction).model_dump(mode="json")
    return config.model_copy(update={"model": config.model.model_copy(update={"interaction": interaction})})


def monitored(config: Config) -> tuple[str, str]:
    """The task and metric that ``training.monitor`` names: ``auc`` is the first task's, or ``task/metric``.

    Raises:
        UserError: there is no such task or metric, or the schema and config do not have it measured.
    """
    schema, tasks = config.log_schema, config.log_schema.tasks
    task, slash, metric = config.training.monitor.rpartition("/")
    task = task if slash else tasks[0]
    if task not in tasks:
        raise UserError(f"training.monitor: no task {task!r}; the tasks are {', '.join(tasks)}")
    if metric_info(metric).higher_is_better is None:
        raise UserError(
            f"training.monitor: {metric!r} is best at 1, neither high nor low; use logloss or ece"
        )
    by_group, at, k = metric.partition("@")
    if by_group == "gauc" and not (schema.user or schema.request):
        raise UserError("training.monitor: gauc ranks within a user; name the column in schema.user")
    if at and not schema.request:
        raise UserError(
            f"training.monitor: {metric} ranks within a request; name the column in schema.request"
        )
    if at and int(k) not in config.evaluation.hit_at:
        raise UserError(f"training.monitor: {metric} is not measured; add {k} to evaluation.hit_at")
    return task, metric
