"""Commands that make and use one run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mldcn.cli.arguments import ConfigFile, RejectsPath, RunPath, Settings
from mldcn.errors import UserError

if TYPE_CHECKING:
    from mldcn.config import Config
    from mldcn.training.warm_start import WarmStart


class Statistics(StrEnum):
    """What a warm start does with numeric transforms and bucket boundaries."""

    keep = "keep"
    refresh = "refresh"


class Optimiser(StrEnum):
    """What a warm start does with the optimisers' state."""

    keep = "keep"
    restart = "restart"


def init(
    log: Annotated[list[Path], typer.Argument(help="CSV, TSV or Parquet files of one log")],
    out: Annotated[Path, typer.Option(help="the config to write")] = Path("mldcn.yaml"),
    label: Annotated[str | None, typer.Option(help="the label's column, where the guess is wrong")] = None,
    columns: Annotated[
        str | None, typer.Option(help="names of the columns, by commas, of a log without a header")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it is there")] = False,
) -> None:
    """Reads a log and writes a commented config for it.

    Example: mldcn init impressions.csv
    """
    from mldcn.config import DataConfig
    from mldcn.console import err
    from mldcn.console import out as screen
    from mldcn.data.inference import infer, to_yaml
    from mldcn.files import write_text

    if out.exists() and not force:
        raise UserError(f"{out}: exists already; name another file with --out, or replace it with --force")
    named = DataConfig(header=False, column_names=tuple(columns.split(","))) if columns else DataConfig()
    inferred = infer([str(path) for path in log], named, label=label)
    write_text(out, to_yaml(inferred, [str(path) for path in log]))
    for leak in inferred.leaks:
        err.print(f"warning: {leak.name} looks like a leak and is left out: {leak.reason}", markup=False)
    if inferred.at_least is not None:
        err.print(
            f"warning: {inferred.label} holds more than 0 and 1; {inferred.at_least:g} and more, "
            f"{inferred.positives:.1%} of the rows, count as positive",
            markup=False,
        )
    screen.print(
        f"wrote {out}: read it, mend what was guessed wrong, then run\n"
        f"  mldcn describe {out}\n  mldcn fit {out}",
        markup=False,
    )


def describe(config: ConfigFile, settings: Settings = []) -> None:  # noqa: B006
    """Shows what a config's schema makes of its log: coverage, cardinality, top values, label rates.

    Example: mldcn describe mldcn.yaml
    """
    from mldcn.config import load_config
    from mldcn.console import EncodingProgress, description_tables
    from mldcn.data.describe import describe as describe_log

    progress = EncodingProgress()
    try:
        description = describe_log(load_config(config, settings), progress)
    finally:
        progress.close()
    description_tables(description)


def fit(
    config: Annotated[Path | None, typer.Argument(help="the YAML file that 'mldcn init' wrote")] = None,
    out: Annotated[
        Path | None, typer.Option(help="the run's folder; runs/<config>-<interaction> by default")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this interrupted run")] = None,
    warm_start: Annotated[
        Path | None, typer.Option(help="begin with this finished run's weights and vocabularies")
    ] = None,
    statistics: Annotated[
        Statistics, typer.Option(help="with --warm-start: the run's numeric transforms, or anew from the log")
    ] = Statistics.keep,
    optimiser: Annotated[
        Optimiser, typer.Option(help="with --warm-start: the optimisers' state; see training.keep_optimiser")
    ] = Optimiser.restart,
    repeats: Annotated[
        int | None, typer.Option(min=2, help="train so many copies, by seed, and tell how far they differ")
    ] = None,
    settings: Settings = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="replace the run if it is there")] = False,
) -> None:
    """Trains a model and leaves a run's folder with weights, metrics and a report.

    Example: mldcn fit mldcn.yaml --set model.interaction.name=dcnv2 --out runs/dcnv2
    """
    from mldcn import workflow
    from mldcn.config import load_config
    from mldcn.console import EncodingProgress, FitProgress, err, metrics_table
    from mldcn.console import out as screen
    from mldcn.run import RunFolder
    from mldcn.training.identity import monitored

    if (config is None) == (resume is None):
        raise UserError("name either a config to train, or a run to go on with: --resume RUN")
    start = _warm_start(warm_start, statistics, optimiser)
    if resume is not None:
        if start is not None or repeats is not None:
            raise UserError("--warm-start and --repeats are for a new run; a resumed one knows how it began")
        if settings:
            raise UserError("--set changes a new run; a resumed one goes on with its own config")
        if out is not None or force:
            raise UserError("--out and --force are for a new run; a resumed one goes on in its own folder")
        run = RunFolder.open(resume, finished=False)
        if run.info().get("status") == "finished":
            if not workflow.complete(run):
                raise UserError(f"{resume}: the run is finished; there is nothing to resume")
            screen.print(f"{resume}: the run is finished; wrote its report", markup=False)
            return
        loaded = load_config(run.config)
    else:
        assert config is not None
        loaded = load_config(config, settings)
        workflow.check(loaded, start)
        name = out or Path("runs") / f"{config.stem}-{loaded.model.interaction['name']}"
        if repeats is not None:
            _fit_copies(loaded, out or name.with_name(f"{name.name}-repeats"), repeats, start, force)
            return
        run = RunFolder(name)
    encoding = EncodingProgress()
    progress = FitProgress(monitored(loaded))
    try:
        summary = workflow.train(
            loaded,
            run,
            resume=resume is not None,
            overwrite=force,
            warm_start=start,
            encoding=encoding,
            observers=[progress],
        )
    except KeyboardInterrupt as error:
        begun = (
            run.path.exists() and run.info().get("status") != "finished"
        )  # else --force had nothing replaced
        hint = f"; go on with\n  mldcn fit --resume {run.path}" if begun else ""
        err.print(f"{str(error) or 'interrupted'}{hint}", markup=False)
        raise typer.Exit(130) from None
    finally:
        encoding.close()
        progress.close()
    metrics_table(str(run.path), summary.metrics)
    screen.print(
        f"report: {run.path / workflow.REPORT}\nnext:\n  mldcn predict {run.path} NEW_LOG --out scores.csv\n"
        f"  mldcn compare {run.path} ANOTHER_RUN",
        markup=False,
    )


def _warm_start(run: Path | None, statistics: Statistics, optimiser: Optimiser) -> WarmStart | None:
    if run is None:
        if (statistics, optimiser) != (Statistics.keep, Optimiser.restart):
            raise UserError("--statistics and --optimiser go with --warm-start RUN")
        return None
    from mldcn.training.warm_start import WarmStart

    return WarmStart.open(run, statistics.value, optimiser.value)


def _fit_copies(config: Config, out: Path, count: int, start: WarmStart | None, force: bool) -> None:
    """Trains copies of one model and shows how far they lie apart."""
    from mldcn.console import EncodingProgress, FitProgress, err, repeats_tables
    from mldcn.console import out as screen
    from mldcn.repeats import PAGE, run_repeats
    from mldcn.training.identity import monitored
    from mldcn.training.interrupt import Interrupted

    encoding = EncodingProgress()
    watchers: list[FitProgress] = []

    def watch(seed: int) -> list[FitProgress]:
        watchers.append(FitProgress(monitored(config)))
        return watchers[-1:]

    try:
        found = run_repeats(
            config, out, count, warm_start=start, overwrite=force, encoding=encoding, observers=watch
        )
    except Interrupted as error:
        err.print(f"{error}; the same command goes on from there", markup=False)
        raise typer.Exit(130) from None
    finally:
        encoding.close()
        for watcher in watchers:
            watcher.close()
    repeats_tables(str(out), found)
    screen.print(f"report: {out / PAGE}", markup=False)


def evaluate(
    run: RunPath,
    log: Annotated[list[Path], typer.Argument(help="files of a log with labels")] = [],  # noqa: B006
    rejects: RejectsPath = None,
) -> None:
    """Shows a run's metrics, or measures it on another log with labels.

    Example: mldcn evaluate runs/mldcn next_day.csv
    """
    from mldcn import workflow
    from mldcn.console import EncodingProgress, metrics_table, warn_of_rejects
    from mldcn.data.rejects import RejectsFile
    from mldcn.run import RunFolder

    folder = RunFolder.open(run)
    if not log:
        metrics_table(str(run), folder.read_json("metrics.json"))
        return
    progress = EncodingProgress()
    try:
        with RejectsFile(rejects) as bad:
            evaluation = workflow.evaluate_log(folder, [str(path) for path in log], progress, bad)
    finally:
        progress.close()
    warn_of_rejects(bad.count, bad.first, rejects)
    metrics_table(str(run), {"log": evaluation.metrics})


def predict(
    run: RunPath,
    log: Annotated[list[Path], typer.Argument(help="files of a log; labels are not needed")],
    out: Annotated[Path, typer.Option(help="the .csv or .parquet file to write")],
    keep: Annotated[list[str], typer.Option(help="a column of the log to copy beside the scores")] = [],  # noqa: B006
) -> None:
    """Scores the rows of a log, in its order.

    Example: mldcn predict runs/mldcn tomorrow.csv --out scores.csv --keep request_id --keep pin_id
    """
    from mldcn.console import out as screen
    from mldcn.console import warn_of_rejects
    from mldcn.predict import Predictor, predict_file

    scored = predict_file(Predictor.load(run), [str(path) for path in log], out, keep)
    screen.print(f"wrote {out}: {scored.rows:,} rows", markup=False)
    warn_of_rejects(scored.rejected, scored.first, scored.rejects)
