"""What a study's processes do: train one model, or measure what one costs."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mldcn.config import dump_config, load_config
from mldcn.cost import Training, measure_latency, measure_memory, scorer_flops, x0_layout
from mldcn.cost.flops import meta
from mldcn.data.batch import EncodedLayout
from mldcn.data.prepare import EncodedData, prepare
from mldcn.errors import BrokeDownError, UserError
from mldcn.files import locked
from mldcn.model import Ranker, pick_device
from mldcn.run import RunFolder
from mldcn.study.plan import Job, counting
from mldcn.study.recipe import Recipe
from mldcn.study.rows import RunRow
from mldcn.study.tuning import Pruned, Pruning
from mldcn.training.fit import fit
from mldcn.training.history import evaluations
from mldcn.training.identity import monitored
from mldcn.training.step import TrainingStep

LATENCY_SECONDS = 0.3  # of timing a batch size


@dataclass(frozen=True)
class Train:
    """Trains a study's runs.

    out: the study's folder. task: whose metrics the rows hold. higher: whether more of the monitored metric is
    better. attainable: metric -> the best possible on the test rows.
    """

    recipe: Recipe
    out: Path
    task: str
    higher: bool
    attainable: dict[str, float] | None

    def __call__(self, job: Job) -> RunRow:
        """Trains one model, or goes on with it, and gives its row; of a finished run, only the row.

        Raises:
            UserError: the folder holds a run of another config, or a damaged one.
        """
        data = prepare(job.config, Path(str(job.config.data.encoded)), None)
        if job.stage == "tune":
            data = replace(data, test=None)  # only final runs read the test rows
        run = RunFolder(self.out / job.folder)
        pruned = diverged = False
        started = time.monotonic()
        with locked(run.path):
            if not self._finished(run, job):
                try:
                    self._fit(run, job, data)
                except Pruned:
                    pruned = True
                    shutil.rmtree(run.checkpoints, ignore_errors=True)
                except BrokeDownError:
                    diverged = True
        return self._row(run, job, data, time.monotonic() - started, pruned=pruned, diverged=diverged)

    def _finished(self, run: RunFolder, job: Job) -> bool:
        if not run.config.exists():
            return False
        if counting(load_config(run.config)) != job.counts:
            raise UserError(
                f"{run.path}: holds a run of another config; has the recipe changed? Remove the folder, or name "
                "another with --out"
            )
        if run.info().get("status") != "finished":
            return False
        run.verify()
        return True

    def _fit(self, run: RunFolder, job: Job, data: EncodedData) -> None:
        resume = run.path.exists()
        if not resume:
            run = RunFolder.create(run.path, dump_config(job.config))
        observers = []
        tuning = self.recipe.tuning
        if job.stage == "tune" and tuning is not None and tuning.prune:
            space = tuning.of(job.rival)
            observers = [Pruning(monitored(job.config), space, job.before, run.history, higher=self.higher)]
        fit(job.config, run, data, resume=resume, observers=observers)

    def _row(
        self,
        run: RunFolder,
        job: Job,
        data: EncodedData,
        seconds: float,
        *,
        pruned: bool,
        diverged: bool,
    ) -> RunRow:
        config, info = job.config, run.info()
        flops, parameters = _sizes(job, data.encoder.layout)
        task, metric = monitored(config)
        curve = tuple((step, metrics[task][metric]) for step, metrics in evaluations(run.history))
        steps = info.get("steps", max((step for step, _ in curve), default=0))
        valid, test = self._metrics(run, job, finished=not (pruned or diverged))
        budget = job.point.budget
        return RunRow(
            rival=job.rival,
            budget=int(budget) if budget is not None and budget == int(budget) else budget,
            point=job.point.name,
            axis=job.point.axis,
            seed=job.seed,
            stage=job.stage,
            trial=job.trial,
            settings=job.settings,
            interaction=job.counts["model"]["interaction"],
            knob=job.knob,
            flops=flops,
            residual=job.residual,
            parameters=parameters,
            valid=valid,
            test=test,
            attainable=self.attainable,
            curve=curve,
            seconds=info.get("train_seconds", round(seconds, 3)),
            epochs=-(-steps // -(-len(data.train) // config.training.batch_size)),
            steps=steps,
            troubles=_roll_backs(run.history) + diverged,
            diverged=diverged,
            pruned=pruned,
            memory_bytes=None,
            memory_how=None,
            latency_ms=None,
            run=job.folder,
            config_hash=job.config_hash,
        )

    def _metrics(
        self, run: RunFolder, job: Job, *, finished: bool
    ) -> tuple[dict[str, float], dict[str, float] | None]:
        """Validation and test metrics; of a trial that was stopped, those of its best evaluation."""
        if finished:
            found: dict[str, Any] = run.read_json("metrics.json")
            test = found["test"][self.task] if job.stage == "final" and "test" in found else None
            return found["valid"][self.task], test
        task, metric = monitored(job.config)
        had = [m for _, m in evaluations(run.history) if m[task][metric] == m[task][metric]]
        best = max if self.higher else min
        return (best(had, key=lambda m: m[task][metric])[self.task] if had else {}), None


def _sizes(job: Job, layout: EncodedLayout) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs and parameters of a model by part."""
    with meta():
        model = Ranker(job.config.model, job.config.log_schema, layout)
    return model.flops(), model.parameter_counts()


def _roll_backs(history: Path) -> int:
    if not history.exists():
        return 0
    lines = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    return sum(line.get("event") == "rolled back" for line in lines)


@dataclass(frozen=True)
class Measured:
    """What a model costs where it runs: bytes at the peak of a training step, milliseconds by batch size."""

    memory_bytes: int | None
    memory_how: str | None
    latency_ms: dict[int, dict[str, float]] | None


@dataclass(frozen=True)
class Measure:
    """Measures what models cost. batches: rows scored at once."""

    batches: tuple[int, ...]

    def __call__(self, job: Job) -> Measured:
        """Of one model, with as many threads as its run had."""
        config = job.config
        torch.set_num_threads(config.training.threads or 1)
        layout = prepare(config, Path(str(config.data.encoded)), None).encoder.layout
        device = str(pick_device(config.training.device))
        training = Training(
            config.model,
            config.log_schema,
            layout,
            config.training.batch_size,
            lambda ranker: TrainingStep(ranker, config.training),
            device,
        )
        memory = measure_memory(training)
        x0 = x0_layout(config.model, config.log_schema, layout)
        timings = measure_latency(
            config.model,
            config.log_schema,
            layout,
            scorer_flops(config.model, x0, layout.tasks),
            batch_sizes=self.batches,
            device=device,
            seconds=LATENCY_SECONDS,
        )
        return Measured(
            memory.peak,
            f"PyTorch's allocator on {device}, a step of {config.training.batch_size:,} rows",
            {t.batch: {"median": 1e3 * t.median, "p99": 1e3 * t.p99} for t in timings.latencies},
        )
