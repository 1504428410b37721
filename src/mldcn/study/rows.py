"""What a study measures: a row of plain data for every finished run, in a file that grows with it."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mldcn.config import parse, read_yaml
from mldcn.errors import UserError
from mldcn.files import sync_folder, write_text, writing
from mldcn.study.recipe import Recipe

ROWS, FACTS, RECIPE = "rows.jsonl", "study.json", "recipe.yaml"
_CRC = "crc32"

Stage = Literal["tune", "final"]


@dataclass(frozen=True)
class RunRow:
    """One finished run.

    rival: name of the architecture in the recipe. budget: the cost that was asked for (FLOPs, parameters or
    milliseconds, as the recipe matches); None where nothing is matched. point: name of the budget, or of the
    variant ("rank=48"). axis: the varied value of an ablation, where it is a number. stage: a trial of the
    tuning, or a final run, whose test rows were read. trial: the trial whose settings it has; -1 where nothing
    is tuned. settings: the tuned values by config key. interaction: its options as they were trained. knob: the
    options that were turned to meet the budget. flops: GEMM FLOPs per example by part (embedding, interaction,
    deep, heads). residual: cost / budget - 1; None where nothing is matched. parameters: dense, and embedding
    (tables). valid, test: metrics of the study's task; a trial has no test. attainable: metric -> the best that
    is possible on the test rows, where it is known. curve: step and monitored validation metric of each
    evaluation. pruned: a trial that was stopped early. troubles: roll-backs of the training. diverged: it broke
    down for good; then valid is empty and test None. memory_bytes: peak of a training step, and memory_how it
    was found. latency_ms: batch size -> median and p99 of scoring a batch. run: the run's folder, relative to
    the study's. config_hash: of all that counts for the result.
    """

    rival: str
    budget: float | None
    point: str
    axis: float | None
    seed: int
    stage: Stage
    trial: int
    settings: dict[str, Any]
    interaction: dict[str, Any]
    knob: str | None
    flops: dict[str, int]
    residual: float | None
    parameters: dict[str, int]
    valid: dict[str, float]
    test: dict[str, float] | None
    attainable: dict[str, float] | None
    curve: tuple[tuple[int, float], ...]
    seconds: float
    epochs: int
    steps: int
    troubles: int
    diverged: bool
    pruned: bool
    memory_bytes: int | None
    memory_how: str | None
    latency_ms: dict[int, dict[str, float]] | None
    run: str
    config_hash: str

    def best(self, *, higher: bool) -> float:
        """The best monitored validation metric; NaN where there is none.

        Args:
            higher: whether more is better.
        """
        values = [value for _, value in self.curve if not math.isnan(value)]
        return (max if higher else min)(values, default=math.nan)

    @property
    def model_flops(self) -> int:
        """GEMM FLOPs per example of everything behind the embeddings: what is matched."""
        return sum(count for part, count in self.flops.items() if part != "embedding")

    def to_json(self) -> dict[str, Any]:
        """Plain data; metrics that are undefined are None."""
        plain = asdict(self)
        for name in ("valid", "test", "attainable"):
            if plain[name] is not None:
                plain[name] = {key: _finite(value) for key, value in plain[name].items()}
        plain["curve"] = [[step, _finite(value)] for step, value in self.curve]
        if self.latency_ms is not None:
            plain["latency_ms"] = {str(batch): times for batch, times in self.latency_ms.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RunRow:
        """The row that :meth:`to_json` wrote.

        Raises:
            ValueError: it is none.
        """
        known = {field.name for field in fields(cls)}
        if set(plain) != known:
            raise ValueError(f"keys {sorted(known ^ set(plain))} are missing or unknown")
        values = dict(plain)
        for name in ("valid", "test", "attainable"):
            if values[name] is not None:
                values[name] = {key: _number(value) for key, value in values[name].items()}
        values["curve"] = tuple((step, _number(value)) for step, value in values["curve"])
        if values["latency_ms"] is not None:
            values["latency_ms"] = {int(batch): times for batch, times in values["latency_ms"].items()}
        return cls(**values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def append_row(path: Path, row: RunRow) -> None:
    """Appends a row as a line; what a killed writer left of a line is removed first.

    Raises:
        DiskFullError: the disk is full.
    """
    new = not path.exists()
    with writing(path), path.open("ab+") as file:
        file.seek(0)
        file.truncate(_whole(file.read()))
        file.write(_line(row).encode())
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


def read_rows(path: Path) -> list[RunRow]:
    """The rows of a file, in their order; none where there is no file. A torn last line is passed over.

    Raises:
        UserError: another line is damaged, or was written by another version.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    rows = []
    for number, line in enumerate(data[: _whole(data)].splitlines(), 1):
        try:
            rows.append(RunRow.from_json(_checked(json.loads(line))))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: line {number} is damaged or of another version ({error}); remove the file, and the "
                "same command writes it again from the finished runs"
            ) from None
    return rows


def write_rows(path: Path, rows: Iterable[RunRow]) -> None:
    """Replaces a file's rows atomically."""
    write_text(path, "".join(map(_line, rows)))


def _line(row: RunRow) -> str:
    return json.dumps(_with_checksum(row.to_json()), ensure_ascii=False, allow_nan=False) + "\n"


def _with_checksum(plain: Mapping[str, Any]) -> dict[str, Any]:
    content = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    return {_CRC: f"{zlib.crc32(content.encode()):08x}", **plain}


def _checked(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What was written, without its checksum; earlier versions wrote none."""
    content = {name: value for name, value in plain.items() if name != _CRC}
    if _CRC in plain and _with_checksum(content)[_CRC] != plain[_CRC]:
        raise ValueError("its checksum is not that of its content")
    return content


def _whole(data: bytes) -> int:
    """The length of a file's whole lines."""
    return data.rfind(b"\n") + 1


@dataclass(frozen=True)
class Facts:
    """What a study ran on.

    dataset: its name, and log the options it was generated with. rows: of train, valid and test. features: of
    the schema. task: that is compared. monitor: the validation metric that runs and trials are judged by, and
    whether more of it is better. threads: of each run, jobs at the same time. seconds: that the study ran, all
    its sessions together.
    """

    dataset: str
    log: dict[str, Any]
    rows: dict[str, int]
    features: int
    task: str
    monitor: str
    higher_is_better: bool
    threads: int
    jobs: int
    device: str
    machine: str
    versions: dict[str, str]
    seconds: float


def write_facts(out: Path, facts: Facts) -> None:
    """Writes a study's facts into its folder."""
    write_text(out / FACTS, json.dumps(_with_checksum(asdict(facts)), indent=2) + "\n")


def read_facts(out: Path) -> Facts:
    """What :func:`write_facts` wrote.

    Raises:
        UserError: it is damaged.
    """
    path = out / FACTS
    try:
        return Facts(**_checked(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({error}); remove the file, and 'mldcn study' writes it again"
        ) from None


@dataclass(frozen=True)
class Effort:
    """What was spent on a rival: trials (pruned and diverged ones are among them), runs, seconds of training."""

    trials: int
    pruned: int
    diverged: int
    tuning_seconds: float
    final_runs: int
    final_seconds: float


@dataclass(frozen=True)
class Study:
    """A study, as far as it has come.

    rows: of the runs that count. A final run whose settings lost against those of a later trial is not among
    them.
    """

    recipe: Recipe
    rows: tuple[RunRow, ...]
    out: Path
    facts: Facts

    @property
    def final(self) -> list[RunRow]:
        """The final runs."""
        return [row for row in self.rows if row.stage == "final"]

    def at(self, rival: str, point: str) -> list[RunRow]:
        """The final runs of a rival at a point, by seed; those that broke down are left out."""
        found = [row for row in self.final if (row.rival, row.point) == (rival, point) and not row.diverged]
        return sorted(found, key=lambda row: row.seed)

    def baseline(self) -> list[RunRow]:
        """The final runs that all gains are over, by seed."""
        return self.at(self.recipe.baseline, self.recipe.baseline_point().name)

    def effort(self) -> dict[str, Effort]:
        """What was spent on each rival."""
        found = {}
        for rival in self.recipe.rivals:
            rows = [row for row in self.rows if row.rival == rival]
            trials = [row for row in rows if row.stage == "tune"]
            final = [row for row in rows if row.stage == "final"]
            found[rival] = Effort(
                trials=len(trials),
                pruned=sum(row.pruned for row in trials),
                diverged=sum(row.diverged for row in rows),
                tuning_seconds=sum(row.seconds for row in trials),
                final_runs=len(final),
                final_seconds=sum(row.seconds for row in final),
            )
        return found


def chosen_trial(rows: Iterable[RunRow], rival: str, *, higher: bool) -> RunRow | None:
    """The trial of a rival with the best validation metric; None where none came to its end.

    Args:
        rows: of the study.
        rival: whose.
        higher: whether more of the metric is better.
    """
    done = [row for row in rows if row.rival == rival and row.stage == "tune"]
    done = [row for row in done if not (row.pruned or row.diverged or math.isnan(row.best(higher=higher)))]
    sign = 1.0 if higher else -1.0
    return max(done, key=lambda row: (sign * row.best(higher=higher), -row.trial), default=None)


def load_study(out: Path) -> Study:
    """A study's recipe, rows and facts, from its folder; runs that the recipe no longer asks for are left out.

    Raises:
        UserError: no study began there, or a file is damaged.
    """
    if not (out / FACTS).exists() or not (out / RECIPE).exists():
        raise UserError(f"{out}: holds no study; 'mldcn study RECIPE --out {out}' makes one")
    recipe = parse(Recipe, read_yaml(out / RECIPE), str(out / RECIPE))
    facts = read_facts(out)
    rows = read_rows(out / ROWS)
    return Study(recipe, tuple(counted(recipe, rows, higher=facts.higher_is_better)), out, facts)


def counted(recipe: Recipe, rows: Iterable[RunRow], *, higher: bool) -> list[RunRow]:
    """The rows that a recipe asks for, with each rival's best settings.

    Args:
        recipe: the study.
        rows: all there are.
        higher: whether more of the monitored metric is better.
    """
    trials = recipe.tuning.trials if recipe.tuning is not None else 0
    asked = [row for row in rows if row.rival in recipe.rivals]
    tuned = [row for row in asked if row.stage == "tune" and row.trial < trials]
    chosen = {rival: chosen_trial(tuned, rival, higher=higher) for rival in recipe.rivals}
    points = {rival: {point.name for point in recipe.points(rival)} for rival in recipe.rivals}
    found = tuned
    for row in asked:
        best = chosen[row.rival]
        of_best = row.trial == (best.trial if best is not None else -1)
        if row.stage == "final" and of_best and row.seed in recipe.seeds and row.point in points[row.rival]:
            found.append(row)
    return found
