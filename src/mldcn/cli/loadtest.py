"""``mldcn loadtest``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mldcn.errors import UserError


class LoadTransport(StrEnum):
    """How requests are sent."""

    json = "json"
    arrow = "arrow"
    grpc = "grpc"


class LoadArrivals(StrEnum):
    """When requests leave at a given rate."""

    poisson = "poisson"
    constant = "constant"


def loadtest(
    url: Annotated[str, typer.Argument(help="of the server", show_default=False)],
    model: Annotated[str | None, typer.Option(help="to ask; not needed where there is one")] = None,
    transport: Annotated[
        LoadTransport, typer.Option(help="/v1/rank with JSON or Arrow, or Open Inference Protocol by gRPC")
    ] = LoadTransport.json,
    grpc: Annotated[
        str | None, typer.Option(help="HOST:PORT of gRPC; port 8001 of the host by default")
    ] = None,
    callers: Annotated[
        list[int] | None,
        typer.Option(min=1, help="who ask again when answered; repeat it for several levels"),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="requests a second; repeat it for several; shares of what the callers got by default"
        ),
    ] = None,
    arrivals: Annotated[LoadArrivals, typer.Option(help="of requests at a rate")] = LoadArrivals.poisson,
    seconds: Annotated[float, typer.Option(min=0.5, help="of each level")] = 10.0,
    warm_up: Annotated[float, typer.Option(min=0.1, help="seconds that do not count")] = 2.0,
    candidates: Annotated[
        str, typer.Option(help="of a request: 100, 20-500 (uniform) or lognormal:100 (the median)")
    ] = "lognormal:100",
    users: Annotated[int, typer.Option(min=1, max=10_000_000, help="who ask")] = 100_000,
    zipf: Annotated[float, typer.Option(min=0, help="exponent of the law by which users come")] = 1.1,
    log: Annotated[
        Path | None,
        typer.Option(help="Parquet or CSV file whose rows are asked about; else values are made up"),
    ] = None,
    timeout_ms: Annotated[float, typer.Option(min=1, help="a caller gives up after it")] = 10_000.0,
    token_file: Annotated[Path | None, typer.Option(help="file with the server's token")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of all that is drawn")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the report")] = Path("loadtest"),
) -> None:
    """Puts a server under load and reports latencies against throughput.

    Example: mldcn loadtest http://127.0.0.1:8000
    """
    try:
        import grpc as _  # noqa: F401

        from mldcn.loadtest.report import write
        from mldcn.loadtest.run import Plan, run
    except ModuleNotFoundError as error:
        raise UserError(f"loadtest needs {error.name}; run: pip install 'mldcn[loadtest]'") from None
    from mldcn.console import err
    from mldcn.console import out as screen
    from mldcn.serving.server.options import read_token

    plan = Plan(
        url,
        model,
        transport.value,
        grpc,
        callers or ([] if rate else [1, 8]),
        rate or None,
        arrivals.value,
        seconds,
        warm_up,
        candidates,
        users,
        zipf,
        log,
        None if token_file is None else read_token(token_file),
        timeout_ms / 1000,
        seed,
    )
    with err.status("asking the server") as status:
        result = run(plan, status.update)
    for step in result.steps:
        p99, longest = step.latencies[99.0], step.longest or 0.0
        late = f", longest {1000 * longest:.1f} ms" if p99 is None else f", p99 {1000 * p99:.1f} ms"
        load = f"{step.load:.0f} callers" if step.kind == "closed" else f"{step.load:.4g} sent a second"
        wrong = f", {sum(step.errors.values())} of {step.sent} not answered" if step.errors else ""
        screen.print(f"{load}: {step.throughput:.4g} answered a second{late}{wrong}", markup=False)
    screen.print(f"wrote {write(result, out)}", markup=False)
