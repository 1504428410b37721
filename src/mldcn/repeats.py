"""Copies of one model that differ by their seed alone: how far metrics and predictions lie apart.

The Homefeed paper asks of an architecture that its copies agree ("reproducibility": the deviation of a metric
over runs of one config). Two copies may have equal metrics and still score single ads apart; how far is told by
the mean absolute difference of their predictions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mldcn.comparison import Agreement, agreement
from mldcn.config import Config, load_config
from mldcn.errors import UserError
from mldcn.files import locked, write_text
from mldcn.report import Page
from mldcn.report.blocks import Heading, Paragraph
from mldcn.report.summary import metric_column, metric_names
from mldcn.report.table import Column, Table
from mldcn.run import RunFolder
from mldcn.training.identity import changes, spelled_out, what_counts
from mldcn.training.observers import Observer
from mldcn.training.warm_start import WarmStart
from mldcn.workflow import Encoding, complete, train

FORMAT = 1
FILE, PAGE = "repeats.json", "repeats.html"


@dataclass(frozen=True)
class Spread:
    """A metric over the copies: its mean, its sample standard deviation, and the values by seed."""

    mean: float
    deviation: float
    values: list[float]


@dataclass(frozen=True)
class Repeats:
    """What copies came to. ``metrics``: split -> task -> metric -> spread; ``predictions``: task -> agreement."""

    runs: list[str]
    seeds: list[int]
    metrics: dict[str, dict[str, dict[str, Spread]]]
    predictions: dict[str, Agreement]

    def rows(self, split: str) -> list[tuple[str, str, Spread]]:
        """(task, metric, spread) of a split."""
        return [
            (task, metric, spread)
            for task, metrics in self.metrics.get(split, {}).items()
            for metric, spread in metrics.items()
        ]


def run_repeats(
    config: Config,
    out: Path,
    count: int,
    *,
    warm_start: WarmStart | None = None,
    overwrite: bool = False,
    encoding: Encoding | None = None,
    observers: Callable[[int], Sequence[Observer]] = lambda _: (),
) -> Repeats:
    """Trains copies with the seeds from ``training.seed`` on, and measures how far they lie apart.

    The log is encoded once; a seed decides initialisation, shuffling and dropout. Copies that are finished are
    not trained again, so that an interrupted call goes on where it was.

    Args:
        config: the model; its split of the log is the same for all.
        out: gets a folder a copy, ``repeats.json``, ``repeats.html`` and ``repeats.md``.
        count: of copies, at least 2.
        warm_start: a finished run that every copy begins with.
        overwrite: train finished copies again.
        encoding: told of the encoding's progress.
        observers: gives those of a seed's training.

    Raises:
        UserError: ``out`` holds copies of another config, or the log changed between two copies.
        Interrupted: Ctrl-C or SIGTERM.
    """
    if count < 2:
        raise UserError(f"--repeats {count}: at least 2 copies are needed to compare")
    seeds = [config.training.seed + i for i in range(count)]
    with locked(out):
        runs = [
            _copy(
                _seeded(config, seed), out / f"seed-{seed}", warm_start, overwrite, encoding, observers(seed)
            )
            for seed in seeds
        ]
        found = summarise(runs, seeds)
        write_text(out / FILE, json.dumps({"format": FORMAT, **asdict(found)}, indent=2) + "\n")
        page = repeats_page(f"{out.name}: {count} copies", found)
        page.write(out / PAGE)
        write_text((out / PAGE).with_suffix(".md"), page.to_markdown())
    return found


def _seeded(config: Config, seed: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def _copy(
    config: Config,
    path: Path,
    warm_start: WarmStart | None,
    overwrite: bool,
    encoding: Encoding | None,
    observers: Sequence[Observer],
) -> RunFolder:
    """One copy: trained, gone on with, or found finished."""
    run = RunFolder(path)
    begun = not overwrite and run.config.exists()
    if begun:
        _check_same(run, config, warm_start)
        if run.info().get("status") == "finished":
            complete(RunFolder.open(path))
            return run
    train(
        config,
        run,
        resume=begun,
        overwrite=overwrite,
        warm_start=warm_start,
        encoding=encoding,
        observers=observers,
    )
    return run


def _check_same(run: RunFolder, config: Config, warm_start: WarmStart | None) -> None:
    """Refuses a folder that holds something else than the copy that is asked for."""
    adapted = warm_start.adapt(config) if warm_start is not None else config
    start = warm_start.note() if warm_start is not None else {}
    there = {key: value for key, value in run.info().get("warm_start", {}).items() if key != "tables"}
    found = changes(what_counts(spelled_out(load_config(run.config))), what_counts(spelled_out(adapted)))
    found += changes(there, start)
    if found:
        raise UserError(
            f"{run.path}: holds a copy of another config ({found[0]}); name another folder with --out, or "
            "train all copies again with --force"
        )


def summarise(runs: Sequence[RunFolder], seeds: Sequence[int]) -> Repeats:
    """How far finished copies lie apart.

    Raises:
        UserError: they were not trained and tested on the same rows.
    """
    logs = [run.info().get("data") for run in runs]
    for run, log in zip(runs, logs, strict=True):
        if log != logs[0]:
            raise UserError(
                f"{run.path}: was trained on other files than {runs[0].path}; train all copies again with --force"
            )
    measured = [run.read_json("metrics.json") for run in runs]
    metrics = {
        split: {
            task: {metric: _spread([m[split][task][metric] for m in measured]) for metric in values}
            for task, values in of_tasks.items()
        }
        for split, of_tasks in measured[0].items()
    }
    files = [run.predictions for run in runs]
    predictions = agreement(files) if all(file.exists() for file in files) else {}
    return Repeats([str(run.path) for run in runs], list(seeds), metrics, predictions)


def _spread(values: list[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)), values)


def repeats_page(title: str, found: Repeats) -> Page:
    """The page on copies of one model."""
    page = Page(title, subtitle=f"seeds {', '.join(map(str, found.seeds))}")
    page.add(
        Paragraph(
            "The copies share config, log and split, and differ by their seed: initialisation, order of the "
            "rows, dropout. A difference between two models that is not clearly larger than these deviations "
            "may be luck."
        )
    )
    for split in ("test", "valid"):
        if split in found.metrics:
            rows = {"test": "test rows", "valid": "validation rows"}[split]
            page.add(Heading(f"Metrics on the {rows}"), _metrics_table(found.metrics[split], rows))
    if found.predictions:
        page.add(Heading("Predictions"), _agreement_table(found.predictions))
    else:
        page.add(Paragraph("There are no test rows, so that predictions are not compared."))
    return page


def _metrics_table(metrics: Mapping[str, Mapping[str, Spread]], rows: str) -> Table:
    columns = [
        Column(name="Task"),
        Column(name="Metric"),
        Column(name="Mean", format=".5f"),
        Column(name="Deviation", format=".5f", note="sample standard deviation over the copies."),
        Column(name="Lowest", format=".5f"),
        Column(name="Highest", format=".5f"),
    ]
    cells: list[list[Any]] = []
    for task, values in metrics.items():
        for name in metric_names([dict.fromkeys(values, 0.0)]):
            s = values[name]
            cells.append([task, metric_column(name).name, s.mean, s.deviation, min(s.values), max(s.values)])
    return Table(
        f"Mean and spread over the copies, {rows}", columns, cells, name=f"repeats-{rows.split()[0]}"
    )


def _agreement_table(predictions: Mapping[str, Agreement]) -> Table:
    columns = [
        Column(name="Task"),
        Column(name="Rows", format=","),
        Column(name="Mean prediction", format=".5f"),
        Column(name="Mean absolute difference", format=".5f", note="over all rows and all pairs of copies."),
        Column(name="Relative to the mean prediction", format=".2%"),
    ]
    cells = [(task, a.rows, a.mean, a.difference, a.relative) for task, a in predictions.items()]
    return Table("How far the copies' predictions lie apart", columns, cells, name="repeats-predictions")
