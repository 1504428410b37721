"""A load test's report: one page, also as Markdown, with the figures as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from mldcn import __version__
from mldcn.files import write_text
from mldcn.loadtest.loops import PERCENTILES, Step
from mldcn.loadtest.run import Plan, Result
from mldcn.report.blocks import Block, Callout, Figure, Heading, KeyValues, Paragraph
from mldcn.report.latency import latency_curves
from mldcn.report.page import Page
from mldcn.report.plots import Curve
from mldcn.report.style import to_svg
from mldcn.report.table import Cell, Column, Table
from mldcn.report.text import number

_LATE = 0.005  # a generator that is so late itself does not measure the server any more
_TRANSPORTS = {
    "json": "JSON to /v1/rank",
    "arrow": "Arrow to /v1/rank",
    "grpc": "Open Inference Protocol by gRPC",
}


def write(result: Result, folder: Path) -> Path:
    """Writes ``report.html``, ``report.md`` with its pictures and tables, and ``result.json``; gives the first."""
    page = page_of(result)
    folder.mkdir(parents=True, exist_ok=True)
    page.write_files(folder)
    write_text(folder / "result.json", json.dumps(result.to_json(), indent=1) + "\n")
    return page.write(folder / "report.html")


def page_of(result: Result) -> Page:
    """The report."""
    open_steps = [step for step in result.steps if step.kind == "open"]
    closed_steps = [step for step in result.steps if step.kind == "closed"]
    page = Page(
        f"Load on {result.model}",
        subtitle=f"{result.url}, {result.begun}",
        footer=f"mldcn {__version__}, mldcn loadtest {result.url}",
    )
    page.add(_finding(open_steps or closed_steps), *_warnings(result))
    if open_steps:
        page.add(Heading("At given rates"), *_figure(open_steps))
        page.add(
            _table(
                open_steps,
                "rates",
                "sent a second",
                "Requests left at random times, whatever the answers did",
            )
        )
        page.add(
            Paragraph(
                "Latencies count from the time at which a request should have left, so that a server that stalls "
                "is charged for all who would have waited."
            )
        )
    if closed_steps:
        page.add(Heading("Callers in turn"))
        page.add(
            _table(closed_steps, "callers", "callers", "Each caller asks again as soon as it is answered")
        )
    page.add(Heading("How it was measured"), KeyValues(_settings(result)))
    return page


def _finding(steps: list[Step]) -> Block:
    kept = [step for step in steps if step.kept_up]
    if not kept:
        return Callout("The server kept up with none of these loads", "Try lower rates.", kind="warning")
    best = max(kept, key=lambda step: step.throughput)
    p99 = best.latencies[99.0] if best.latencies[99.0] is not None else best.longest
    text = f"Of all answers 99 % came within {number(1000 * (p99 or 0.0), '.3g')} ms."
    if len(kept) < len(steps):
        text += " With more load it fell behind or refused requests."
    return Callout(f"The server kept up with {number(best.throughput, '.3g')} requests a second", text)


def _warnings(result: Result) -> list[Block]:
    found: list[Block] = []
    if late := [step for step in result.steps if step.lag > _LATE]:
        worst = max(step.lag for step in late)
        found.append(
            Callout(
                "The load test itself was late",
                f"In {len(late)} of {len(result.steps)} steps more than 1 % of the requests left later than they "
                f"should have, by up to {number(1000 * worst, '.3g')} ms and more. That time is part of the "
                "latencies: give the load test a machine, or a core, of its own.",
                kind="warning",
            )
        )
    if result.plan.log is None:
        found.append(
            Callout(
                "Ids are made up",
                "Requests were varied from the server's sample: half of their ids are unknown to the model, so "
                "that fewer rows of its tables are read than by real traffic. Name a log with --log for real ids.",
            )
        )
    return found


def _figure(steps: list[Step]) -> list[Block]:
    series = []
    for i, each in enumerate(PERCENTILES):
        points = [(s.throughput, 1000 * v) for s in steps if (v := s.latencies[each]) is not None]
        if points:
            x, y = zip(*points, strict=True)
            series.append(Curve(f"p{each:g}", x, y, i))
    if not series:
        return []
    drawn = latency_curves(series, y_label="latency (ms)", x_label="right answers a second")
    alt = "Latency percentiles against answered requests a second; the table below has the numbers."
    return [Figure("latency", to_svg(drawn), "Latency against throughput", alt)]


def _table(steps: list[Step], name: str, load: str, caption: str) -> Table:
    columns = [
        Column(name=load, format=".4g"),
        Column(name="answered", unit="1/s", format=".4g"),
        *(Column(name=f"p{p:g}", unit="ms", format=".3g") for p in PERCENTILES),
        Column(name="max", unit="ms", format=".3g"),
        Column(name="errors", note="in per cent of the requests, by kind"),
    ]
    rows: list[list[Cell]] = []
    for step in steps:
        milliseconds = [None if v is None else 1000 * v for v in (*step.latencies.values(), step.longest)]
        wrong = ", ".join(
            f"{number(100 * times / step.sent, '.3g')} % {kind}" for kind, times in step.errors.items()
        )
        rows.append([f"{step.load:.4g}", step.throughput, *milliseconds, wrong or "none"])
    return Table(caption, columns, rows, name, ["A percentile needs answers enough to tell it."])


def _settings(result: Result) -> list[tuple[str, str]]:
    plan: Plan = result.plan
    origin = f"rows of {plan.log.name}" if plan.log else "varied from the server's sample"
    return [
        ("model", f"{result.model}, version {', '.join(result.versions)}"),
        ("transport", _TRANSPORTS[plan.transport]),
        ("arrivals", f"{plan.arrivals}, {plan.seconds:g} s a level after {plan.warm_up:g} s of warm-up"),
        ("candidates", f"{plan.candidates}, {number(result.rows, '.4g')} on average"),
        ("users", f"{plan.users:,}, by Zipf's law with exponent {plan.zipf:g}"),
        ("values", origin),
        ("request", f"{number(result.body_bytes, 'si')} bytes on average"),
        ("timeout", f"{plan.timeout:g} s"),
        ("generator's lag", f"p99 up to {number(1000 * max(s.lag for s in result.steps), '.3g')} ms"),
    ]
