"""Commands that compare and explain models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mldcn.cli.arguments import RejectsPath, RunPath, Settings
from mldcn.errors import UserError


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


def models() -> None:
    """Lists the interaction architectures: paper, width knobs, interaction order, cost.

    Example: mldcn fit mldcn.yaml --set model.interaction.name=masknet_parallel
    """
    from mldcn import interactions
    from mldcn.console import models_table

    models_table([interactions.info(name) for name in interactions.names()])


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
