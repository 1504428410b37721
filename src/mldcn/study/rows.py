"""What a study measures: a row of plain data for every finished run, in a file that grows with it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mldcn.errors import UserError
from mldcn.files import sync_folder, writing

ROWS = "rows.jsonl"

Stage = Literal["tune", "final"]


@dataclass(frozen=True)
class RunRow:
    """One finished run.

    rival: name of the architecture in the recipe; of an ablation, of its variant's model. budget: the FLOPs (or
    parameters, or nanoseconds, as the recipe matches) that were asked for; None where nothing is matched. point:
    name of the budget, or of the variant ("rank=48"). axis: the varied value of an ablation, where it is a
    number. stage: a trial of the tuning, or a final run, whose test rows were read. trial: the trial that the
    settings are of; -1 where nothing is tuned. settings: the tuned values by config key. interaction: its
    options as they were trained, width included. knob: the options that were turned to meet the budget.
    flops: GEMM FLOPs per example by part (embedding, interaction, deep, heads). residual: cost / budget - 1;
    None where nothing is matched. parameters: dense, and embedding (tables). valid, test: metrics of the study's
    task; a trial has no test. attainable: metric -> the best that is possible on the test rows, where it is
    known. pruned: a trial that was stopped early. troubles: roll-backs of the training. memory_bytes: peak of a
    training step, and memory_how it was found. latency_ms: batch size -> median and p99 of scoring a batch. run:
    the run's folder, relative to the study's. config_hash: of all that counts for the result.
    """

    rival: str
    budget: int | None
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
                values[name] = {k: math.nan if v is None else float(v) for k, v in values[name].items()}
        if values["latency_ms"] is not None:
            values["latency_ms"] = {int(batch): times for batch, times in values["latency_ms"].items()}
        return cls(**values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def append_row(path: Path, row: RunRow) -> None:
    """Appends a row as a line; what a killed writer left of a line is removed first.

    Raises:
        DiskFullError: the disk is full.
    """
    line = json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n"
    new = not path.exists()
    with writing(path), path.open("ab+") as file:
        file.seek(0)
        file.truncate(_whole(file.read()))
        file.write(line.encode())
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
            rows.append(RunRow.from_json(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: line {number} is damaged or of another version ({error}); remove the file, and the "
                "same command writes it again from the finished runs"
            ) from None
    return rows


def final_rows(rows: Iterable[RunRow]) -> list[RunRow]:
    """Those of the final runs: what a study compares."""
    return [row for row in rows if row.stage == "final"]


def _whole(data: bytes) -> int:
    """The length of a file's whole lines."""
    return data.rfind(b"\n") + 1
