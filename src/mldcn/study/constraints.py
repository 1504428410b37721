"""Which models a team could run: each measured against the limits of its recipe.

The constraints are those of Malreddy et al. (Improving feature interactions at Pinterest under industry
constraints, Section 4): quality, memory, latency, hyper-parameters, reproducibility, stability.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mldcn.comparison import LABEL, PROBABILITY, agreement, read_predictions
from mldcn.metrics import auc, metric_info, paired_t
from mldcn.report.summary import metric_column
from mldcn.run import RunFolder
from mldcn.study.findings import Standing, Summary
from mldcn.study.hyperparameters import hyperparameters
from mldcn.study.rows import RunRow, Study
from mldcn.study.slowdowns import Slowdown, read_slowdowns
from mldcn.study.verdicts import Cell, VerdictRow, Verdicts, interval, recommend

__all__ = ["Cell", "VerdictRow", "Verdicts", "judge"]

GIB = 1 << 30


def judge(study: Study, summary: Summary) -> Verdicts | None:
    """Holds every model of a study against the recipe's limits.

    A limit is held against the estimate; where an interval reaches across it, a note says so.

    Args:
        study: finished or not.
        summary: what it shows.

    Returns:
        None where the recipe has no limits.

    Raises:
        UserError: predictions are damaged.
    """
    if not study.recipe.limits.asked:
        return None
    table = _Table(study, summary)
    rows = tuple(table.row(standing) for standing in summary.standings if table.has_row(standing))
    recommendation, reason = recommend(summary, rows)
    return Verdicts(rows, recommendation, reason, tuple(table.notes(rows)))


class _Table:
    """Measures the cells."""

    def __init__(self, study: Study, summary: Summary) -> None:
        self.study, self.summary = study, summary
        self.recipe, self.limits = study.recipe, study.recipe.limits
        self.slowdowns = {(s.rival, s.point): s for s in read_slowdowns(study)}
        self.batch = self.limits.latency_batch or max(self.recipe.latency_batches)
        self.scored = f"{self.batch:,} rows" if self.batch > 1 else "one row"
        self.parts: dict[tuple[str, str], dict[int, NDArray[np.float64]]] = {}
        self.quality = list(dict.fromkeys([*self._usual_metrics(), *map(self._known_as, self.limits.gain)]))
        spread = [*self.quality[:1], (study.facts.task, summary.metric)]
        self.scattered = list(dict.fromkeys([*spread, *map(self._known_as, self.limits.deviation)]))

    def has_row(self, standing: Standing) -> bool:
        """Whether any run is finished; budgets that are there for their hardship have no row."""
        return standing.point not in self.limits.stress and bool(standing.seeds or standing.diverged)

    def row(self, standing: Standing) -> VerdictRow:
        """A model's cells."""
        runs = self.study.at(standing.rival, standing.point)
        gain_limits = {self._known_as(name): least for name, least in self.limits.gain.items()}
        deviations = {self._known_as(name): most for name, most in self.limits.deviation.items()}
        cells = [self._gain(standing, name, gain_limits.get(name)) for name in self.quality]
        cells += [self._memory(standing), self._latency(standing), self._hyperparameters(standing)]
        cells += [self._deviation(runs, name, deviations.get(name)) for name in self.scattered]
        cells += [self._disagreement(runs), *self._stability(standing)]
        if self.limits.parts is not None:
            cells.append(self._by_part(standing, self.limits.parts))
        if self.limits.stress:
            cells.append(self._stress(standing))
        return VerdictRow(standing.rival, standing.point, tuple(cells))

    def notes(self, rows: Sequence[VerdictRow]) -> Iterable[str]:
        """What has to be known to read the table."""
        gib = self.limits.device_memory_gb
        if gib is not None:
            how = {r.memory_how for r in self.study.final if r.memory_how is not None}
            measured = " and ".join(sorted(how)) or "nothing yet"
            yield f"Memory is of a device of {gib:g} GiB; measured by {measured}."
        if self.slowdowns:
            one = next(iter(self.slowdowns.values()))
            yield (
                f"Latency: scoring {self.scored} on {one.device} with {one.threads} threads, each model in "
                f"turns with the baseline, {one.rounds} rounds; intervals are over rounds."
            )
        else:
            yield "Latency: the models were not timed in turns with the baseline, so it has no intervals."
        yield (
            "Hyper-parameters: set are those that the recipe chooses, tunes or turns for this model alone; "
            "exposed are all options of its architecture. What is tuned for all alike is not counted."
        )
        yield "Reproducibility: runs that share everything but the seed; |p_a - p_b| is over all pairs of them."
        for row in rows:
            for cell in row.cells:
                if cell.unsure:
                    side = "within" if cell.ok else "beyond"
                    yield (
                        f"{row.name}: {cell.constraint} is {side} the limit by its estimate, but the interval "
                        "reaches across it."
                    )

    # Quality.

    def _usual_metrics(self) -> Iterable[tuple[str, str]]:
        """HIT@3 of a task that is called save, or of the study's own, then AUC and GAUC of the study's."""
        rows = [row for row in self.study.final if row.test is not None]
        if not rows:
            return
        tasks = {self.study.facts.task: rows[0].test or {}, **self._measured(rows[0])}
        saves = [task for task in tasks if "save" in task.lower()]
        for task in dict.fromkeys([*saves, self.study.facts.task]):
            if "hit@3" in tasks[task]:
                yield task, "hit@3"
                break
        yield from ((self.study.facts.task, name) for name in ("auc", "gauc") if name in (rows[0].test or {}))

    def _known_as(self, name: str) -> tuple[str, str]:
        task, slash, metric = name.rpartition("/")
        return (task, metric) if slash else (self.study.facts.task, name)

    def _by_seed(self, rival: str, point: str, task: str, metric: str) -> Mapping[int, float]:
        found = {}
        for row in self.study.at(rival, point):
            of_task = row.test or {}
            if task != self.study.facts.task or metric not in of_task:
                of_task = self._measured(row).get(task, {})
            value = of_task.get(metric)
            if value is not None and math.isfinite(value):
                found[row.seed] = float(value)
        return found

    def _measured(self, row: RunRow) -> dict[str, dict[str, Any]]:
        """All test metrics of a run, while its folder is there."""
        run = RunFolder(self.study.out / row.run)
        if not (run.path / "metrics.json").exists():
            return {}
        found: dict[str, dict[str, Any]] = run.read_json("metrics.json").get("test", {})
        return found

    def _gain(self, standing: Standing, name: tuple[str, str], least: float | None) -> Cell:
        task, metric = name
        title = f"gain of {self._title(name)}"
        limit = f">= {least:g}" if least is not None else ""
        cell = _cell(standing)
        if cell == self.summary.baseline:
            return Cell(title, "the baseline", None if least is None else least <= 0, limit)
        gain = self.summary.gain(*cell, metric) if task == self.study.facts.task else None
        if gain is not None:
            value, low, high = gain.estimate.value, gain.estimate.low, gain.estimate.high
        else:
            ours, base = (
                self._by_seed(*cell, task, metric),
                self._by_seed(*self.summary.baseline, task, metric),
            )
            both = [seed for seed in ours if seed in base]
            if not both:
                return Cell(
                    title, _nothing(standing), False if _all_broke(standing) and limit else None, limit
                )
            found = paired_t([base[s] for s in both], [ours[s] for s in both])
            sign = -1.0 if metric_info(metric).higher_is_better is False else 1.0
            value = sign * found.delta
            low, high = (
                (None, None) if math.isnan(found.low) else sorted((sign * found.low, sign * found.high))
            )
        text = f"{value:+.5f}{interval(low, high, '+.5f')}"
        if metric.startswith("hit"):
            mean = float(np.mean(list(self._by_seed(*self.summary.baseline, task, metric).values()) or [0.0]))
            text += f", {100 * value / mean:+.2f} %" if mean else ""
        if least is None:
            return Cell(title, text)
        return Cell(title, text, value >= least, limit, _across(least, low, high))

    def _title(self, name: tuple[str, str]) -> str:
        title = metric_column(name[1]).name
        return title if name[0] == self.study.facts.task else f"{title} ({name[0]})"

    # Cost.

    def _memory(self, standing: Standing) -> Cell:
        title, most = "training memory", self.limits.memory_percent
        limit = f"<= {most:g} %" if most is not None else ""
        used, gib = standing.costs.get("memory"), self.limits.device_memory_gb
        if used is None:
            return Cell(title, "not measured", None, limit)
        if gib is None:
            return Cell(title, f"{used / 2**20:,.0f} MiB")
        share = 100 * used / (gib * GIB)
        text = f"{share:.3g} % ({used / 2**20:,.0f} MiB)"
        return Cell(title, text, None if most is None else share <= most, limit)

    def _latency(self, standing: Standing) -> Cell:
        title, most = f"latency, {self.scored}", self.limits.latency_percent
        limit = f"<= {most:g} %" if most is not None else ""
        timed = self.slowdowns.get(_cell(standing)) or self._untimed(standing)
        if timed is None:
            return Cell(title, "not measured", None, limit)
        more, low, high = (100 * (ratio - 1) for ratio in (timed.ratio, timed.low, timed.high))
        known = timed.rounds > 0
        text = f"{more:+.1f} %{interval(low, high, '+.1f') if known else ''} ({timed.milliseconds[1]:.3g} ms)"
        if most is None:
            return Cell(title, text)
        return Cell(title, text, more <= most, limit, known and _across(most, low, high))

    def _untimed(self, standing: Standing) -> Slowdown | None:
        """By the medians of each model's own timing."""
        base = self.summary.standing(*self.summary.baseline)
        key = f"latency@{self.batch}"
        if base is None or key not in base.costs or key not in standing.costs:
            return None
        ours, theirs = standing.costs[key], base.costs[key]
        ratio = ours / theirs
        return Slowdown(
            standing.rival,
            standing.point,
            ("", ""),
            self.batch,
            ratio,
            ratio,
            ratio,
            (theirs, ours),
            0,
            "",
            0,
        )

    def _hyperparameters(self, standing: Standing) -> Cell:
        title, most = "hyper-parameters", self.limits.hyperparameters
        limit = f"<= {most} set" if most is not None else ""
        at = _cell(standing)
        row = next(row for row in self.study.final if (row.rival, row.point) == at)
        found = hyperparameters(self.recipe, row)
        count = len(found.chosen)
        text = f"{count} set, {len(found.exposed)} exposed"
        return Cell(title, text, None if most is None else count <= most, limit)

    # Reproducibility.

    def _deviation(self, runs: Sequence[RunRow], name: tuple[str, str], most: float | None) -> Cell:
        title = f"deviation of {self._title(name)}"
        limit = f"<= {most:g}" if most is not None else ""
        values = list(self._by_seed(runs[0].rival, runs[0].point, *name).values()) if runs else []
        if len(values) < 2:
            return Cell(title, "needs two seeds", None, limit)
        deviation = float(np.std(values, ddof=1))
        text = f"{deviation:.2g} over {len(values)} seeds"
        return Cell(title, text, None if most is None else deviation <= most, limit)

    def _disagreement(self, runs: Sequence[RunRow]) -> Cell:
        title, most = "mean |p_a - p_b|", self.limits.disagreement_percent
        limit = f"<= {most:g} % of the mean" if most is not None else ""
        files = [RunFolder(self.study.out / row.run).predictions for row in runs]
        files = [file for file in files if file.exists()]
        if len(files) < 2:
            return Cell(title, "needs two runs' predictions", None, limit)
        found = agreement(files)[self.study.facts.task]
        text = f"{found.difference:.2g}, {100 * found.relative:.1f} % of the mean"
        return Cell(title, text, None if most is None else 100 * found.relative <= most, limit)

    # Stability.

    def _stability(self, standing: Standing) -> Iterable[Cell]:
        cell = _cell(standing)
        rows = [row for row in self.study.final if (row.rival, row.point) == cell]
        broken, back = sum(row.diverged for row in rows), sum(row.troubles for row in rows)
        for title, count, text, most in (
            ("runs that broke down", broken, f"{broken} of {len(rows)}", self.limits.broken_runs),
            ("roll-backs", back, f"{back}", self.limits.roll_backs),
        ):
            limit = f"<= {most}" if most is not None else ""
            yield Cell(title, text, None if most is None else count <= most, limit)

    def _by_part(self, standing: Standing, parts: int) -> Cell:
        """The AUC gain in consecutive parts of the test rows: over days, where the log is in order of time."""
        title, least = f"AUC gain in {parts} parts of the test rows", self.limits.part_gain
        limit = f">= {least:g} in each" if least is not None else ""
        ours, base = (self._part_aucs(cell, parts) for cell in (_cell(standing), self.summary.baseline))
        gains = [ours[seed] - base[seed] for seed in ours if seed in base]
        mean = np.mean(gains, axis=0) if gains else np.asarray([np.nan])
        if np.isnan(mean).any():
            return Cell(title, "not known", None, limit)
        text = ", ".join(f"{gain:+.4f}" for gain in mean)
        if _cell(standing) == self.summary.baseline:
            text = "the baseline"
        return Cell(title, text, None if least is None else bool(mean.min() >= least), limit)

    def _part_aucs(self, cell: tuple[str, str], parts: int) -> dict[int, NDArray[np.float64]]:
        """AUC of a model in each part of the test rows, by seed."""
        if cell in self.parts:
            return self.parts[cell]
        task, found = self.study.facts.task, self.parts.setdefault(cell, {})
        for row in self.study.at(*cell):
            file = RunFolder(self.study.out / row.run).predictions
            if not file.exists():
                continue
            table = read_predictions(file)
            labels, scores = (table[f"{kind}{task}"].to_numpy() for kind in (LABEL, PROBABILITY))
            known = ~np.isnan(labels)
            columns = (labels[known], scores[known], table["weight"].to_numpy()[known])
            cut = [np.array_split(column, parts) for column in columns]
            found[row.seed] = np.asarray([auc(y, p, w) for y, p, w in zip(*cut, strict=True)])
        return found

    def _stress(self, standing: Standing) -> Cell:
        """How the rival fares at the budgets that are there for their hardship."""
        title, most = "under stress", self.limits.stress_broken_runs
        limit = f"<= {most} broken" if most is not None else ""
        parts, broken, missing = [], 0, False
        for point in self.limits.stress:
            rows = [r for r in self.study.final if (r.rival, r.point) == (standing.rival, point)]
            lost = sum(row.diverged for row in rows)
            parts.append(f"{point}: {lost} of {len(rows)} broke down{self._moved(standing, point)}")
            broken += lost
            missing |= len(rows) < len(self.recipe.seeds)
        within = None if most is None or (missing and broken <= most) else broken <= most
        return Cell(title, "; ".join(parts), within, limit)

    def _moved(self, standing: Standing, point: str) -> str:
        """By how much the first metric differs from that without the hardship."""
        metric, hard = self.summary.metric, self.summary.standing(standing.rival, point)
        if hard is None or metric not in hard.test or metric not in standing.test:
            return ""
        change = hard.test[metric].mean - standing.test[metric].mean
        return f", {metric_column(metric).name} {change:+.4f}"


def _cell(standing: Standing) -> tuple[str, str]:
    return (standing.rival, standing.point)


def _across(limit: float, low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and low < limit < high


def _all_broke(standing: Standing) -> bool:
    return bool(standing.diverged) and not standing.seeds


def _nothing(standing: Standing) -> str:
    return "every run broke down" if _all_broke(standing) else "not measured"
