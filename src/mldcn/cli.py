"""The command line: one thin layer over the Python API; a command is a call."""

from __future__ import annotations

import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mldcn import __version__
from mldcn.errors import UserError

if TYPE_CHECKING:
    from mldcn.config import Config
    from mldcn.training.warm_start import WarmStart

app = typer.Typer(
    name="mldcn",
    help="Train, evaluate and compare ranking models (ML-DCN and its rivals) on a log of impressions.",
    no_args_is_help=True,
    # Plain text: to load Rich for its colours would take longer than all the rest of --help.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
data_app = typer.Typer(help="Named logs: what they are, fetching, preparing.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path, typer.Argument(help="the YAML file that 'mldcn init' wrote", show_default=False)]
RunPath = Annotated[Path, typer.Argument(help="a run's folder", show_default=False)]
RejectsPath = Annotated[
    Path | None,
    typer.Option("--rejects", help="a .csv for the log's bad rows, where data.on_error is skip"),
]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="change a config key, e.g. training.epochs=3")
]


class Statistics(StrEnum):
    """What a warm start does with numeric transforms and bucket boundaries."""

    keep = "keep"
    refresh = "refresh"


class Optimiser(StrEnum):
    """What a warm start does with the optimisers' state."""

    keep = "keep"
    restart = "restart"


class ExportTarget(StrEnum):
    """What an exported program is made for."""

    aoti = "aoti"
    onnx = "onnx"
    torch_export = "torch-export"


class ExportDType(StrEnum):
    """Numbers that an exported program works with."""

    fp32 = "fp32"
    bf16 = "bf16"


class ExportTables(StrEnum):
    """How the numbers of exported tables are written."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class ServeControl(StrEnum):
    """When a server looks at its models' folders again."""

    none = "none"
    poll = "poll"
    explicit = "explicit"


def main() -> None:
    """Runs the command line; a mistake ends in a message and exit code 1, without a traceback."""
    try:
        app()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt as interrupt:
        fail(str(interrupt) or "interrupted", code=130)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        from mldcn.files import no_room

        remedy = "; free some space and run the command again" if no_room(error) else ""
        fail(f"{error.filename or 'system'}: {error.strerror or error}{remedy}")
    except Exception as error:
        fail(f"internal error, {type(error).__name__}: {error}; please report what --traceback shows")


def fail(message: str, code: int = 1) -> None:
    """Prints an error (and, with MLDCN_TRACEBACK=1, where it arose) and exits."""
    if os.environ.get("MLDCN_TRACEBACK"):
        traceback.print_exc()
    sys.stderr.write(f"mldcn: {message}\n")
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mldcn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="show where an error arose, for a bug report")
    ] = False,
) -> None:
    if show_traceback:
        os.environ["MLDCN_TRACEBACK"] = "1"


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def export(
    run: RunPath,
    to: Annotated[
        ExportTarget,
        typer.Option(help="compiled for this machine, for ONNX Runtime, or for any PyTorch of this version"),
    ] = ExportTarget.torch_export,
    out: Annotated[Path | None, typer.Option(help="the bundle's folder; RUN-<to> by default")] = None,
    dtype: Annotated[ExportDType, typer.Option(help="of the dense weights and the work")] = ExportDType.fp32,
    embeddings: Annotated[ExportTables, typer.Option(help="of the embedding tables")] = ExportTables.fp32,
    device: Annotated[str, typer.Option(help="that aoti compiles for")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="replace the bundle if it is there")] = False,
) -> None:
    """Writes a run as a bundle for serving: preprocessing, tables and a program that needs no training code.

    Example: mldcn export runs/mldcn --to onnx --out bundles/mldcn
    """
    from mldcn.console import out as screen
    from mldcn.predict import Predictor
    from mldcn.serving.export import export_run

    target = out or run.resolve().with_name(f"{run.resolve().name}-{to.value}")
    made = export_run(
        Predictor.load(run, "cpu"),
        to.value,
        target,
        dtype=dtype.value,
        embeddings=embeddings.value,
        device=device,
        overwrite=force,
    )
    screen.print(
        f"wrote {target}: {sum(made.sizes.values()):,} bytes in {len(made.sizes)} files\n"
        f"its probabilities differ from the run's by at most {made.difference:.2g} on {made.rows:,} made-up rows\n"
        f"next:\n  mldcn serve {target}",
        markup=False,
    )


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FOLDER...",
            help="runs, bundles, or folders of such by model, or by model and version; later ones are newer",
            show_default=False,
        ),
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="for HTTP; 0 takes a free one")] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=-1, max=65535, help="0 takes a free one, -1 is no gRPC")
    ] = 8001,
    device: Annotated[str, typer.Option(help="where to compute")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="of a batch's computation; PyTorch's choice")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="batches that are scored at the same time")] = 1,
    batch_rows: Annotated[int, typer.Option(min=1, help="a batch takes no more requests from here on")] = 512,
    batch_delay_ms: Annotated[float, typer.Option(min=0, help="a request waits so long for others")] = 1.0,
    queue_rows: Annotated[int, typer.Option(min=1, help="more may not wait: 503 at once")] = 8192,
    timeout_ms: Annotated[float, typer.Option(min=1, help="the longest that a request may take")] = 10_000.0,
    max_rows: Annotated[int, typer.Option(min=1, help="rows or candidates of a request")] = 10_000,
    max_body_mb: Annotated[int, typer.Option(min=1, help="of a request, unpacked")] = 16,
    control: Annotated[
        ServeControl, typer.Option(help="when folders are looked at again; SIGHUP does it always")
    ] = ServeControl.none,
    poll_seconds: Annotated[float, typer.Option(min=0.1, help="with --control poll")] = 5.0,
    canary: Annotated[
        float | None, typer.Option(min=0, max=1, help="share of users for the newest version, of two")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="file with the token that callers must send")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM file of the certificate chain, for TLS")
    ] = None,
    private_key: Annotated[Path | None, typer.Option(help="PEM file of its key")] = None,
    shutdown_delay: Annotated[float, typer.Option(min=0, help="seconds from 'not ready' to the end")] = 0.0,
    access_log: Annotated[bool, typer.Option(help="a JSON line for each request")] = True,
) -> None:
    """Serves models: Open Inference Protocol v2 by HTTP and gRPC, and POST /v1/rank.

    Example: mldcn serve runs/mldcn
    """
    try:
        from mldcn.serving.calls import write_logs
        from mldcn.serving.server import Server
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}; run: pip install 'mldcn[serve]'") from None
    from mldcn.console import err
    from mldcn.serving.options import Batching, Limits, Options, read_token
    from mldcn.serving.repository import parse_path

    write_logs(requests=access_log)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    options = Options(
        host=host,
        http_port=port,
        grpc_port=None if grpc_port < 0 else grpc_port,
        device=device,
        limits=Limits(body_bytes=max_body_mb << 20, rows=max_rows, seconds=timeout_ms / 1000),
        batching=Batching(batch_rows, batch_delay_ms / 1000, queue_rows, workers),
        control=control.value,
        poll_seconds=poll_seconds,
        canary=canary,
        token=None if token_file is None else read_token(token_file),
        certificate=certificate,
        private_key=private_key,
        shutdown_delay=shutdown_delay,
    )
    server = Server([parse_path(model) for model in models], options)
    server.run(
        lambda at: err.print(f"listening at {at.http}, gRPC at {at.grpc or 'no port'}", markup=False),
        lambda at: err.print(f"ready: {', '.join(server.repository.models)}; {at.http}/docs", markup=False),
    )


@app.command()
def compare(
    a: RunPath,
    b: RunPath,
    log: Annotated[list[Path], typer.Option(help="compare on this log, not on the runs' own test rows")] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="bootstrap samples")] = 1000,
    rejects: RejectsPath = None,
) -> None:
    """Shows the difference of two runs on the same rows, with intervals and p-values.

    Example: mldcn compare runs/mldcn runs/dcnv2
    """
    from mldcn import workflow
    from mldcn.console import out as screen
    from mldcn.console import table, warn_of_rejects
    from mldcn.data.rejects import RejectsFile

    with RejectsFile(rejects) as bad:
        comparison = workflow.compare(a, b, [str(path) for path in log], repeats=repeats, rejects=bad)
    warn_of_rejects(bad.count, bad.first, rejects)
    rows = [
        [
            task,
            metric,
            d.method,
            d.a,
            d.b,
            f"{d.delta:+.5f}",
            f"[{d.low:+.5f}, {d.high:+.5f}]",
            f"{d.p_value:.4f}",
        ]
        for task, metric, d in comparison.differences
    ]
    columns = ["task", "metric", "method", "A", "B", "B - A", "95 % interval", "p"]
    table(f"A = {a}, B = {b}, {comparison.rows:,} rows", columns, rows)
    for line in comparison.verdicts():
        screen.print(line, markup=False)


@app.command()
def explain(
    run: RunPath,
    log: Annotated[
        list[Path], typer.Option(help="a log with labels to look with, not the run's test rows")
    ] = [],  # noqa: B006
    row: Annotated[int, typer.Option(min=0, help="the row, from 0 on, whose masks are shown")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder; RUN/explain by default")] = None,
    rejects: RejectsPath = None,
) -> None:
    """Shows what a run learned: importance of features, crossed fields, spectra of weights, masks.

    Example: mldcn explain runs/mldcn
    """
    from mldcn import workflow
    from mldcn.console import EncodingProgress, explain_tables, warn_of_rejects
    from mldcn.console import out as screen
    from mldcn.data.rejects import RejectsFile
    from mldcn.run import RunFolder

    progress = EncodingProgress()
    try:
        with RejectsFile(rejects) as bad:
            found, page = workflow.explain(
                RunFolder.open(run),
                [str(path) for path in log],
                row=row,
                out=out,
                encoding=progress,
                rejects=bad,
            )
    finally:
        progress.close()
    warn_of_rejects(bad.count, bad.first, rejects)
    explain_tables(found)
    screen.print(f"report: {page}", markup=False)


@app.command()
def models() -> None:
    """Lists the interaction architectures: paper, width knobs, interaction order, cost.

    Example: mldcn fit mldcn.yaml --set model.interaction.name=masknet_parallel
    """
    from mldcn import interactions
    from mldcn.console import models_table

    models_table([interactions.info(name) for name in interactions.names()])


@app.command()
def cost(
    model: Annotated[str, typer.Argument(help="an architecture's name, a config's YAML file, or a run")],
    schema: Annotated[
        Path | None, typer.Option(help="a YAML file: schema, as in a config, or tables (name: rows), or both")
    ] = None,
    fields: Annotated[int, typer.Option(min=1, help="of a plain log, where there is no schema")] = 26,
    width: Annotated[int | None, typer.Option(min=1, help="of every table; 16 by default")] = None,
    rows: Annotated[int, typer.Option(min=3, help="of a table whose size nothing tells")] = 100_000,
    settings: Settings = [],  # noqa: B006
    budget: Annotated[
        str | None,
        typer.Option(help="turn the widths until flops=2e6, parameters=1e6 or latency@256=0.5 (ms) is met"),
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="of a request")] = 500,
    batch_sizes: Annotated[str, typer.Option(help="rows scored at once, by commas")] = "1,16,256,4096",
    latency: Annotated[bool, typer.Option("--latency", help="measure the time to score each batch")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="training's peak, estimated and measured")] = False,
    device: Annotated[str, typer.Option(help="where to measure")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="a file for the same as data")] = None,
) -> None:
    """Shows what a model costs: FLOPs, parameters, memory traffic; with --memory and --latency, measures.

    Example: mldcn cost mldcn --set interaction.rank=128 --budget flops=2e6
    """
    from json import dumps

    from mldcn import cost as costs
    from mldcn.console import cost_tables, latency_table, memory_table
    from mldcn.files import write_text
    from mldcn.model import pick_device

    device = str(pick_device(device))
    sizes = costs.parse_sizes(batch_sizes)
    target = costs.load_target(model, settings, schema, fields=fields, width=width, rows=rows)
    if budget is not None:
        target = costs.meet(target, budget, device=device)
    found = costs.model_cost(target.model, target.schema, target.layout)
    cost_tables(target, found, candidates, sizes)
    peaks = timings = None
    if memory:
        from mldcn.training.step import TrainingStep

        training = target.under(lambda ranker: TrainingStep(ranker, target.training), device)
        peaks = {"estimated": costs.estimate_memory(training), "measured": costs.measure_memory(training)}
        memory_table(training.batch_size, peaks)
    if latency:
        flops = costs.total(found.example).gemm
        timings = costs.measure_latency(
            target.model, target.schema, target.layout, flops, batch_sizes=sizes, device=device
        )
        latency_table(timings)
    if json is not None:
        data = costs.summary(target, found, candidates, sizes, peaks, timings)
        write_text(json, dumps(data, indent=2) + "\n")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the log, the runs and the report")] = Path("demo"),
    rows: Annotated[int, typer.Option(help="impressions to generate")] = 300_000,
    seed: Annotated[int, typer.Option(help="of the log and the models")] = 0,
) -> None:
    """Generates an ads log, trains ML-DCN and its closest rivals at equal FLOPs, and writes a report.

    Example: mldcn demo --rows 100000
    """
    from mldcn.demo import run_demo

    run_demo(out, rows, seed)


@app.command()
def study(
    recipe: Annotated[Path, typer.Argument(help="a recipe, as in recipes/")],
    source: Annotated[Path | None, typer.Option(help="the log, as its publisher gives it")] = None,
    out: Annotated[Path | None, typer.Option(help="folder; results/<recipe> by default")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="runs at the same time; as many as there are cores")
    ] = None,
    only: Annotated[list[str], typer.Option(help="RIVAL or RIVAL@BUDGET: train nothing else now")] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and train nothing")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="write the report of what is finished so far")
    ] = False,
) -> None:
    """Trains a recipe's models at equal cost and tuning effort over several seeds; goes on where it was.

    A recipe may grow by a seed, a rival, a budget or trials: only what is new is trained. Recipes of kind
    polynomials fit models to known functions, and need no log.

    Example: mldcn study recipes/movielens-1m.yaml --source ml-1m --jobs 2
    """
    from mldcn.console import err
    from mldcn.console import out as screen
    from mldcn.study import load_recipe, load_study, run_study
    from mldcn.study.polynomials import load_polynomials, run_polynomials
    from mldcn.study.report import write_report
    from mldcn.study_console import StudyProgress, results_table

    folder = out or Path("results") / recipe.stem
    if polynomials := load_polynomials(recipe):
        if source or only or dry_run or report_only:
            raise UserError(f"{recipe} draws its own rows: it takes --out and --jobs alone")
        say = lambda line: err.print(line, markup=False)  # noqa: E731
        run_polynomials(polynomials, folder, jobs=jobs or 1, say=say)
        screen.print((folder / "results.md").read_text(encoding="utf-8"), markup=False)
        return
    if report_only:
        found = load_study(folder)
    else:
        progress = StudyProgress()
        try:
            found = run_study(
                load_recipe(recipe), source, folder, jobs=jobs, only=only, dry_run=dry_run, watcher=progress
            )
        except KeyboardInterrupt:
            err.print(f"stopped; the same command goes on from there ({folder})", markup=False)
            raise typer.Exit(130) from None
        finally:
            progress.close()
        if dry_run:
            return
    screen.print(results_table(found))
    screen.print(f"report: {write_report(found)}", markup=False)


@data_app.command("encode")
def data_encode(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option(help="folder; by default the one that 'mldcn fit' looks for in runs/")
    ] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Encodes a config's log and trains nothing; started again, it goes on where it was interrupted.

    Example: mldcn data encode mldcn.yaml --set data.memory_mb=4096
    """
    from mldcn import workflow
    from mldcn.config import load_config
    from mldcn.console import EncodingProgress, warn_of_rejects
    from mldcn.console import out as screen
    from mldcn.data.prepare import REJECTS

    progress = EncodingProgress()
    try:
        folder, data = workflow.encode(load_config(config, settings), out, progress)
    finally:
        progress.close()
    warn_of_rejects(data.rejected, None, folder / REJECTS)
    parts = {"training": data.train, "validation": data.valid, "test": data.test}
    counts = ", ".join(f"{len(rows):,} {part} rows" for part, rows in parts.items() if rows is not None)
    had = " (they were there already)" if data.reused else ""
    screen.print(f"{folder}: {counts}{had}", markup=False)


@data_app.command("list")
def data_list() -> None:
    """Lists the logs that mldcn knows by name.

    Example: mldcn data list
    """
    from mldcn.console import table
    from mldcn.datasets import list_datasets

    rows = [[d.name, d.title, d.licence, "yes" if d.downloadable else "by hand"] for d in list_datasets()]
    table("named logs", ["name", "what", "licence", "download"], rows)


@data_app.command("describe")
def data_describe(name: Annotated[str, typer.Argument(help="a log's name")]) -> None:
    """Shows a named log's licence, citation and how to get it.

    Example: mldcn data describe movielens-1m
    """
    from mldcn.console import out as screen
    from mldcn.datasets import dataset

    screen.print(dataset(name).describe(), markup=False)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="a log's name")],
    out: Annotated[Path, typer.Option(help="folder for the log and its config")] = Path("data"),
    source: Annotated[
        Path | None, typer.Option(help="your own download: the file or folder; nothing is fetched then")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1000, help="impressions, for pinads")] = None,
) -> None:
    """Fetches a named log (or takes your download) and writes a log and a config that 'mldcn fit' reads.

    Example: mldcn data fetch movielens-1m --source ml-1m.zip
    """
    from mldcn import workflow
    from mldcn.console import out as screen
    from mldcn.datasets import dataset

    config = workflow.fetch(name, out, source, rows)
    screen.print(dataset(name).describe(), markup=False)
    screen.print(f"wrote {config}\nnext:\n  mldcn describe {config}\n  mldcn fit {config}", markup=False)
