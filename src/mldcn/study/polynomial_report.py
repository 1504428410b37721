"""The tables of a polynomial study: mean RMSE and its range over the runs, next to the paper's figures."""

from __future__ import annotations

from typing import Any

from mldcn.report.blocks import Bullets, Heading, Paragraph
from mldcn.report.page import Page
from mldcn.report.table import Cell, Column, Interval, Table
from mldcn.study.polynomials import PolynomialRecipe
from mldcn.study.polynomials import Table as Fits

FORMAT = ".1e"


def report(recipe: PolynomialRecipe, cells: list[dict[str, Any]]) -> Page:
    """The study's page.

    Args:
        recipe: the study.
        cells: what its runs found, as :func:`mldcn.study.polynomials.run_polynomials` gives it.
    """
    page = Page(recipe.title, subtitle="RMSE on unseen rows, mean over the runs (least to most)")
    found = sum(len(cell["rmse"]) for cell in cells)
    planned = len(recipe.seeds) * sum(
        len(fits.targets) * len(fits.layers) * len(fits.rivals) for fits in recipe.tables.values()
    )
    if found < planned:
        page.add(Paragraph(f"Not finished: {found} of {planned} runs so far."))
    if recipe.notes:
        page.add(Heading("Readings"), Bullets(recipe.notes))
    for key, fits in recipe.tables.items():
        mine = [cell for cell in cells if cell["table"] == key]
        page.add(Heading(fits.title), Paragraph(_how(fits)))
        if len(fits.layers) == 1:
            page.add(_by_target(fits, mine, key))
        else:
            begun = [target for target in fits.targets if any(cell["target"] == target for cell in mine)]
            page.add(*(_by_layers(fits, mine, key, target) for target in begun))
    return page


def _how(fits: Fits) -> str:
    options, steps = fits.optimiser, []
    if adam := options.adam:
        steps.append(
            f"Adam, {adam.steps:,} steps of {adam.batch_size:,} fresh rows, rate {adam.lr:g} with a warm-up and a "
            "cosine to 0"
        )
    steps += [
        f"Levenberg-Marquardt on {stage.rows:,} rows, at most {stage.iterations} iterations"
        for stage in options.least_squares
    ]
    if lbfgs := options.lbfgs:
        steps.append(
            f"L-BFGS (history 20, strong Wolfe line search) on {lbfgs.rows:,} rows, at most "
            f"{lbfgs.iterations:,} iterations"
        )
    heads = " and ".join(f"{size:g}" for size in fits.head)
    starts = (
        f"the best on the last of these rows of at most {options.starts} starts"
        if options.starts > 1
        else "one start"
    )
    if options.starts > 1 and len(options.least_squares) > 1:
        starts += ", which alone went on to the last of these steps"
    return f"Every model: {', then '.join(steps)}; {fits.dtype}, {starts}, from heads of size {heads}."


def _by_target(fits: Fits, cells: list[dict[str, Any]], key: str) -> Table:
    """A row a model; RMSE, the paper's and the size for each target."""
    columns = [Column(name="model")]
    for target in fits.targets:
        columns += [
            Column(name=target, format=FORMAT, best="min"),
            Column(name=f"{target}, paper", format=FORMAT),
            Column(name=f"{target}, parameters"),
            Column(name=f"{target}, runs"),
        ]
    rows: list[list[Cell]] = []
    for name, rival in fits.rivals.items():
        row: list[Cell] = [rival.title]
        for target in fits.targets:
            cell = _cell(cells, name, target, fits.layers[0])
            row += [_range(cell), cell["paper"], _size([cell]), len(cell["rmse"])] if cell else [None] * 4
        rows.append(row)
    return Table(fits.title, columns, rows, name=key)


def _by_layers(fits: Fits, cells: list[dict[str, Any]], key: str, target: str) -> Table:
    """A row a model and a column a number of layers, each with the paper's figure beside it where it has one."""
    quoted = any(cell["paper"] is not None for cell in cells if cell["target"] == target)
    columns = [Column(name="model")]
    for layers in fits.layers:
        columns.append(Column(name=f"{layers} layer" + "s" * (layers > 1), format=".2e", best="min"))
        if quoted:
            columns.append(Column(name=f"{layers}, paper", format=".2e"))
    columns += [Column(name="parameters"), Column(name="runs")]
    rows: list[list[Cell]] = []
    for name, rival in fits.rivals.items():
        mine = [_cell(cells, name, target, layers) for layers in fits.layers]
        row: list[Cell] = [rival.title]
        for cell in mine:
            row.append(_range(cell) if cell else None)
            if quoted:
                row.append(cell["paper"] if cell else None)
        found = [cell for cell in mine if cell]
        runs = sorted({len(cell["rmse"]) for cell in found})
        rows.append([*row, _size(found), " to ".join(map(str, runs))])
    return Table(f"{fits.title}: {target}", columns, rows, name=f"{key}-{target}")


def _cell(cells: list[dict[str, Any]], rival: str, target: str, layers: int) -> dict[str, Any] | None:
    """The finished runs of one place of a table, or None where there are none yet."""
    wanted = (rival, target, layers)
    return next((c for c in cells if (c["rival"], c["target"], c["layers"]) == wanted), None)


def _size(cells: list[dict[str, Any]]) -> str:
    """Parameters, and the width that was turned to reach them, from the first cell to the last."""
    if not cells:
        return ""
    text = _span([cell["parameters"] for cell in cells])
    if cells[0]["width"]:
        option = cells[0]["width"]
        text += f" ({option['option']} {_span([cell['width']['value'] for cell in cells])})"
    return text


def _span(values: list[int]) -> str:
    first, last = f"{values[0]:,}", f"{values[-1]:,}"
    return first if first == last else f"{first} to {last}"


def _range(cell: dict[str, Any]) -> Interval:
    return Interval(cell["mean_rmse"], min(cell["rmse"]), max(cell["rmse"]))
