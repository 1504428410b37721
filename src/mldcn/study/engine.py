"""Running a study: plan, train what is not finished yet, measure, report. A killed study goes on where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mldcn.cost import scorer_flops, scorer_parameters, x0_layout
from mldcn.errors import UserError
from mldcn.files import locked, write_text
from mldcn.run import RunFolder
from mldcn.study.bench import Bench, task_of
from mldcn.study.jobs import run_ready
from mldcn.study.plan import Estimates, Job, refuse_others, row_identity
from mldcn.study.recipe import Recipe
from mldcn.study.rows import (
    RECIPE,
    ROWS,
    RunRow,
    Study,
    append_row,
    chosen_trial,
    counted,
    read_rows,
    write_facts,
    write_rows,
)
from mldcn.study.running import Measure, Measured, Train
from mldcn.study.slowdowns import measure_slowdowns


@dataclass(frozen=True)
class PlanLine:
    """A model of the plan. runs: final runs that are left, and trials where it is tuned; seconds: for them."""

    rival: str
    point: str
    knob: str | None
    cost: int
    residual: float | None
    parameters: int
    trials: int
    runs: int
    seconds: float


@dataclass(frozen=True)
class Standing:
    """How far a study has come. finished: rows there were, and are; left: runs; seconds: that they may take."""

    finished: int
    left: int
    seconds: float
    running: tuple[str, ...]
    study: Study


class Watcher:
    """Told of a study's progress; does nothing by itself."""

    def encoding(self, stage: str, rows: int, bytes_done: int, bytes_total: int) -> None:
        """The log is being encoded."""

    def planned(self, lines: Sequence[PlanLine], standing: Standing) -> None:
        """What there is to do, before it begins."""

    def moved(self, standing: Standing, row: RunRow | None) -> None:
        """A run was started, or is finished and has a row."""

    def measuring(self, what: str) -> None:
        """Memory and latency of a model are being measured."""


def run_study(
    recipe: Recipe,
    source: Path | None,
    out: Path,
    *,
    jobs: int | None = None,
    only: Sequence[str] = (),
    dry_run: bool = False,
    watcher: Watcher | None = None,
) -> Study:
    """Trains what is not finished yet, a row of ``rows.jsonl`` a run.

    Args:
        recipe: the study.
        source: the log as its publisher gives it; not needed for a log that is generated.
        out: folder for the log, the encoded rows, the runs and the rows.
        jobs: runs at the same time; by default as many as there are cores for.
        only: ``rival`` or ``rival@point``: nothing else is trained now.
        dry_run: only plan.
        watcher: told of the progress.

    Raises:
        UserError: another process runs a study in the folder, it holds rows of another recipe, a run is damaged,
            or a process that trained one was killed.
    """
    watcher = watcher or Watcher()
    with locked(out):
        bench = Bench.open(recipe, source, out, watcher.encoding)
        jobs = jobs or max(1, len(os.sched_getaffinity(0)) // bench.threads)
        session = _Session(bench, jobs, _chosen(recipe, only), watcher)
        session.plan()
        if not dry_run:
            write_text(out / RECIPE, _dumped(recipe))
            session.train()
            session.measure()
            if recipe.limits.asked:
                measure_slowdowns(session.study(), watcher.measuring)
        return session.study()


def _dumped(recipe: Recipe) -> str:
    raw = recipe.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _chosen(recipe: Recipe, only: Sequence[str]) -> set[tuple[str, str]]:
    """The rivals and points that are to be trained now.

    Raises:
        UserError: the recipe has no such rival or point.
    """
    everything = {(rival, point.name) for rival in recipe.rivals for point in recipe.points(rival)}
    chosen = set()
    for each in only:
        rival, at, name = each.partition("@")
        found = {(r, p) for r, p in everything if r == rival and name in (p, "")}
        if not found:
            known = sorted(f"{r}@{p}" for r, p in everything) if at else list(recipe.rivals)
            raise UserError(f"--only {each}: the recipe has {', '.join(known)}")
        chosen |= found
    return chosen or everything


class _Session:
    """One call of a study: knows the rows there are and what is left to do."""

    def __init__(self, bench: Bench, jobs: int, chosen: set[tuple[str, str]], watcher: Watcher) -> None:
        self.bench, self.jobs, self.chosen, self.watcher = bench, jobs, chosen, watcher
        self.recipe, self.planner = bench.recipe, bench.planner
        self.rivals = [rival for rival in self.recipe.rivals if any(rival == r for r, _ in chosen)]
        self.file = bench.out / ROWS
        self.rows = read_rows(self.file)
        self.running: dict[tuple[Any, ...], Job] = {}
        self.finals: dict[str, list[Job]] = {}
        self.untuned: dict[str, list[Job]] = {}
        self.estimates = Estimates(bench.data)
        self.started = self.began = self.ended = time.monotonic()
        self.trained: list[float] = []  # seconds of training of each run of this session

    # What there is to do.

    def trials(self, rival: str) -> list[RunRow]:
        """The rows of a rival's trials, in their order."""
        tuning = self.recipe.tuning
        found = [row for row in self.rows if row.rival == rival and row.stage == "tune"]
        return sorted((r for r in found if tuning and r.trial < tuning.trials), key=lambda row: row.trial)

    def tuned(self, rival: str) -> bool:
        """Whether a rival has had all its trials."""
        return self.recipe.tuning is None or len(self.trials(rival)) == self.recipe.tuning.trials

    def final(self, rival: str) -> list[Job]:
        """The final runs of a rival that was tuned.

        Raises:
            UserError: none of its trials came to its end.
        """
        if rival not in self.finals:
            settings, trial = {}, -1
            if self.recipe.tuning is not None:
                best = chosen_trial(self.trials(rival), rival, higher=self.bench.higher)
                if best is None:
                    raise UserError(
                        f"rival {rival}: every trial broke down or was stopped; lower training.optimiser.lr in "
                        "the recipe's config or narrow its range in tuning.space"
                    )
                settings, trial = best.settings, best.trial
            self.finals[rival] = self.planner.final(rival, trial, settings)
        return self.finals[rival]

    def done(self) -> set[tuple[Any, ...]]:
        """The identities of finished runs."""
        return {row_identity(row) for row in self.rows}

    def left(self) -> list[Job]:
        """Final runs of tuned rivals that are not finished, those of a seed together."""
        done = self.done()
        jobs = [job for rival in self.rivals if self.tuned(rival) for job in self.final(rival)]
        jobs = [j for j in jobs if j.identity not in done and (j.rival, j.point.name) in self.chosen]
        return sorted(jobs, key=lambda job: self.recipe.seeds.index(job.seed))

    def ready(self) -> Job | None:
        """The next run: trials first, since final runs wait for them."""
        for rival in self.rivals:
            tuning = any(job.rival == rival and job.stage == "tune" for job in self.running.values())
            if not tuning and not self.tuned(rival):
                return self._start(self.planner.trial(rival, self.trials(rival), higher=self.bench.higher))
        same = {job.config_hash for job in self.running.values()}
        for job in self.left():
            if job.identity in self.running or job.config_hash in same:
                continue
            twin = next((row for row in self.rows if row.config_hash == job.config_hash), None)
            if twin is None:
                return self._start(job)
            # Two variants may be one model: that of the value that the rival has anyhow.
            self._add(_renamed(twin, job))
        return None

    # What is done.

    def plan(self) -> None:
        """Refuses rows of another recipe, and says what there is to do and how long it may take.

        Raises:
            UserError: the folder holds rows of another recipe.
        """
        known = []
        for rival in self.rivals:
            known += [self.planner.trial_of(rival, row.trial, row.settings) for row in self.trials(rival)]
            known += self.final(rival) if self.tuned(rival) else []
        refuse_others(self.planner, self.rows, known, self.bench.out)
        self._verify()
        ahead = {rival: self._ahead(rival) for rival in self.rivals}
        self.estimates.measure([job for jobs in ahead.values() for job in jobs])
        self.watcher.planned(list(self._lines(ahead)), self.standing())

    def _verify(self) -> None:
        """Checks the folders of finished runs, those that are still there."""
        for row in self.rows:
            run = RunFolder(self.bench.out / row.run)
            if run.config.exists() and not (row.pruned or row.diverged):
                run.verify()

    def _ahead(self, rival: str) -> list[Job]:
        """The final runs that are left, as far as they are known."""
        done = self.done()
        jobs = [job for job in self._known(rival) if job.identity not in done]
        return [job for job in jobs if (job.rival, job.point.name) in self.chosen]

    def _known(self, rival: str) -> list[Job]:
        """The final runs of a rival; before it is tuned, with the config as it stands."""
        if self.tuned(rival):
            return self.final(rival)
        if rival not in self.untuned:
            self.untuned[rival] = self.planner.final(rival, -1, {})
        return self.untuned[rival]

    def _lines(self, ahead: dict[str, list[Job]]) -> Iterator[PlanLine]:
        encoded = self.bench.data.encoder.layout
        for rival in self.rivals:
            tuned_at = self.recipe.tuning_point(rival).name
            for job in (each for each in self._known(rival) if each.seed == self.recipe.seeds[0]):
                model = job.config.model
                layout = x0_layout(model, job.config.log_schema, encoded)
                trials = self._trials_left(rival) if job.point.name == tuned_at else 0
                runs = [each for each in ahead[rival] if each.point.name == job.point.name]
                yield PlanLine(
                    rival=rival,
                    point=job.point.name,
                    knob=job.knob,
                    cost=scorer_flops(model, layout, encoded.tasks),
                    residual=job.residual,
                    parameters=scorer_parameters(model, layout, encoded.tasks),
                    trials=trials,
                    runs=len(runs),
                    seconds=(trials + len(runs)) * self.estimates.seconds(job, self.rows),
                )

    def _trials_left(self, rival: str) -> int:
        return self.recipe.tuning.trials - len(self.trials(rival)) if self.recipe.tuning else 0

    def train(self) -> None:
        """Trains everything that is left."""
        self._tell()
        self.began = time.monotonic()
        bench = self.bench
        task = task_of(self.recipe, bench.config)
        train = Train(self.recipe, bench.out, task, bench.higher, bench.attainable)
        run_ready(self.ready, train, self._trained, self.jobs)

    def _start(self, job: Job) -> Job:
        self.running[job.identity] = job
        self.watcher.moved(self.standing(), None)
        return job

    def _trained(self, job: Job, row: RunRow) -> None:
        del self.running[job.identity]
        self.trained.append(row.seconds)
        self.ended = time.monotonic()
        self._add(row)

    def _add(self, row: RunRow) -> None:
        append_row(self.file, row)
        self.rows.append(row)
        self._tell()
        self.watcher.moved(self.standing(), row)

    def _tell(self) -> None:
        write_facts(self.bench.out, self.bench.facts(self.jobs, time.monotonic() - self.started))

    def measure(self) -> None:
        """Measures memory and latency of the final models, when nothing else runs beside it."""
        finals = [row for row in self.study().final if not row.diverged]
        lacking = {_model(row): row for row in finals if row.latency_ms is None}
        found: dict[tuple[Any, ...], Measured] = {
            _model(row): Measured(row.memory_bytes, row.memory_how, row.latency_ms)
            for row in finals
            if row.latency_ms is not None
        }
        jobs = {job.identity: job for rival in self.rivals if self.tuned(rival) for job in self.final(rival)}
        wanted = [row_identity(row) for key, row in lacking.items() if key not in found]
        todo = [jobs[identity] for identity in wanted if identity in jobs]
        left = iter(todo)

        def ready() -> Job | None:
            job = next(left, None)
            if job is not None:
                self.watcher.measuring(f"{job.rival} at {job.point.name}")
            return job

        def done(job: Job, measured: Measured) -> None:
            found[job.rival, job.point.name, job.trial] = measured

        if todo:
            run_ready(ready, Measure(self.recipe.latency_batches), done, 1)
        if lacking:
            self.rows = [_with(row, found) if row.stage == "final" else row for row in self.rows]
            write_rows(self.file, self.rows)
            self._tell()

    # How it stands.

    def study(self) -> Study:
        """The rows that count."""
        facts = self.bench.facts(self.jobs, time.monotonic() - self.started)
        rows = counted(self.recipe, self.rows, higher=self.bench.higher)
        return Study(self.recipe, tuple(rows), self.bench.out, facts)

    def standing(self) -> Standing:
        """How far it has come."""
        ahead = {rival: self._ahead(rival) for rival in self.rivals}
        seconds, left = 0.0, 0
        for rival, jobs in ahead.items():
            seconds += sum(self.estimates.seconds(job, self.rows) for job in jobs)
            left += len(jobs)
            trials = self._trials_left(rival)
            if trials:
                tuned_at = self.recipe.tuning_point(rival).name
                at = [job for job in jobs if job.point.name == tuned_at]
                seconds += trials * (self.estimates.seconds(at[0], self.rows) if at else 0.0)
                left += trials
        running = tuple(str(job) for job in self.running.values())
        return Standing(len(self.rows), left, seconds * self._slowness(), running, self.study())

    def _slowness(self) -> float:
        """Seconds that pass for a second of training: a run also starts and evaluates, and several run at once."""
        if len(self.trained) < 2 * self.jobs or not sum(self.trained):
            return 1 / self.jobs
        return (self.ended - self.began) / sum(self.trained)


def _model(row: RunRow) -> tuple[Any, ...]:
    return (row.rival, row.point, row.trial)


def _with(row: RunRow, found: dict[tuple[Any, ...], Measured]) -> RunRow:
    measured = found.get(_model(row))
    if measured is None:
        return row
    return replace(
        row,
        memory_bytes=measured.memory_bytes,
        memory_how=measured.memory_how,
        latency_ms=measured.latency_ms,
    )


def _renamed(row: RunRow, job: Job) -> RunRow:
    """The row of a finished run as that of another with the same config."""
    return replace(
        row,
        rival=job.rival,
        point=job.point.name,
        budget=job.point.budget,
        axis=job.point.axis,
        trial=job.trial,
        settings=job.settings,
        knob=job.knob,
        residual=job.residual,
    )
