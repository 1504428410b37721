"""Running a study: plan, run what is not finished yet, summarise. A killed study goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mldcn import datasets
from mldcn.config import Config, DataConfig, dump_config, load_config, parse, read_yaml
from mldcn.cost.budget import match_flops, scorer_flops, x0_layout
from mldcn.data.batch import EncodedLayout
from mldcn.data.prepare import prepare
from mldcn.errors import UserError
from mldcn.files import locked, write_text
from mldcn.metrics import metric_info
from mldcn.run import RunFolder
from mldcn.study.jobs import run_jobs
from mldcn.study.recipe import Recipe, nested, overlay
from mldcn.study.summary import Row, to_markdown
from mldcn.training.fit import fit
from mldcn.training.identity import monitored, spelled_out

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    rival: str
    trial: int
    seed: int
    folder: Path
    config: Config

    def __str__(self) -> str:
        return f"{self.rival} trial {self.trial} seed {self.seed}"


def run_study(
    recipe: Recipe, source: Path | None, out: Path, *, jobs: int = 1, say: Say = lambda _: None
) -> list[Row]:
    """Runs what is not finished yet and writes ``results.json`` and ``results.md``.

    Args:
        recipe: the study.
        source: the log as its publisher gives it; not needed for a log that is generated.
        out: folder for the log, the encoded rows, the runs and the results.
        jobs: runs at the same time, each with an equal share of the cores.
        say: told of the progress, a line a time.

    Returns:
        A row a rival.

    Raises:
        UserError: another process runs a study in the folder, a run is damaged or of another recipe, or a
            process that trained one was killed.
    """
    with locked(out):
        return _run_study(recipe, source, out, jobs, say)


def _run_study(recipe: Recipe, source: Path | None, out: Path, jobs: int, say: Say) -> list[Row]:
    base = overlay(_dataset(recipe.dataset, source, out), recipe.config)
    encoded = out / "encoded"
    base = overlay(base, {"data": {"encoded": str(encoded)}})
    first = parse(Config, overlay(base, _model(recipe, recipe.reference)), recipe.title)
    data = prepare(first, encoded, None)
    encoded_layout = data.encoder.layout
    layout = x0_layout(first.model, first.log_schema, encoded_layout)
    tasks = encoded_layout.tasks
    budget = scorer_flops(first.model, layout, tasks)
    say(f"{len(data.train):,} training rows, x0 of {layout.width} columns, {budget:,} FLOPs a model")

    def job(rival: str, trial: int, seed: int) -> Job:
        raw = overlay(overlay(base, _model(recipe, rival)), nested(recipe.trials()[trial]))
        config = parse(Config, overlay(raw, {"training": {"seed": seed}}), f"{recipe.title}: {rival}")
        config = _matched(config, recipe, rival, encoded_layout, budget)
        return Job(rival, trial, seed, out / "runs" / rival / f"trial-{trial:02d}-seed-{seed}", config)

    trials = range(len(recipe.trials()))
    tuning = [job(rival, trial, recipe.seeds[0]) for rival in recipe.rivals for trial in trials]
    _run_all(tuning, jobs, say)
    best = {rival: _best_trial([j for j in tuning if j.rival == rival]) for rival in recipe.rivals}
    final = [job(rival, best[rival], seed) for rival in recipe.rivals for seed in recipe.seeds]
    _run_all(final, jobs, say)
    rows = [
        _row(recipe, rival, best[rival], [j for j in final if j.rival == rival]) for rival in recipe.rivals
    ]
    write_text(out / "results.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    write_text(out / "results.md", to_markdown(recipe, rows))
    return rows


def _dataset(name: str, source: Path | None, out: Path) -> dict[str, Any]:
    """The log's config; the log itself is made once, so that a resumed study finds its encoded rows."""
    config = out / "dataset.yaml"
    if not config.exists():
        _, raw = datasets.prepare(name, source, out / "log")
        write_text(config, yaml.safe_dump(raw, sort_keys=False))
    return read_yaml(config)


def _model(recipe: Recipe, rival: str) -> dict[str, Any]:
    return {"model": recipe.rivals[rival]}


def _matched(config: Config, recipe: Recipe, rival: str, encoded: EncodedLayout, budget: int) -> Config:
    if rival == recipe.reference:
        return config
    # A rival, or a trial, may have embeddings of its own width.
    layout, tasks = x0_layout(config.model, config.log_schema, encoded), encoded.tasks
    return config.model_copy(update={"model": match_flops(config.model, layout, tasks, budget)})


def _run_all(planned: list[Job], jobs: int, say: Say) -> None:
    todo = [job for job in planned if not _finished(job)]
    say(f"{len(planned)} runs, {len(planned) - len(todo)} finished before")
    run_jobs(todo, _run, jobs, say)


def _run(job: Job, threads: int) -> str:
    """Trains one model in a process of its own; gives a line on how it went."""
    training = job.config.training.model_copy(update={"threads": threads})
    config = job.config.model_copy(update={"training": training})
    data = prepare(config, Path(str(config.data.encoded)), None)
    run = RunFolder(job.folder)
    with locked(run.path):
        resume = run.path.exists()
        if not resume:
            run = RunFolder.create(job.folder, dump_config(config))
        summary = fit(config, run, data, resume=resume)
    task, metric = monitored(config)
    return f"validation {metric} {summary.metrics['valid'][task][metric]:.5f}, {summary.seconds:.0f} s"


def _finished(job: Job) -> bool:
    """Whether the job's run is there and whole.

    Raises:
        UserError: another config was trained there, as after a change of the recipe, or the run is damaged.
    """
    run = RunFolder(job.folder)
    if not run.config.exists():
        return False
    if _what_counts(load_config(run.config)) != _what_counts(job.config):
        raise UserError(
            f"{job.folder}: holds a run of another config; has the recipe changed? Remove the folder, or name "
            "another with --out"
        )
    if run.info().get("status") != "finished":
        return False
    run.verify()
    return True


def _what_counts(config: Config) -> Config:
    """The config without what does not change a result: threads, and where the log lies."""
    config = spelled_out(config)
    training = config.training.model_copy(update={"threads": None})
    return config.model_copy(update={"training": training, "data": DataConfig()})


def _best_trial(tuned: list[Job]) -> int:
    def value(job: Job) -> float:
        task, metric = monitored(job.config)
        found = float(RunFolder(job.folder).read_json("metrics.json")["valid"][task][metric])
        if math.isnan(found):
            return -math.inf
        return found if metric_info(metric).higher_is_better else -found

    return max(tuned, key=value).trial


def _row(recipe: Recipe, rival: str, trial: int, final: list[Job]) -> Row:
    task = recipe.task or final[0].config.log_schema.tasks[0]
    runs = [RunFolder(job.folder) for job in final]
    infos = [run.info() for run in runs]
    metrics = [run.read_json("metrics.json") for run in runs]
    flops = {k: v for k, v in infos[0]["flops"].items() if k != "embedding"}
    return Row(
        rival=rival,
        interaction=dict(final[0].config.model.interaction),
        settings=recipe.trials()[trial],
        flops=sum(flops.values()),
        parameters=infos[0]["parameters"]["dense"],
        seeds=[job.seed for job in final],
        test=[of_splits["test"][task] for of_splits in metrics],
        valid=[of_splits["valid"][task] for of_splits in metrics],
        seconds=[info["train_seconds"] for info in infos],
    )
