"""The page of an explanation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from mldcn.explain import pictures
from mldcn.explain.cross_section import cross_section
from mldcn.explain.explanation import Explanation
from mldcn.explain.importance import Importance
from mldcn.explain.mask_section import mask_section
from mldcn.explain.wording import SOURCES, findings, reading
from mldcn.report.blocks import Block, Bullets, Callout, Details, Figure, Figures, Heading, Paragraph
from mldcn.report.page import Page
from mldcn.report.plots import Point, intervals, to_svg
from mldcn.report.table import Cell, Column, Interval, Label, Table
from mldcn.report.text import number, slug


def explanation_page(found: Explanation, footer: str = "") -> Page:
    """The page that shows an explanation: importance, crossed fields, spectra, masks."""
    title = f"What {found.run} learned"
    page = Page(title, subtitle=f"{found.title}; {_rows(found)}", footer=footer)
    page.add(Callout("In short", " ".join(findings(found))))
    page.add(*_importance(found), *cross_section(found), *mask_section(found))
    page.add(Heading("How to read this"), Bullets(list(reading(found))))
    return page


def _rows(found: Explanation) -> str:
    part = "all" if found.rows == found.total else f"{found.rows:,} of"
    return f"looked at with {part} {found.total:,} rows: {found.where}"


def _importance(found: Explanation) -> Iterator[Block]:
    yield Heading("Features by what is lost without them")
    yield Paragraph(
        f"A feature's encoded values were permuted among the rows, {found.repeats} times, with everything "
        "else as it is. The more the model loses, the more it lives on the feature."
    )
    first, *others = found.metrics
    yield Figures([_importance_figure(found, first)])
    table = importance_table(found, first, found.ranked(first), found.importances, "features")
    yield Details(f"All features on {first}, AUC and log loss", [table]) if others else table
    if others:
        shown: list[Block] = [Figures([_importance_figure(found, task) for task in others])]
        shown += [
            importance_table(found, task, found.ranked(task), found.importances, "features")
            for task in others
        ]
        yield Details(f"The other tasks: {', '.join(others)}", shown)
    if found.groups:
        ranked = [i for i in found.groups if (i.task, i.metric) == (first, "auc")]
        ranked.sort(key=lambda i: -i.drop)
        yield importance_table(found, first, ranked, found.groups, "sources")


def _importance_figure(found: Explanation, task: str) -> Figure:
    ranked = found.ranked(task)
    shown = ranked[: pictures.FIELDS]
    on = f" on {task}" if len(found.metrics) > 1 else ""
    cut = f" The {len(shown)} most important of {len(ranked)} features." if len(shown) < len(ranked) else ""
    auc = number(found.metrics[task]["auc"], ".4f")
    drawn = intervals([Point(i.feature, i.drop, i.low, i.high) for i in shown], x_label=f"AUC lost{on}")
    return Figure(
        f"importance-{slug(task)}",
        to_svg(drawn),
        f"AUC lost{on} when a feature is permuted",
        f"AUC lost{on} by feature, with intervals",
        f"Bars are 95% intervals; as the rows are, the AUC is {auc}.{cut}",
    )


def importance_table(
    found: Explanation,
    task: str,
    ranked: Sequence[Importance],
    of: Sequence[Importance],
    name: Literal["features", "sources"],
) -> Table:
    """A task's importances as a table.

    Args:
        found: what was found.
        task: the task.
        ranked: a row each.
        of: all importances, those of the log loss too.
        name: whether they are of features, or of all features of a source together.
    """
    on = f" on {task}" if len(found.metrics) > 1 else ""
    what = "Features permuted" if name == "features" else "All features of a source permuted together"
    losses = {i.feature: i for i in of if (i.task, i.metric) == (task, "logloss")}
    source = dict(zip(found.fields, found.sources, strict=True))
    rows: list[list[Cell]] = []
    for i in ranked:
        loss = losses[i.feature]
        own = source.get(i.feature) if name == "features" else None
        label = i.feature if name == "features" else SOURCES.get(i.feature, i.feature)
        rows.append(
            [
                Label(label, SOURCES.get(own or "", "")),
                Interval(i.drop, i.low, i.high),
                Interval(loss.drop, loss.low, loss.high),
                "yes" if i.low > 0 else "no",
            ]
        )
    columns = [
        Column(name="Feature" if name == "features" else "Source"),
        Column(name="AUC lost", unit="95% interval", format="+.5f"),
        Column(name="Log loss gained", unit="95% interval", format="+.5f"),
        Column(name="Shown", note="whether the interval of the AUC lies above 0."),
    ]
    return Table(f"{what}{on}", columns, rows, name=f"importance-{slug(task)}-{name}")
