"""How a study's report names and groups what it shows; its tables and pictures share this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mldcn.report.summary import metric_column
from mldcn.report.text import slug
from mldcn.study.findings import Scaling, Standing, Summary
from mldcn.study.recipe import AS_IS, amount_of
from mldcn.study.rows import RunRow, Study


@dataclass(frozen=True)
class Member:
    """A rival at a point under its name within a group, with the number of its style in plots."""

    standing: Standing
    label: str
    style: int


@dataclass(frozen=True)
class Group:
    """What is compared side by side: all rivals at a budget, or all of a study that has none.

    title: where they stand; empty where there is one group only. name: part of a file name.
    """

    title: str
    name: str
    members: tuple[Member, ...]


class Outline:
    """A study's groups, and the words for what it measures.

    Args:
        study: it.
        summary: what it shows.
    """

    def __init__(self, study: Study, summary: Summary) -> None:
        self.study, self.summary = study, summary
        self.recipe = study.recipe
        self.there = [standing for standing in summary.standings if standing.seeds]
        self.styles = {rival: i for i, rival in enumerate(self.recipe.rivals)}

    @property
    def metric(self) -> str:
        """The first metric's name for readers."""
        return metric_title(self.summary.metric)

    @property
    def baseline(self) -> str:
        """The baseline's name for readers."""
        rival, point = self.summary.baseline
        return rival if point == AS_IS else f"{rival} at {point}"

    @property
    def points(self) -> list[str]:
        """The names of points with finished runs, in the recipe's order."""
        return list(dict.fromkeys(standing.point for standing in self.there))

    @property
    def settings(self) -> bool:
        """Whether points are settings side by side, that cost no amount of anything."""
        return any(budget is None for budget in map(amount_of, self.recipe.budgets))

    @property
    def main_point(self) -> str | None:
        """The point that the finding is of: the last budget, or the setting of the baseline."""
        if self.settings and self.at(self.summary.baseline[1]):
            return self.summary.baseline[1]
        return next((point for point in reversed(self.points) if self.at(point)), None)

    def at(self, point: str) -> list[Standing]:
        """The rivals that have finished runs at a point, the best first."""
        here = [s for s in self.there if s.point == point and self.summary.metric in s.test]
        sign = -1.0 if self._higher() else 1.0
        return sorted(here, key=lambda s: sign * s.test[self.summary.metric].mean)

    def groups(self) -> list[Group]:
        """What is compared side by side."""
        if not self.recipe.budgets:
            members = [Member(s, self.label(s), i) for i, s in enumerate(self.there)]
            if not self.recipe.vary:
                members = [Member(m.standing, m.label, self.styles[m.standing.rival]) for m in members]
            return [Group("", "all", tuple(members))] if members else []
        return [
            Group(
                f"at {point}",
                slug(point),
                tuple(Member(s, s.rival, self.styles[s.rival]) for s in self.there if s.point == point),
            )
            for point in self.points
        ]

    def main_first(self) -> list[Group]:
        """The groups, that of the finding first and then from the last on."""
        groups = self.groups()[::-1]
        name = slug(self.main_point) if self.main_point is not None else ""
        return sorted(groups, key=lambda group: group.name != name)

    def label(self, standing: Standing) -> str:
        """What stands for a rival at a point where both could differ."""
        if standing.point == AS_IS:
            return standing.rival
        if standing.key is not None:
            return standing.point
        return f"{standing.rival} at {standing.point}"

    def runs(self, standing: Standing) -> list[RunRow]:
        """The finished runs behind a standing."""
        return self.study.at(standing.rival, standing.point)

    def costs(self) -> list[str]:
        """The costs that were measured of anything, FLOPs first."""
        return list(dict.fromkeys(cost for standing in self.there for cost in standing.costs))

    def _higher(self) -> bool:
        return metric_column(self.summary.metric).best != "min"


def metric_title(metric: str) -> str:
    """A metric's name for readers."""
    return metric_column(metric).name


def cost_title(cost: str) -> str:
    """What a column of costs holds."""
    if cost.startswith("latency@"):
        batch = int(cost.removeprefix("latency@"))
        return f"milliseconds to score {'one row' if batch == 1 else f'{batch:,} rows'} (median)"
    return {
        "flops": "FLOPs an example behind the embeddings",
        "parameters": "parameters behind the embeddings",
        "memory": "bytes at the peak of a training step",
    }.get(cost, cost)


def key_title(key: str) -> str:
    """A varied config key for readers: its last part."""
    return key.rpartition(".")[2]


def whose(scaling: Scaling) -> str:
    """What a scaling is of: a rival, or a varied key of it."""
    return scaling.rival if scaling.key is None else f"{scaling.rival}, {key_title(scaling.key)}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
