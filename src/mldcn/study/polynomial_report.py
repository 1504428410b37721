"""The tables of a polynomial study: mean RMSE and its range over the runs, next to the paper's figures."""

from __future__ import annotations

from typing import Any

from mldcn.report.blocks import Bullets, Heading, Paragraph
from mldcn.report.page import Page
from mldcn.report.table import Cell, Column, Interval, Table
from mldcn.study.polynomials import Adam, PolynomialRecipe
from mldcn.study.polynomials import Table as Fits

FORMAT = ".1e"


def report(recipe: PolynomialRecipe, cells: list[dict[str, Any]]) -> Page:
    """The study's page.

    Args:
        recipe: the study.
        cells: what its runs found, as :func:`mldcn.study.polynomials.run_polynomials` gives it.
    """
    page = Page(
        recipe.title, subtitle=f"RMSE on unseen rows, mean of {len(recipe.seeds)} runs (least to most)"
    )
    if recipe.notes:
        page.add(Heading("Readings"), Bullets(recipe.notes))
    for key, fits in recipe.tables.items():
        mine = [cell for cell in cells if cell["table"] == key]
        page.add(Heading(fits.title), Paragraph(_how(fits)))
        if len(fits.layers) == 1:
            page.add(_by_target(fits, mine, key))
        else:
            page.add(*(_by_layers(fits, mine, key, target) for target in fits.targets))
    return page


def _how(fits: Fits) -> str:
    options = fits.optimiser
    if isinstance(options, Adam):
        return (
            f"Every model: Adam, {options.steps:,} steps of {options.batch_size} fresh rows, rate {options.lr:g} "
            f"with a warm-up and a cosine to 0, {fits.dtype}, one start."
        )
    return (
        f"Every model: L-BFGS (history 20, strong Wolfe line search) on {options.rows:,} rows, at most "
        f"{options.iterations:,} iterations, {fits.dtype}, the best on those rows of at most {options.restarts} "
        f"start{'s' * (options.restarts > 1)}."
    )


def _by_target(fits: Fits, cells: list[dict[str, Any]], key: str) -> Table:
    """A row a model; RMSE, the paper's and the size for each target."""
    columns = [Column(name="model")]
    for target in fits.targets:
        columns += [
            Column(name=target, format=FORMAT, best="min"),
            Column(name=f"{target}, paper", format=FORMAT),
            Column(name=f"{target}, parameters"),
        ]
    rows: list[list[Cell]] = []
    for name, rival in fits.rivals.items():
        row: list[Cell] = [rival.title]
        for target in fits.targets:
            cell = next(c for c in cells if (c["rival"], c["target"]) == (name, target))
            row += [_range(cell), cell["paper"], cell["parameters"]]
        rows.append(row)
    return Table(fits.title, columns, rows, name=key)


def _by_layers(fits: Fits, cells: list[dict[str, Any]], key: str, target: str) -> Table:
    """A row a model and a column a number of layers; the paper's figures are rows of their own."""
    columns = [Column(name="model"), Column(name=f"parameters, {fits.layers[0]} to {fits.layers[-1]} layers")]
    columns += [Column(name=f"{n} layer" + "s" * (n > 1), format=FORMAT, best="min") for n in fits.layers]
    rows: list[list[Cell]] = []
    for name, rival in fits.rivals.items():
        mine = [c for c in cells if (c["rival"], c["target"]) == (name, target)]
        rows.append(
            [rival.title, f"{mine[0]['parameters']:,} to {mine[-1]['parameters']:,}", *map(_range, mine)]
        )
    quoted: list[list[Cell]] = [
        [
            f"{rival.title}: the paper",
            "",
            *(c["paper"] for c in cells if (c["rival"], c["target"]) == (name, target)),
        ]
        for name, rival in fits.rivals.items()
        if any(c["paper"] is not None for c in cells if (c["rival"], c["target"]) == (name, target))
    ]
    return Table(f"{fits.title}: {target}", columns, rows + quoted, name=f"{key}-{target}")


def _range(cell: dict[str, Any]) -> Interval:
    return Interval(cell["mean_rmse"], min(cell["rmse"]), max(cell["rmse"]))
