"""What a study is going to train: configs with their widths solved, and how long it may take."""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mldcn.config import Config, ModelConfig, parse
from mldcn.cost import (
    LatencyMeter,
    Target,
    meet,
    meet_budget,
    sample_batch,
    scorer_flops,
    scorer_parameters,
    x0_layout,
)
from mldcn.data.batch import EncodedLayout
from mldcn.data.prepare import EncodedData
from mldcn.errors import UserError
from mldcn.files import write_text
from mldcn.model import Ranker, pick_device
from mldcn.study.recipe import Point, Recipe, Space, nested, overlay
from mldcn.study.rows import RunRow, Stage
from mldcn.study.tuning import inside, propose
from mldcn.training.identity import changes, spelled_out, what_counts
from mldcn.training.step import TrainingStep

WIDTHS = "widths.json"
ATTEMPTS = 20  # draws of a trial's settings before a rival is said to have no width that meets the budgets
TIMED_STEPS = 3
# Of the data part of a config: where a log lies does not change what is trained.
_PATHS = ("train", "valid", "test")


@dataclass(frozen=True)
class Job:
    """One run of the study. folder: relative to the study's. before: of a trial, those of its rival so far."""

    rival: str
    point: Point
    stage: Stage
    trial: int
    seed: int
    settings: dict[str, Any]
    config: Config
    knob: str | None
    residual: float | None
    before: tuple[RunRow, ...] = ()

    @property
    def folder(self) -> str:
        """Where it runs."""
        if self.stage == "tune":
            return f"runs/{self.rival}/tuning/trial-{self.trial:02d}"
        trial = f"trial-{self.trial:02d}-" if self.trial >= 0 else ""
        return f"runs/{self.rival}/{self.point.name.replace('/', '-')}/{trial}seed-{self.seed}"

    @property
    def identity(self) -> tuple[Any, ...]:
        """What it is called in the rows."""
        return (self.rival, self.point.name, self.stage, self.trial, self.seed)

    @functools.cached_property
    def counts(self) -> dict[str, Any]:
        """The config, as far as it changes a result."""
        return counting(self.config)

    @functools.cached_property
    def config_hash(self) -> str:
        """Of all that counts for the result."""
        return hashlib.blake2b(json.dumps(self.counts, sort_keys=True).encode(), digest_size=8).hexdigest()

    def __str__(self) -> str:
        if self.stage == "tune":
            return f"{self.rival} at {self.point.name}, trial {self.trial}"
        return f"{self.rival} at {self.point.name}, seed {self.seed}"


def counting(config: Config) -> dict[str, Any]:
    """A config as plain data, without what does not change a result: threads, and where the log lies."""
    raw = what_counts(spelled_out(config))
    raw["data"] = {key: value for key, value in raw["data"].items() if key not in _PATHS}
    return raw


def row_identity(row: RunRow) -> tuple[Any, ...]:
    """The identity of the job that a row is of."""
    return (row.rival, row.point, row.stage, row.trial, row.seed)


class Planner:
    """Makes the jobs of a study.

    Widths that were solved are kept in a file of the study's folder, so that a study goes on with the models
    that it began with.

    Args:
        recipe: the study.
        base: the log's config as plain data, the recipe's laid over it.
        layout: of the log's encoded rows.
        out: the study's folder.
    """

    def __init__(self, recipe: Recipe, base: dict[str, Any], layout: EncodedLayout, out: Path) -> None:
        self.recipe, self.base, self.layout = recipe, base, layout
        self._file = out / WIDTHS
        self._solved: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self._solved = json.loads(self._file.read_text(encoding="utf-8"))

    def final(self, rival: str, trial: int, settings: Mapping[str, Any]) -> list[Job]:
        """The final runs of a rival with its tuned settings, all of a seed together."""
        points = self.recipe.points(rival)
        return [
            self._job(rival, point, "final", trial, seed, settings)
            for seed in self.recipe.seeds
            for point in points
        ]

    def trial(self, rival: str, done: Sequence[RunRow], *, higher: bool) -> Job:
        """A rival's next trial.

        Args:
            rival: whose.
            done: the rows of its trials so far, in their order.
            higher: whether more of the monitored metric is better.

        Raises:
            UserError: no settings were found with which it meets all budgets.
        """
        tuning = self.recipe.tuning
        assert tuning is not None
        number, space = len(done), tuning.of(rival)
        if number == 0 or not space:
            return self.trial_of(rival, number, self.as_it_is(rival, space), done)
        for attempt in range(ATTEMPTS):
            # What was tried says nothing of widths: drawn from it again and again, no other choice would come.
            known = done if attempt < ATTEMPTS // 2 else ()
            settings = propose(space, known, ATTEMPTS * (tuning.seed + number) + attempt, higher=higher)
            if self._meets_all(rival, settings):
                return self.trial_of(rival, number, settings, done)
        raise UserError(
            f"rival {rival}: none of {ATTEMPTS} draws from tuning.own has a width that meets every budget; "
            "take the values out that make it too large or too small"
        )

    def trial_of(
        self, rival: str, number: int, settings: Mapping[str, Any], before: Sequence[RunRow] = ()
    ) -> Job:
        """A trial with settings that are known."""
        tuning = self.recipe.tuning
        assert tuning is not None
        point = self.recipe.tuning_point(rival)
        return self._job(rival, point, "tune", number, tuning.seed, settings, tuple(before))

    def as_it_is(self, rival: str, space: Space) -> dict[str, Any]:
        """What the config says to the keys of a space: the first trial.

        Raises:
            UserError: there is no such key.
        """
        config = self._config(rival, self.recipe.tuning_point(rival), {}, 0)
        return {key: _look_up(counting(config), key) for key in space}

    def check_trial(self, row: RunRow) -> bool:
        """Whether a trial's settings are such as the recipe tries."""
        assert self.recipe.tuning is not None
        space = self.recipe.tuning.of(row.rival)
        return row.trial == 0 or inside(space, row.settings)

    def _meets_all(self, rival: str, settings: Mapping[str, Any]) -> bool:
        try:
            for point in self.recipe.points(rival):
                self._job(rival, point, "final", 0, 0, settings)
        except UserError:
            return False
        return True

    def _job(
        self,
        rival: str,
        point: Point,
        stage: Stage,
        trial: int,
        seed: int,
        settings: Mapping[str, Any],
        before: tuple[RunRow, ...] = (),
    ) -> Job:
        config = self._config(rival, point, settings, seed)
        knob = residual = None
        if point.budget is not None:
            config, knob, residual = self._matched(config, point.budget, rival)
        return Job(rival, point, stage, trial, seed, dict(settings), config, knob, residual, before)

    def _config(self, rival: str, point: Point, settings: Mapping[str, Any], seed: int) -> Config:
        raw = overlay(self.base, {"model": self.recipe.rivals[rival]})
        for changes_ in (nested(dict(settings)), point.config, {"training": {"seed": seed}}):
            raw = overlay(raw, changes_)
        raw["training"].setdefault("threads", 1)  # however many run at the same time: results are the same
        return parse(Config, raw, f"{self.recipe.title}: {rival}")

    def _matched(self, config: Config, budget: float, rival: str) -> tuple[Config, str, float]:
        """The config at the width that meets the budget, what was turned, and by how much it misses."""
        model = spelled_out(config).model
        key = json.dumps([self.recipe.match, budget, model.model_dump(mode="json")], sort_keys=True)
        key = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        if key not in self._solved:
            try:
                self._solved[key] = self._solve(config, model, budget)
            except UserError as error:
                raise UserError(f"rival {rival}: {error}") from None
            write_text(self._file, json.dumps(self._solved, indent=1) + "\n")
        found = self._solved[key]
        solved = parse(ModelConfig, found["model"], str(self._file))
        return config.model_copy(update={"model": solved}), found["knob"], found["residual"]

    def _solve(self, config: Config, model: ModelConfig, budget: float) -> dict[str, Any]:
        encoded = self.layout
        layout, tasks = x0_layout(model, config.log_schema, encoded), encoded.tasks
        if self.recipe.match == "latency":
            return self._solve_latency(config, model, budget)
        if self.recipe.match == "parameters":
            cost, what = scorer_parameters, "parameters"
        else:
            cost, what = scorer_flops, "FLOPs per example"
        found = meet_budget(model, layout, lambda each: cost(each, layout, tasks), budget, what=what)
        knob = ", ".join(f"{name}={value}" for name, value in found.settings.items()) or "as it is"
        return {"model": _plain(found.subject), "knob": knob, "residual": found.residual}

    def _solve_latency(self, config: Config, model: ModelConfig, budget: float) -> dict[str, Any]:
        device = str(pick_device(config.training.device))
        target = Target(model, config.training, config.log_schema, self.layout)
        solved = meet(target, f"latency={budget}", device=device).model
        took = 1e3 * LatencyMeter(config.log_schema, self.layout, 1, device=device)(solved)
        turned = changes(_plain(model), _plain(solved))
        knob = ", ".join(turned) or "as it is"
        return {"model": _plain(solved), "knob": knob, "residual": took / budget - 1}


def _plain(model: ModelConfig) -> dict[str, Any]:
    raw: dict[str, Any] = model.model_dump(mode="json")
    return raw


def refuse_others(planner: Planner, rows: Sequence[RunRow], jobs: Sequence[Job], out: Path) -> None:
    """Refuses a folder whose rows are of another recipe.

    Args:
        planner: of the recipe.
        rows: those in the folder.
        jobs: what the recipe asks for, as far as it is known.
        out: the folder.

    Raises:
        UserError: a row was made with another config than the recipe's of the same name.
    """
    asked = {job.identity: job for job in jobs}
    remedy = f"Set the recipe back, remove {out}, or name another folder with --out"
    for row in rows:
        job = asked.get(row_identity(row))
        if job is None:
            continue
        if row.stage == "tune" and not planner.check_trial(row):
            raise UserError(
                f"{out}: {job} was of other settings than tuning.space has ({row.settings}). {remedy}"
            )
        if row.config_hash != job.config_hash:
            raise UserError(f"{out}: {job} was of another recipe{_difference(out / row.run, job)}. {remedy}")


def _difference(run: Path, job: Job) -> str:
    from mldcn.config import load_config

    try:
        found = changes(counting(load_config(run / "config.yaml")), job.counts)
    except UserError:
        return ""
    return f" ({'; '.join(found[:3])})" if found else ""


def _look_up(raw: dict[str, Any], key: str) -> Any:
    node: Any = raw
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            raise UserError(
                f"tuning: no config key {key!r} for every rival; keys of one rival belong in tuning.own"
            )
        node = node[part]
    return node


def step_seconds(job: Job, layout: EncodedLayout) -> float:
    """Seconds of a training step, measured on random rows with as many threads as a run has."""
    config, kept = job.config, torch.get_num_threads()
    torch.set_num_threads(config.training.threads or 1)
    try:
        with torch.random.fork_rng():
            model = Ranker(config.model, config.log_schema, layout).train()
            step = TrainingStep(model, config.training)
            batch = sample_batch(layout, config.training.batch_size)
            step(batch)
            times = []
            for _ in range(TIMED_STEPS):
                start = time.perf_counter()
                step(batch)
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(kept)
    return statistics.median(times)


class Estimates:
    """Seconds that runs will take: those of finished runs of the same rival and point, or else a measured step's.

    A step's are for all epochs that the config allows, until finished runs say how many are taken.
    """

    def __init__(self, data: EncodedData) -> None:
        self._data = data
        self._steps: dict[tuple[str, str], float] = {}

    def measure(self, jobs: Sequence[Job]) -> None:
        """Times a step of each model of which no run is there yet."""
        for job in jobs:
            if (job.rival, job.point.name) not in self._steps:
                self._steps[job.rival, job.point.name] = self._at_most(job)

    def seconds(self, job: Job, rows: Sequence[RunRow]) -> float:
        """Of one run.

        Args:
            job: the run.
            rows: of the runs that are finished.
        """
        same = [row.seconds for row in rows if (row.rival, row.point) == (job.rival, job.point.name)]
        if same:
            return statistics.fmean(same)
        at_most = self._steps.get((job.rival, job.point.name), 0.0)
        known = [(row.seconds, self._steps.get((row.rival, row.point), 0.0)) for row in rows]
        shares = [taken / most for taken, most in known if most]
        return at_most * (statistics.median(shares) if shares else 1.0)

    def _at_most(self, job: Job) -> float:
        training = job.config.training
        steps = training.epochs * -(-len(self._data.train) // training.batch_size)
        return steps * step_seconds(job, self._data.encoder.layout)
