"""What all runs of a study share: the log, its config, what is known of both."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mldcn import datasets
from mldcn.config import Config, TimeSplit, parse, read_yaml
from mldcn.data.passes import Progress
from mldcn.data.prepare import EncodedData, prepare
from mldcn.datasets.pinads import PinadsConfig, write_log
from mldcn.datasets.registry import PINADS_SIZE
from mldcn.errors import UserError
from mldcn.files import write_text
from mldcn.metrics import metric_info
from mldcn.model import pick_device
from mldcn.study.plan import Planner
from mldcn.study.recipe import Recipe, overlay
from mldcn.study.rows import FACTS, Facts, read_facts
from mldcn.training.identity import monitored

PACKAGES = ("mldcn", "torch", "numpy", "polars", "optuna")


@dataclass(frozen=True)
class Bench:
    """What all runs of a study share: the log, its config, the planner. before: seconds of earlier sessions."""

    recipe: Recipe
    out: Path
    data: EncodedData
    planner: Planner
    config: Config
    attainable: dict[str, float] | None
    before: float

    @classmethod
    def open(cls, recipe: Recipe, source: Path | None, out: Path, encoding: Progress | None = None) -> Bench:
        """Makes the log and encodes it, or takes those that are there.

        Args:
            recipe: the study.
            source: the log as its publisher gives it.
            out: the study's folder.
            encoding: told of the encoding's progress.

        Raises:
            UserError: the folder holds a study of another log.
        """
        raw = overlay(_dataset(recipe, source, out), recipe.config)
        raw = overlay(raw, {"data": {"encoded": str(out / "encoded")}, "training": {}})
        config = parse(Config, raw, recipe.title)
        data = prepare(config, out / "encoded", encoding)
        planner = Planner(recipe, raw, data.encoder.layout, out)
        attainable = _attainable(config, task_of(recipe, config))
        bench = cls(recipe, out, data, planner, config, attainable, 0.0)
        if not (out / FACTS).exists():
            return bench
        before, now = read_facts(out), bench.facts(0, 0.0)
        for name in ("dataset", "log", "rows", "features", "task", "monitor"):
            was, is_now = getattr(before, name), getattr(now, name)
            if was != is_now:
                raise UserError(
                    f"{out}: holds a study of another log or task ({name} was {was!r} and is {is_now!r}); set the "
                    "recipe back, remove the folder, or name another with --out"
                )
        return replace(bench, before=before.seconds)

    @property
    def threads(self) -> int:
        """Of each run."""
        return self.config.training.threads or 1

    @property
    def higher(self) -> bool:
        """Whether more of the monitored metric is better."""
        return bool(metric_info(monitored(self.config)[1]).higher_is_better)

    def facts(self, jobs: int, seconds: float) -> Facts:
        """What the study runs on."""
        splits = {"train": self.data.train, "valid": self.data.valid, "test": self.data.test}
        return Facts(
            dataset=self.recipe.dataset,
            log=dict(self.recipe.log),
            rows={name: len(rows) for name, rows in splits.items() if rows is not None},
            features=len(self.config.log_schema.features),
            task=task_of(self.recipe, self.config),
            monitor="/".join(monitored(self.config)),
            higher_is_better=self.higher,
            threads=self.threads,
            jobs=jobs,
            device=str(pick_device(self.config.training.device)),
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            versions={"python": platform.python_version(), **_versions()},
            seconds=self.before + seconds,
        )


def _dataset(recipe: Recipe, source: Path | None, out: Path) -> dict[str, Any]:
    """The log's config; the log itself is made once, so that a resumed study finds its encoded rows."""
    config = out / "dataset.yaml"
    if not config.exists():
        if recipe.log and source is None:
            if recipe.dataset != "pinads":
                raise UserError(f"{recipe.title}: log: only pinads is generated, {recipe.dataset} is not")
            options = dict(recipe.log)
            size = int(options.pop("rows", PINADS_SIZE))
            write_log(out / "log", size, parse(PinadsConfig, options, f"{recipe.title}: log"))
        _, raw = datasets.prepare(recipe.dataset, source, out / "log")
        write_text(config, yaml.safe_dump(raw, sort_keys=False))
    return read_yaml(config)


def task_of(recipe: Recipe, config: Config) -> str:
    """The task that is compared.

    Raises:
        UserError: the log has no such task.
    """
    tasks = config.log_schema.tasks
    if recipe.task is not None and recipe.task not in tasks:
        raise UserError(f"{recipe.title}: task {recipe.task!r} is none of {', '.join(tasks)}")
    return recipe.task or tasks[0]


def _attainable(config: Config, task: str) -> dict[str, float] | None:
    """What the true probabilities score on the test rows, where a log's maker knows them."""
    truth = [Path(file).parent / "truth.json" for file in config.data.train]
    split = config.data.split
    newest_tenth = isinstance(split, TimeSplit) and split.test == 0.1
    if not truth or not truth[0].exists() or not newest_tenth:
        return None
    found = json.loads(truth[0].read_text(encoding="utf-8"))["bayes"]["newest_tenth"].get(task, {})
    named = {metric: found.get(f"{metric}_on_labels") for metric in ("auc", "logloss")}
    return {metric: float(value) for metric, value in named.items() if value is not None} or None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
