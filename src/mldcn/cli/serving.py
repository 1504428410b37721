"""Commands that put a run to work: ``export`` and ``serve``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mldcn.cli.arguments import RunPath
from mldcn.errors import UserError

if TYPE_CHECKING:
    from mldcn.serving.server.options import Options
    from mldcn.serving.server.server import Server
    from mldcn.serving.server.supervisor import Supervisor


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
    int4 = "int4"


class ServeControl(StrEnum):
    """When a server looks at its models' folders again."""

    none = "none"
    poll = "poll"
    explicit = "explicit"


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
    validation: Annotated[
        list[Path],
        typer.Option(help="file of a log with labels: shows what the export costs in AUC"),
    ] = [],  # noqa: B006
    max_auc_loss: Annotated[
        float | None, typer.Option(help="refuse an export that may cost more, with --validation")
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(min=1, help="cut the cross layers' rank to it, with --validation and --max-auc-loss"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the bundle if it is there")] = False,
) -> None:
    """Writes a run as a bundle for serving: preprocessing, tables and a program that needs no training code.

    Example: mldcn export runs/mldcn --to onnx --out bundles/mldcn
    """
    from mldcn.console import out as screen
    from mldcn.predict import Predictor
    from mldcn.serving.export import export_run
    from mldcn.serving.validation import described

    target = out or run.resolve().with_name(f"{run.resolve().name}-{to.value}")
    made = export_run(
        Predictor.load(run, "cpu"),
        to.value,
        target,
        dtype=dtype.value,
        embeddings=embeddings.value,
        device=device,
        overwrite=force,
        validation_log=validation,
        max_auc_loss=max_auc_loss,
        max_rank=max_rank,
    )
    screen.print(
        f"wrote {target}: {sum(made.sizes.values()):,} bytes in {len(made.sizes)} files\n"
        f"its probabilities differ from the run's by at most {made.difference:.2g} on {made.rows:,} made-up rows\n"
        + "".join(f"{line}\n" for line in described(made.auc))
        + (f"FLOPs of the cross layers per row: {made.cut[0]:,} cut to {made.cut[1]:,}\n" if made.cut else "")
        + f"next:\n  mldcn serve {target}",
        markup=False,
    )


def upload(
    bundle: Annotated[Path, typer.Argument(help="what 'mldcn export' wrote", show_default=False)],
    to: Annotated[
        str, typer.Option(envvar="MLDCN_TABLES", help="the server: redis://HOST:6379/0, rediss:// for TLS")
    ],
    remove: Annotated[bool, typer.Option("--remove", help="remove them from there instead")] = False,
) -> None:
    """Writes a bundle's tables to a Redis server, for 'mldcn serve --tables'; again, to go on after a break.

    Example: mldcn upload bundles/mldcn --to redis://tables.internal/
    """
    from mldcn.console import out as screen
    from mldcn.serving.bundle import MANIFEST, plan_of, verified
    from mldcn.serving.engine import content_version
    from mldcn.serving.remote import remove_tables, upload_tables

    facts = verified(bundle, tables=not remove)
    plan, version = plan_of(facts), content_version(bundle / MANIFEST)
    if not plan:
        raise UserError(f"{bundle}: has its tables in its program; export the run to torch-export or aoti")
    if remove:
        remove_tables(version, plan, to)
        screen.print(f"removed the tables of {bundle}, version {version}", markup=False)
        return
    with screen.status("") as status:
        written = upload_tables(
            bundle / "tables",
            version,
            plan,
            to,
            lambda done, total: status.update(f"{done >> 20:,} of {total >> 20:,} MiB"),
        )
    screen.print(
        f"wrote {written:,} bytes; the tables of {bundle}, version {version}, are all there\n"
        f"next:\n  MLDCN_TABLES=... mldcn serve {bundle}  # which needs no tables/ any more",
        markup=False,
    )


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
    tables: Annotated[
        str | None,
        typer.Option(envvar="MLDCN_TABLES", help="redis://HOST/ that 'mldcn upload' wrote the tables to"),
    ] = None,
    tables_cache_mb: Annotated[
        int, typer.Option(min=0, help="with --tables: memory for the rows asked for last")
    ] = 256,
    processes: Annotated[
        int, typer.Option(min=1, help="that answer at the same ports, each with its own queue")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="of a batch's computation; the cores, shared by the processes")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="batches that are scored at the same time")] = 1,
    batch_rows: Annotated[int, typer.Option(min=1, help="a batch takes no more requests from here on")] = 512,
    batch_delay_ms: Annotated[float, typer.Option(min=0, help="a request waits so long for others")] = 1.0,
    queue_rows: Annotated[int, typer.Option(min=1, help="more may not wait: 503 at once")] = 8192,
    queue_ms: Annotated[
        float, typer.Option(min=1, help="503 at once to others while a request has waited longer")
    ] = 500.0,
    latency_ms: Annotated[
        str | None, typer.Option(help="like p99=10: cut batches and queue for it, as measured at warm-up")
    ] = None,
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
    log_requests: Annotated[
        Path | None, typer.Option(help="folder for sampled requests and their scores, for later training")
    ] = None,
    log_rate: Annotated[float, typer.Option(min=0, max=1, help="share of the requests logged there")] = 0.01,
    traces: Annotated[
        bool, typer.Option("--traces", help="send spans to where OTEL_EXPORTER_OTLP_ENDPOINT says")
    ] = False,
) -> None:
    """Serves models: Open Inference Protocol v2 by HTTP and gRPC, and POST /v1/rank.

    Example: mldcn serve runs/mldcn
    """
    try:
        from mldcn.serving.server.calls import write_logs
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}; run: pip install 'mldcn[serve]'") from None
    from mldcn.serving.remote import TableServer
    from mldcn.serving.server.options import (
        Batching,
        Budget,
        Limits,
        Options,
        RequestLogging,
        read_token,
    )

    write_logs(requests=access_log)
    options = Options(
        host=host,
        http_port=port,
        grpc_port=None if grpc_port < 0 else grpc_port,
        device=device,
        tables=None if tables is None else TableServer(tables, tables_cache_mb << 20),
        limits=Limits(body_bytes=max_body_mb << 20, rows=max_rows, seconds=timeout_ms / 1000),
        batching=Batching(batch_rows, batch_delay_ms / 1000, queue_rows, queue_ms / 1000, workers),
        latency=None if latency_ms is None else Budget.parse(latency_ms),
        control=control.value,
        poll_seconds=poll_seconds,
        canary=canary,
        token=None if token_file is None else read_token(token_file),
        certificate=certificate,
        private_key=private_key,
        shutdown_delay=shutdown_delay,
        processes=processes,
        threads=threads,
        access_log=access_log,
        request_log=None if log_requests is None else RequestLogging(log_requests, log_rate),
        traces=traces,
    )
    server = _server(models, options)
    # The console's package would bring PyTorch into a process that only leads others.
    server.run(
        lambda at: typer.echo(f"listening at {at.http}, gRPC at {at.grpc or 'no port'}", err=True),
        lambda at: typer.echo(f"ready: {', '.join(server.models)}; {at.http}/docs", err=True),
    )


def _server(models: list[str], options: Options) -> Server | Supervisor:
    try:
        if options.processes > 1:
            from mldcn.serving.server.supervisor import Supervisor

            return Supervisor(models, options)
        from mldcn.serving.server.repository import parse_path
        from mldcn.serving.server.server import Server
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}; run: pip install 'mldcn[serve]'") from None
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    return Server([parse_path(model) for model in models], options)
