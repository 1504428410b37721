"""The training loop: plain, complete, in one file."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mldcn import __version__
from mldcn.config import Config, dump_config
from mldcn.data.batch import Batch
from mldcn.data.pipeline import ahead
from mldcn.data.prepare import EncodedData
from mldcn.data.shards import EncodedRows
from mldcn.errors import BrokeDownError, UserError
from mldcn.files import checksum, locked, write_text
from mldcn.metrics import metric_info
from mldcn.model import Ranker, load_weights, pick_device, save_weights
from mldcn.run import RunFolder
from mldcn.training.checkpoint import (
    drop_after,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from mldcn.training.clock import Clock
from mldcn.training.ema import WeightAverage
from mldcn.training.evaluate import Evaluation, check_labels, evaluate, fit_calibrators
from mldcn.training.history import History
from mldcn.training.identity import check_same, monitored, spelled_out, what_counts
from mldcn.training.interrupt import Interrupted, stop_signals
from mldcn.training.observers import Metrics, Observer, Progress, trackers
from mldcn.training.optimisers import build_optimisers
from mldcn.training.pruning import Pruner
from mldcn.training.recovery import LossWatch, Place, Trouble, all_finite, extreme_values
from mldcn.training.schedule import lr_factor
from mldcn.training.step import backpropagate
from mldcn.training.table_optim import clip_grad_norm, coalesced
from mldcn.training.warm_start import STATE, WarmStart, save_state

REPORT_STEPS = 20  # losses are read back, judged and shown this often


@dataclass
class Position:
    """How far a run has come; a checkpoint holds it."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of the current epoch that are done with
    best: float | None = None
    best_step: int = -1  # -1: no weights are kept yet
    stale: int = 0  # evaluations since the best one


@dataclass(frozen=True)
class Summary:
    """What a finished run came to.

    metrics: split -> task -> metric -> value. seconds: spent training, ``data_wait_share`` of them waiting for
    data. troubles: the steps that training was rolled back at.
    """

    metrics: dict[str, Metrics]
    best_step: int
    steps: int
    seconds: float
    rows_per_second: float
    data_wait_share: float
    flops: dict[str, int]
    parameters: dict[str, int]
    troubles: tuple[Trouble, ...] = ()


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
    and number of threads, two runs end with the same weights bit for bit, and so does a run that was stopped
    or killed, at whatever moment, and resumed.

    Args:
        config: the whole config.
        run: a new folder, or one that an interrupted run left.
        data: the encoded rows.
        resume: go on from the newest checkpoint, if there is one.
        warm_start: the run to begin with, whose encoder ``data`` was encoded from. Its weights are measured
            before the first step, and are kept where no step betters them.
        observers: told of the progress.

    Raises:
        BrokeDownError: training broke down more often than ``training.recovery`` allows.
        UserError: the monitored metric is not measured, a calibrator has no validation rows to be fitted on,
            another process writes the run, or the config or log is not the one that the interrupted run began
            with.
        Interrupted: Ctrl-C or SIGTERM; the newest checkpoint holds everything up to it.
    """
    with locked(run.path):
        trainer = Trainer(config, run, data, observers, warm_start, resume=resume)
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
        *,
        resume: bool = False,
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
        if data.valid is not None and self.monitor not in ("logloss", "ece"):
            check_labels(data.valid, self.model.tasks, self.monitor_task, self.monitor)
        if training.compile:
            self.model.scorer.compile()
        self.tables = self.model.tables()
        self.optimisers = build_optimisers(training.optimiser, self.model)
        self.peak_lrs = [[group["lr"] for group in o.param_groups] for o in self.optimisers]
        self.average = WeightAverage(self.model, training.ema, self.tables) if training.ema else None
        if warm_start is not None:
            warm_start.load_state(self.model, self.optimisers, self.average)
        weights = [label.weight for label in config.log_schema.labels]
        self.task_weights = torch.tensor(weights, device=self.device)
        self.position, self.clock = Position(), Clock()
        self.watch = LossWatch(training.recovery, sum(weights))
        self.troubles: list[Trouble] = []
        self.kept: dict[str, str] = {}  # checksums of what was kept at the best step
        self.history = History(run.history)
        self.steps_per_epoch = math.ceil(len(data.train) / training.batch_size)
        self.total_steps = self.steps_per_epoch * training.epochs
        self.pruner: Pruner | None = None
        if training.pruning is not None:
            self.pruner = Pruner(training.pruning, self.model, self.steps_per_epoch, training.epochs)
        self.observers = [*observers, *trackers(config, run.path, resume=resume)]

    def fit(self, resume: bool) -> Summary:
        """Trains to the end, then measures the best weights."""
        try:
            restored, notes = self._resume() if resume else (False, [])
            if not restored:
                self.history.clear()
            self._describe_run()
            for observer in self.observers:
                observer.started(self.run.path.name, self.total_steps, self.position.step)
            self._note(notes)
            if not restored:
                if self.warm_start is not None and self.data.valid is not None:
                    self._validate()
                self._checkpoint(anchor=True)
            with stop_signals() as asked, self.clock.running():
                self._train(asked)
            return self._conclude()
        except BaseException:
            for observer in self.observers:
                observer.stopped()
            raise

    def _train(self, asked: threading.Event) -> None:
        training = self.config.training
        self.saved_at = time.monotonic()
        while self.position.epoch < training.epochs and self.position.stale < training.patience:
            self._epoch(asked)

    def _epoch(self, asked: threading.Event) -> None:
        """Trains to the end of the epoch, or until it is time to stop or training was rolled back."""
        training, position = self.config.training, self.position
        skipped = {trouble.batch for trouble in self.troubles if trouble.epoch == position.epoch}
        for batch in self.clock.batches(self._batches(position.batch)):
            if position.batch not in skipped:
                place = Place(position.step + 1, position.epoch, position.batch)
                self.watch.add(place, *self._step(batch))
            position.step += 1
            position.batch += 1
            if self.pruner is not None and self.pruner.due(position.step):
                self._prune(self.pruner)
            epoch_over = position.batch == self.steps_per_epoch
            evaluated = (
                epoch_over if training.eval_steps is None else position.step % training.eval_steps == 0
            )
            evaluated = (evaluated or position.step == self.total_steps) and self.data.valid is not None
            # Fixed by the config alone, so that a run is rolled back to the same place whenever it is repeated.
            fixed = evaluated or epoch_over or _every(training.checkpoint_steps, position.step)
            late = time.monotonic() - self.saved_at > 60 * training.checkpoint_minutes
            saved = fixed or late or asked.is_set()
            if saved or position.step % REPORT_STEPS == 0:
                trouble = self._report(thorough=fixed)
                if trouble is not None:
                    with self.clock.stopped():
                        self._roll_back(trouble)
                    return
            if saved:
                with self.clock.stopped():
                    if evaluated:
                        self._validate()
                    # Whether there is trouble is for a fixed step to say; here nothing bad must be kept.
                    if fixed or all_finite(self._numbers()):
                        self._checkpoint(anchor=fixed)
            if asked.is_set():
                raise Interrupted(f"{self.run.path}: stopped at step {position.step}")
            if position.stale >= training.patience:
                return
        position.epoch, position.batch = position.epoch + 1, 0

    def _batches(self, start: int, epoch: int | None = None) -> Iterator[Batch]:
        """The epoch's batches from one on."""
        training = self.config.training
        epoch = self.position.epoch if epoch is None else epoch
        return ahead(
            self.data.train.batches(
                training.batch_size, shuffle=True, seed=training.seed, epoch=epoch, start_batch=start
            )
        )

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Trains on a batch; gives its loss and its gradient's norm, unread."""
        config = self.config.training.optimiser
        self.model.train()
        factor = lr_factor(config, self.position.step, self.total_steps) * self._slowed()
        for optimiser, peaks in zip(self.optimisers, self.peak_lrs, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        batch = batch.to(self.device, non_blocking=True)
        bf16 = self.config.training.amp == "bf16"
        loss = backpropagate(self.model, batch, self.task_weights, bf16=bf16)
        norm = None
        if config.clip_norm is not None:
            norm = clip_grad_norm(self.model.parameters(), config.clip_norm)
        touched = self._touched() if self.average else {}
        if self.average:
            self.average.before_step(touched)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.after_step(touched)
        return loss, norm

    def _prune(self, pruner: Pruner) -> None:
        """Zeroes the smallest weights, as many as the schedule asks for by now."""
        if self.average:
            # An untouched row's average is caught up with from the weights it had all along.
            self.average.sync()
        pruner.prune(self.position.step)

    @contextlib.contextmanager
    def _weights_to_keep(self) -> Iterator[None]:
        """Inside the block the model holds what is evaluated and kept: averaged and pruned weights."""
        with self.average.applied() if self.average else contextlib.nullcontext():
            if self.pruner is not None:
                self.pruner.prune(self.position.step)
            yield

    def _touched(self) -> dict[str, Tensor]:
        assert self.average is not None
        return {
            name: coalesced(table.grad).indices()[0]
            for name, table in self.average.tables.items()
            if table.grad is not None
        }

    def _slowed(self) -> float:
        """What the roll-backs so far have left of the learning rate."""
        return float(self.config.training.recovery.lr_factor ** len(self.troubles))

    def _report(self, *, thorough: bool) -> Trouble | None:
        """Reads the losses back and tells of them; gives the first trouble since the last time.

        Args:
            thorough: look at the weights too, as before they are kept: a step's loss is from before its update.
        """
        position = self.position
        loss, trouble = self.watch.read()
        if trouble is None and thorough and not all_finite(self._numbers()):
            batch = position.batch - 1
            trouble = Trouble(position.step, position.epoch, batch, "the weights are no longer finite")
        if trouble is None and loss is not None:
            lr = self.optimisers[0].param_groups[0]["lr"]
            now = Progress(position.step, self.total_steps, position.epoch, loss, lr, self.clock.rate())
            for observer in self.observers:
                observer.stepped(now)
        return trouble

    def _numbers(self) -> Iterator[Tensor]:
        yield from self.model.state_dict().values()
        for optimiser in self.optimisers:
            for state in optimiser.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def _roll_back(self, trouble: Trouble) -> None:
        """Goes back to the last fixed checkpoint, to pass over the batch with a lower learning rate.

        Raises:
            BrokeDownError: this was tried often enough.
        """
        recovery = self.config.training.recovery
        batches = self._batches(trouble.batch, trouble.epoch)
        trouble = replace(trouble, values=extreme_values(next(batches), self.data.encoder.layout))
        del batches
        tried = len(self.troubles)
        found = load_checkpoint(self.run.checkpoints, anchor=True) if tried < recovery.tries else None
        if found is None:
            raise BrokeDownError(
                f"{self.run.path}: training broke down: {trouble}; {tried} roll-backs have not helped. Lower "
                "training.optimiser.lr or table_lr, set training.optimiser.clip_norm, or mend those features"
            )
        troubles = [*self.troubles, trouble]
        clock = self.clock.state()
        self._restore(found.state)
        self.clock.restore(clock)
        self.troubles = troubles
        drop_after(self.run.checkpoints, self.position.step)
        text = (
            f"{trouble}. Back to step {self.position.step:,}, past that batch, with "
            f"{self._slowed():.3g} times the learning rate"
        )
        self.history.add(
            {
                "step": trouble.step,
                "epoch": trouble.epoch,
                "event": "rolled back",
                "to_step": self.position.step,
                "lr_factor": self._slowed(),
                "problem": trouble.problem,
                "values": list(trouble.values),
            }
        )
        self._note([text])

    def _validate(self) -> None:
        """Scores the validation rows, and keeps the weights if they are the best."""
        assert self.data.valid is not None
        config, position = self.config.training, self.position
        with self._weights_to_keep():
            metrics = self._evaluate(self.data.valid).metrics
            value = metrics[self.monitor_task][self.monitor]
            sign = 1.0 if metric_info(self.monitor).higher_is_better else -1.0
            better = value == value and (
                position.best is None or sign * (value - position.best) > config.min_delta
            )
            better = better or position.best_step < 0
            # Denser weights are no match for those that the pruning is after.
            better = better or (self.pruner is not None and self.pruner.growing(position.best_step))
            if better:
                position.best = value if value == value else position.best
                position.best_step, position.stale = position.step, 0
                save_weights(self.model, self.run.weights)
            else:
                position.stale += 1
        if better:
            self._keep_state()
        self.history.add({"step": position.step, "epoch": position.epoch, "metrics": metrics})
        for observer in self.observers:
            observer.evaluated(position.step, metrics, best=better)

    def _keep_last(self) -> None:
        """Keeps the last weights, where no rows say which are the best."""
        self.position.best_step = self.position.step
        with self._weights_to_keep():
            save_weights(self.model, self.run.weights)
        self._keep_state()

    def _keep_state(self) -> None:
        """Keeps the optimisers' state beside the weights that were just kept, for a later warm start."""
        files = [self.run.weights]
        if self.config.training.keep_optimiser:
            files.append(self.run.path / STATE)
            save_state(files[-1], self.model, self.optimisers, self.average)
        self.kept = {file.name: checksum(file) for file in files}

    def _evaluate(self, rows: EncodedRows, **options: Any) -> Evaluation:
        return evaluate(self.model, rows, self.config, device=self.device, **options)

    def _conclude(self) -> Summary:
        if self.data.valid is None:
            self._keep_last()
        for name, expected in self.kept.items():
            if not (self.run.path / name).is_file() or checksum(self.run.path / name) != expected:
                raise UserError(
                    f"{self.run.path / name}: was damaged while the run was in progress; train anew"
                )
        load_weights(self.model, self.run.weights)
        metrics: dict[str, Metrics] = {}
        calibrators = None
        kind = self.config.evaluation.calibration
        if self.data.valid is not None:
            valid = self._evaluate(self.data.valid, sample=kind != "none")
            metrics["valid"] = valid.metrics
            if kind != "none":
                calibrators = fit_calibrators(kind, valid)
                self.run.write_json("calibrators.json", {t: c.to_json() for t, c in calibrators.items()})
        if self.data.test is not None:
            test = self._evaluate(self.data.test, predictions=self.run.predictions, calibrators=calibrators)
            metrics["test"] = test.metrics
            self.run.write_json("reliability.json", test.reliability)
        seconds = max(self.clock.seconds, 1e-9)
        summary = Summary(
            metrics=metrics,
            best_step=self.position.best_step,
            steps=self.position.step,
            seconds=self.clock.seconds,
            rows_per_second=self.clock.rows / seconds,
            data_wait_share=self.clock.waiting / seconds,
            flops=self.model.flops(),
            parameters=self.model.parameter_counts(),
            troubles=tuple(self.troubles),
        )
        self.run.write_json("metrics.json", metrics)
        self.run.finish(
            {
                "steps": summary.steps,
                "best_step": summary.best_step,
                "train_seconds": round(summary.seconds, 3),
                "rows_per_second": round(summary.rows_per_second, 1),
                "data_wait_share": round(summary.data_wait_share, 5),
                "flops": summary.flops,
                "parameters": summary.parameters,
                "troubles": [trouble.to_json() for trouble in self.troubles],
                **({"zeros": self.pruner.found()} if self.pruner is not None else {}),
            }
        )
        for observer in self.observers:
            observer.finished(metrics)
        return summary

    def _resume(self) -> tuple[bool, list[str]]:
        """Takes up the newest whole checkpoint; says whether there was one, and what else there is to say."""
        found = load_checkpoint(self.run.checkpoints)
        if found is None:
            lost = self.run.checkpoints.exists() and any(self.run.checkpoints.iterdir())
            return False, ["no checkpoint is whole; training begins anew"] if lost else []
        self._check(found.state)
        self._restore(found.state)
        self.history.restore(found.state["history"])
        return True, [f"checkpoint {name} is damaged; an older one is taken" for name in found.damaged]

    def _describe_run(self) -> None:
        """Writes what the run is made of, again when it is resumed: a damaged file would otherwise be kept."""
        layout, start = self.data.encoder.layout, self.warm_start
        begun = {"warm_start": start.describe(layout)} if start is not None else {}
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
                "rejected": self.data.rejected,
                **begun,
            }
        )

    def _checkpoint(self, *, anchor: bool) -> None:
        state = {
            "config": what_counts(self.config),
            "data": self.data.fingerprint,
            "position": asdict(self.position),
            "clock": self.clock.state(),
            "losses": self.watch.state(),
            "troubles": [trouble.to_json() for trouble in self.troubles],
            "kept": self.kept,
            "history": self.history.state(),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "average": self.average.state_dict() if self.average else None,
            "random": random_state(self.device),
        }
        keep = self.config.training.keep_checkpoints
        save_checkpoint(self.run.checkpoints, self.position.step, state, keep=keep, anchor=anchor)
        self.saved_at = time.monotonic()

    def _check(self, state: dict[str, Any]) -> None:
        """Refuses a checkpoint of another config or log.

        Raises:
            UserError: it is one.
        """
        check_same(state["config"], self.config, self.run.config)
        if state["data"] != self.data.fingerprint:
            raise UserError(
                f"{self.run.path}: the log's files are not those that this run began with; put them back, "
                "or train anew"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.position = Position(**state["position"])
        self.clock.restore(state["clock"])
        self.watch.restore(state["losses"])
        self.troubles = [Trouble.from_json(raw) for raw in state["troubles"]]
        self.kept = dict(state["kept"])
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
            optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.load_state_dict(state["average"])
        set_random_state(state["random"], self.device)

    def _note(self, texts: Sequence[str]) -> None:
        for text in texts:
            for observer in self.observers:
                observer.noted(text)


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
