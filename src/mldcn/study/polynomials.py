"""The polynomial studies of the DCN V2 paper (Section 6): which architecture can represent what.

A run draws a polynomial, fits one model to it and keeps the RMSE on rows that it has not seen. Each run's
result is a file of its own, so that a study that was stopped goes on with the runs it has not got.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import mse_loss

from mldcn.config import parse, read_yaml
from mldcn.cost.flops import meta
from mldcn.cost.solver import Dial, solve
from mldcn.errors import UserError
from mldcn.files import locked, write_text
from mldcn.schema import Strict
from mldcn.study.jobs import run_jobs
from mldcn.study.least_squares import fit_least_squares
from mldcn.study.polynomial_models import Predictor, Rival
from mldcn.study.polynomial_targets import TARGETS, Target, TargetName

Say = Callable[[str], None]
TEST_ROWS = 20_000
EXACT = 1e-14  # a training RMSE below this ends the starts
BLOCK = 64  # Adam's batches are drawn this many at a time
# Raised by every change of the code that changes what a run finds: a finished run of another protocol is refused.
PROTOCOL = 4


class Adam(Strict):
    """Adam on fresh rows at every step; the rate rises over the first 5 % and falls as a cosine."""

    steps: int = Field(2000, ge=1)
    batch_size: int = Field(256, ge=1)
    lr: float = Field(0.01, gt=0)


class Lbfgs(Strict):
    """L-BFGS with a line search (strong Wolfe) on a whole training set; goes on from Adam's weights."""

    rows: int = Field(500, ge=1, description="of the training set")
    iterations: int = Field(400, ge=1)


class LeastSquares(Strict):
    """Levenberg-Marquardt on a whole training set; goes on from the weights before it."""

    rows: int = Field(5000, ge=1, description="of the training set")
    iterations: int = Field(30, ge=1)


class Optimiser(Strict):
    """How every model of a table is fitted."""

    adam: Adam | None = None
    least_squares: tuple[LeastSquares, ...] = Field((), description="one after the other, after Adam")
    lbfgs: Lbfgs | None = None
    starts: int = Field(
        1,
        ge=1,
        description="fits from other weights; the best on the last training set counts, and it alone goes on to "
        "the last of several stages of least squares",
    )

    @model_validator(mode="after")
    def _does_something(self) -> Optimiser:
        if not (self.adam or self.least_squares or self.lbfgs):
            raise ValueError("needs adam, least_squares or lbfgs")
        if self.starts > 1 and not (self.least_squares or self.lbfgs):
            raise ValueError("starts are compared on the rows of least_squares or lbfgs, which are not there")
        return self


class Table(Strict):
    """Models fitted to targets in one way."""

    title: str
    targets: tuple[TargetName, ...] = Field(..., min_length=1)
    layers: tuple[int, ...] = Field((1,), min_length=1)
    optimiser: Optimiser
    dtype: Literal["float32", "float64"]
    head: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,),
        min_length=1,
        description="sizes of the weights that the head starts with, one after the other by starts: a large head "
        "hardly moves, which leaves a cross layer a nearly linear problem; a DNN wants a small one",
    )
    reference: str = Field("dcnv2", description="the rival whose size others match")
    rivals: dict[str, Rival] = Field(..., min_length=1)

    @model_validator(mode="after")
    def _reference_is_there(self) -> Table:
        if self.reference not in self.rivals:
            raise ValueError(f"reference {self.reference!r} is none of the rivals")
        return self


class PolynomialRecipe(Strict):
    """A study of fits to polynomials."""

    kind: Literal["polynomials"]
    title: str
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    tables: dict[str, Table] = Field(..., min_length=1)
    notes: tuple[str, ...] = ()


def load_polynomials(path: Path) -> PolynomialRecipe | None:
    """The recipe in a file, or None where the file is a recipe of another kind.

    Raises:
        UserError: it says something that no recipe of this kind says.
    """
    raw = read_yaml(path)
    return parse(PolynomialRecipe, raw, str(path)) if raw.get("kind") == "polynomials" else None


@dataclass(frozen=True)
class Fit:
    """One run of the study."""

    target: TargetName
    layers: int
    seed: int
    name: str
    rival: Rival
    table: Table
    file: Path

    def __str__(self) -> str:
        return f"{self.target} {self.name}, {self.layers} layers, seed {self.seed}"

    def what_counts(self) -> dict[str, Any]:
        """What the result depends on."""
        return {
            "protocol": PROTOCOL,
            "target": self.target,
            "layers": self.layers,
            "seed": self.seed,
            "dtype": self.table.dtype,
            "head": list(self.table.head),
            "optimiser": self.table.optimiser.model_dump(mode="json"),
            "interaction": self.rival.interaction,
            "cross": self.rival.cross,
        }

    def finished(self) -> bool:
        """Whether the run's result is there.

        Raises:
            UserError: a run of another recipe is.
        """
        if not self.file.exists():
            return False
        if json.loads(self.file.read_text(encoding="utf-8"))["run"] != self.what_counts():
            raise UserError(
                f"{self.file}: is of another recipe or of another version of mldcn. Remove the file, or name "
                "another folder with --out"
            )
        return True


def run_polynomials(
    recipe: PolynomialRecipe, out: Path, *, jobs: int = 1, say: Say = lambda _: None
) -> list[dict[str, Any]]:
    """Runs what is not finished yet and writes ``results.json``, ``results.md`` and ``results.html``.

    Args:
        recipe: the study.
        out: folder for the runs and the results.
        jobs: runs at the same time.
        say: told of the progress, a line a time.

    Returns:
        What ``results.json`` holds: a cell of each table a row.

    Raises:
        UserError: another process runs a study in the folder, or a run in it is of another recipe.
    """
    from mldcn.study.polynomial_report import report  # draws on this module's classes

    with locked(out):
        planned = [fit for key, table in recipe.tables.items() for fit in plan(recipe, key, table, out)]
        planned.sort(key=lambda fit: recipe.seeds.index(fit.seed))  # a study cut short has whole tables
        todo = [fit for fit in planned if not fit.finished()]
        say(f"{len(planned)} runs, {len(planned) - len(todo)} finished before")
        try:
            run_jobs(todo, _run, jobs, say)
        finally:  # also of what a stopped study has
            cells = _cells(recipe, planned)
            page = report(recipe, cells)
            write_text(out / "results.json", json.dumps(cells, indent=1) + "\n")
            write_text(out / "results.md", page.to_markdown())
            page.write(out / "results.html")
    return cells


def plan(recipe: PolynomialRecipe, key: str, table: Table, out: Path) -> list[Fit]:
    """The runs of one table, widths matched."""
    fits = []
    for target in table.targets:
        features = TARGETS[target](torch.Generator().manual_seed(0)).features
        for layers in table.layers:
            budget = _size(table.rivals[table.reference], features, layers)
            for name, rival in table.rivals.items():
                matched = _matched(rival, features, layers, budget) if rival.match else rival
                folder = out / "runs" / key / target / name
                fits += [
                    Fit(target, layers, seed, name, matched, table, folder / f"{layers}-{seed}.json")
                    for seed in recipe.seeds
                ]
    return fits


def _matched(rival: Rival, features: int, layers: int, budget: int) -> Rival:
    """The rival at the width that brings its size nearest to the budget."""
    option = rival.match
    assert option is not None
    is_list = isinstance(rival.interaction.get(option), list)

    def turn(subject: Rival, width: int) -> Rival:
        changed = {**subject.interaction, option: [width] if is_list else width}
        return subject.model_copy(update={"interaction": changed})

    dial = Dial(option, 1, turn)
    cost = lambda subject: float(_size(subject, features, layers))  # noqa: E731
    return solve(turn(rival, 1), [dial], cost, budget, tolerance=math.inf, what="parameters").subject


def _size(rival: Rival, features: int, layers: int) -> int:
    with meta():
        return Predictor(rival, features, layers).size


def _run(fit: Fit, threads: int) -> str:
    """Fits one model in a process of its own; gives a line on how it went."""
    torch.set_num_threads(1)  # these models are small, and so no result depends on the number of cores
    started = time.monotonic()
    result = fit_model(fit)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_text(fit.file, json.dumps({"run": fit.what_counts(), **result}, indent=1) + "\n")
    return f"RMSE {result['rmse']:.2e}, {result['seconds']:.0f} s"


def fit_model(fit: Fit) -> dict[str, Any]:
    """The size of the model and its RMSE on unseen rows; depends on nothing but the run's settings."""
    dtype = torch.float64 if fit.table.dtype == "float64" else torch.float32
    # The polynomial, the training rows and the test rows are the same for all rivals of a seed.
    target = TARGETS[fit.target](torch.Generator().manual_seed(fit.seed))
    test = target.draw(TEST_ROWS, torch.Generator().manual_seed(1_000_000 + fit.seed), dtype)
    generator = torch.Generator().manual_seed(2_000_000 + fit.seed)

    def fresh(start: int) -> Predictor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * fit.seed + start)
            head = fit.table.head[start % len(fit.table.head)]
            return Predictor(fit.rival, target.features, fit.layers, head).to(dtype)

    options = fit.table.optimiser
    batches = torch.Generator().manual_seed(3_000_000 + fit.seed)
    rows = target.draw(options.lbfgs.rows, generator, dtype) if options.lbfgs else None
    stages = [(stage, target.draw(stage.rows, generator, dtype)) for stage in options.least_squares]
    for_all = stages[:-1] or stages
    best: tuple[Predictor, float] | None = None  # and the damping it ended with
    least = math.inf
    for start in range(options.starts):
        model = fresh(start)
        if options.adam:
            _fit_adam(model, target, options.adam, batches, dtype)
        damping = 1e-4 if options.adam else 1e-2
        for stage, drawn in for_all:
            damping = fit_least_squares(model, *drawn, stage.iterations, damping=damping)
        if options.lbfgs and rows:
            _fit_lbfgs(model, rows, options.lbfgs)
        found = _rmse(model, *(rows or (stages[-1][1] if stages else test)))
        if best is None or found < least:  # never where it is not a number
            best, least = (model, damping), found
        if least < EXACT:
            break
    assert best is not None
    model, damping = best
    for stage, drawn in stages[len(for_all) :]:
        fit_least_squares(model, *drawn, stage.iterations, damping=damping)
    return {"parameters": model.size, "rmse": _rmse(model, *test)}


def _fit_lbfgs(model: Predictor, rows: tuple[Tensor, Tensor], options: Lbfgs) -> None:
    x, y = rows
    optimiser = torch.optim.LBFGS(
        model.parameters(),
        max_iter=options.iterations,
        max_eval=2 * options.iterations,
        history_size=20,
        tolerance_grad=1e-17,  # about as large as the RMSE: the fit is exact where this ends it
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = mse_loss(model(x), y)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]


def _fit_adam(
    model: Predictor, target: Target, options: Adam, generator: torch.Generator, dtype: torch.dtype
) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr, betas=(0.9, 0.99), fused=True)
    warm = 0.05
    batches: list[tuple[Tensor, Tensor]] = []
    for step in range(options.steps):
        if not batches:
            x, y = target.draw(BLOCK * options.batch_size, generator, dtype)
            batches = list(
                zip(torch.split(x, options.batch_size), torch.split(y, options.batch_size), strict=True)
            )
        done = step / options.steps
        factor = done / warm if done < warm else (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2
        optimiser.param_groups[0]["lr"] = options.lr * factor
        x, y = batches.pop()
        loss = mse_loss(model(x), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _rmse(model: Predictor, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return mse_loss(model(x), y).sqrt().item()


def _cells(recipe: PolynomialRecipe, planned: list[Fit]) -> list[dict[str, Any]]:
    """Finished runs that differ only in the seed as one row."""
    cells: dict[Path, dict[str, Any]] = {}
    tables = {id(table): key for key, table in recipe.tables.items()}
    for fit in planned:
        if not fit.file.exists():
            continue
        key = fit.file.parent / str(fit.layers)
        result = json.loads(fit.file.read_text(encoding="utf-8"))
        paper = fit.rival.paper.get(fit.target, ())
        at = fit.table.layers.index(fit.layers)
        cell = cells.setdefault(
            key,
            {
                "table": tables[id(fit.table)],
                "target": fit.target,
                "layers": fit.layers,
                "rival": fit.name,
                "width": _width(fit.rival),
                "parameters": result["parameters"],
                "paper": paper[at] if at < len(paper) else None,
                "rmse": [],
            },
        )
        cell["rmse"].append(result["rmse"])
    for cell in cells.values():
        cell["mean_rmse"] = sum(cell["rmse"]) / len(cell["rmse"])
    return list(cells.values())


def _width(rival: Rival) -> dict[str, Any] | None:
    """The option that was turned until the size matched."""
    if rival.match is None:
        return None
    value = rival.interaction[rival.match]
    return {"option": rival.match, "value": value[0] if isinstance(value, list) else value}
