"""A study as a YAML file: the log, the rivals, what is matched or varied, the tuning, the seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mldcn.config import parse, read_yaml
from mldcn.schema import Strict
from mldcn.study.limits import Limits

AS_IS = "as it is"  # the point of a rival that is neither matched nor varied

Match = Literal["flops", "parameters", "latency", "none"]


class Budget(Strict):
    """A cost that every rival is brought to, or with ``match: none`` just a config that all are trained under."""

    flops: float | None = Field(None, gt=0, description="GEMM FLOPs per example behind the embeddings")
    parameters: float | None = Field(None, gt=0, description="of everything behind the embeddings")
    latency_ms: float | None = Field(None, gt=0, description="median milliseconds to score one row")
    name: str | None = Field(None, description="1.0M, for example, by default")
    config: dict[str, Any] = Field({}, description="laid over the config: wider embeddings or heads")


class Range(Strict):
    """Numbers that a tuned setting is drawn from."""

    low: float
    high: float
    log: bool = Field(False, description="evenly by ratio")
    integer: bool = Field(False, alias="int")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError("a range by ratio begins above 0")
        return self


Space = dict[str, tuple[Any, ...] | Range]


class Tuning(Strict):
    """What is tried before the final runs: as many trials for every rival, judged by validation rows alone.

    The first trial is the config as it stands; Optuna draws the others.
    """

    trials: int = Field(..., ge=1, description="for each rival, those that are stopped early included")
    space: Space = Field({}, description="config key -> choices or a range, the same for every rival")
    own: dict[str, Space] = Field({}, description="rival -> its own keys beside the shared ones")
    prune: bool = Field(True, description="stop a trial that stays below the median of those before it")
    budget: str | None = Field(None, description="name of the budget that is tuned at; the middle one")
    seed: int = Field(1000, description="of the trials' training and of the draws; none of the final seeds")

    def of(self, rival: str) -> Space:
        """All that a rival is tuned in."""
        return {**self.space, **self.own.get(rival, {})}


class Recipe(Strict):
    """One study.

    Every rival is trained at every point: at each budget, with its width turned until it costs that much; as it
    is, where there are no budgets; the varied one with each value of ``vary``. Each rival is tuned once, at one
    point, and its settings are used at all.
    """

    title: str
    dataset: str = Field(..., description="a name that 'mldcn data list' knows")
    log: dict[str, Any] = Field({}, description="of a log that is generated (pinads): rows, truth, seed ...")
    config: dict[str, Any] = Field({}, description="laid over the dataset's own config")
    task: str | None = Field(None, description="the task that is compared; the first by default")
    metrics: tuple[str, ...] = Field(("auc", "logloss"), min_length=1, description="the first is compared")
    rivals: dict[str, dict[str, Any]] = Field(
        ..., min_length=1, description="name -> interaction, and other parts of 'model' under their names"
    )
    baseline: str = Field(..., description="the rival that gains are over")
    baseline_budget: str | None = Field(None, description="name of its budget; the smallest by default")
    match: Match = Field("flops", description="what budgets are of")
    budgets: tuple[Budget, ...] = Field((), description="none: every rival as it is")
    vary: dict[str, tuple[Any, ...]] = Field({}, description="config key -> values, one key at a time")
    varied: str | None = Field(None, description="the rival to vary; by default the one beside the baseline")
    tuning: Tuning | None = None
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    latency_batches: tuple[int, ...] = Field(
        (1, 256), description="rows scored at once when models are timed"
    )
    margin: float = Field(
        0.001, gt=0, description="a difference of the first metric that matters in practice"
    )
    limits: Limits = Field(Limits(), description="what a model may cost and has to bring")
    quoted: dict[str, Any] = Field({}, description="a paper's own figures, shown beside those measured")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for what, name in (("baseline", self.baseline), ("varied", self.varied)):
            if name is not None and name not in self.rivals:
                raise ValueError(f"{what} {name!r} is none of the rivals ({', '.join(self.rivals)})")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is named twice")
        self._check_budgets()
        if self.vary:
            if self.budgets:
                raise ValueError("vary and budgets: a study either varies one rival or matches several")
            self.varied_rival()
        elif self.varied is not None:
            raise ValueError(f"varied {self.varied!r}: there is nothing in vary")
        if self.tuning is not None:
            self._check_tuning(self.tuning)
        return self

    def _check_budgets(self) -> None:
        unit = {"flops": "flops", "parameters": "parameters", "latency": "latency_ms"}.get(self.match)
        for budget in self.budgets:
            named = [each for each in ("flops", "parameters", "latency_ms") if getattr(budget, each)]
            if named != ([unit] if unit else []):
                raise ValueError(f"budgets: with match: {self.match} each needs {unit or 'no amount'}")
            if unit is None and budget.name is None:
                raise ValueError("budgets: with match: none each needs a name")
        names = [name_of(budget) for budget in self.budgets]
        if len(set(names)) < len(names):
            raise ValueError(f"budgets: two have one name ({', '.join(names)}); give them a name")
        for what, name in (
            ("baseline_budget", self.baseline_budget),
            ("tuning.budget", self.tuning.budget if self.tuning else None),
            *(("limits.stress", name) for name in self.limits.stress),
        ):
            if name is not None and name not in names:
                raise ValueError(
                    f"{what} {name!r} is none of the budgets ({', '.join(names) or 'there are none'})"
                )

    def _check_tuning(self, tuning: Tuning) -> None:
        unknown = set(tuning.own) - set(self.rivals)
        if unknown:
            raise ValueError(f"tuning.own: {unknown.pop()!r} is none of the rivals")
        if tuning.seed in self.seeds:
            raise ValueError(
                f"tuning.seed {tuning.seed} is one of the final seeds, whose luck would be chosen"
            )
        both = set(self.vary) & set(tuning.of(self.varied_rival() if self.vary else self.baseline))
        if both:
            raise ValueError(f"{both.pop()} is both varied and tuned")

    def varied_rival(self) -> str:
        """The rival that ``vary`` is of."""
        others = [name for name in self.rivals if name != self.baseline] or [self.baseline]
        if self.varied is None and len(others) > 1:
            raise ValueError(f"vary: name the rival to vary in varied ({', '.join(self.rivals)})")
        return self.varied or others[0]

    def points(self, rival: str) -> list[Point]:
        """Where a rival is trained."""
        if self.budgets:
            return [Point(name_of(each), amount_of(each), None, None, each.config) for each in self.budgets]
        as_it_is = Point(AS_IS, None, None, None, {})
        if not self.vary or rival != self.varied_rival():
            return [as_it_is]
        variants = [_variant(key, value) for key, values in self.vary.items() for value in values]
        return [as_it_is, *variants] if rival == self.baseline else variants

    def tuning_point(self, rival: str) -> Point:
        """Where a rival is tuned: the middle budget, or as it is."""
        if not self.budgets:
            return Point(AS_IS, None, None, None, {})
        points = self.points(rival)
        named = [p for p in points if self.tuning is not None and p.name == self.tuning.budget]
        ordered = sorted(points, key=lambda p: p.budget or 0)
        return named[0] if named else ordered[(len(ordered) - 1) // 2]

    def baseline_point(self) -> Point:
        """Where the baseline stands that all gains are over."""
        points = self.points(self.baseline)
        named = [point for point in points if point.name == self.baseline_budget]
        return named[0] if named else min(points, key=lambda p: p.budget or 0)


@dataclass(frozen=True)
class Point:
    """A place at which a rival is trained.

    name: of the budget or the variant. budget: the cost asked for. axis: the varied value, if it is a number.
    key: the varied config key. config: laid over the rival's config.
    """

    name: str
    budget: float | None
    axis: float | None
    key: str | None
    config: dict[str, Any]


def name_of(budget: Budget) -> str:
    """A budget's name."""
    if budget.name is not None:
        return budget.name
    amount = amount_of(budget) or 0.0
    if budget.latency_ms is not None:
        return f"{amount:g} ms"
    for unit, least in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= least:
            return f"{amount / least:.3g}{unit}"
    return f"{amount:g}"


def amount_of(budget: Budget) -> float | None:
    """The cost that a budget asks for."""
    return budget.flops or budget.parameters or budget.latency_ms


def _variant(key: str, value: Any) -> Point:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    shown = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    name = f"{key.rpartition('.')[2]}={shown}"
    return Point(name, None, float(value) if number else None, key, nested({key: value}))


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        UserError: it says something that no recipe says.
    """
    return parse(Recipe, read_yaml(path), str(path))


def overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged; where both hold something else, the change wins.

    A mapping that names another ``name`` or ``kind`` (an interaction, a split) takes the place of the whole: the
    options of the old one are none of its own.
    """
    merged = dict(base)
    for key, value in changes.items():
        here = merged.get(key)
        merge = isinstance(here, dict) and isinstance(value, dict) and _same_kind(here, value)
        merged[key] = overlay(here, value) if merge and isinstance(here, dict) else value
    return merged


def _same_kind(here: dict[str, Any], value: dict[str, Any]) -> bool:
    return all(key not in value or here.get(key, value[key]) == value[key] for key in ("name", "kind"))


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
