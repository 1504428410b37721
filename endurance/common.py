"""What the long checks share: a small ``pinads`` log with a quick model, digests of results, tables."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

# The files of a finished run that must not depend on how often it was interrupted or where it lies.
RESULTS = (
    "weights.safetensors",
    "metrics.json",
    "history.jsonl",
    "predictions.arrow",
    "reliability.json",
    "calibrators.json",
    "layout.json",
    "config.yaml",
)


def write_small_log(folder: Path, rows: int = 3000, format: str = "parquet", **training: Any) -> Path:
    """Writes a ``pinads`` log, in which every kind of feature occurs, and a config that trains in a moment.

    Args:
        folder: is made where it does not exist.
        rows: impressions.
        format: of the log, ``parquet`` or ``csv``.
        training: over the config's own ``training`` part.

    Returns:
        The config's path.
    """
    from mldcn.datasets.pinads import PinadsConfig, pinads_config, write_log

    world = PinadsConfig(num_users=300, num_items=150, num_advertisers=20)
    write_log(folder, rows, world, format=format)  # type: ignore[arg-type]
    raw = pinads_config(folder.resolve(), format=format)
    raw["data"] |= {"encoded": str(folder.resolve() / "encoded"), "block_rows": max(rows // 5, 1)}
    raw["model"] = {
        "embedding": {"dim": 4},
        "interaction": {"name": "mldcn", "num_layers": 2, "rank": 8, "dropout": 0.1},
        "deep": {"hidden": [8]},
    }
    raw["training"] = {
        "threads": 1,
        "device": "cpu",
        "epochs": 3,
        "patience": 3,
        "batch_size": 200,
        "checkpoint_steps": 4,
        "ema": 0.99,
        "optimiser": {"lr": 0.01, "schedule": "cosine"},
        **training,
    }
    raw["evaluation"] = {"calibration": "isotonic"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def write_small_study(config: Path, recipe: Path) -> None:
    """A recipe for a study of one rival and two seeds, with the model of a config."""
    raw = yaml.safe_load(config.read_text(encoding="utf-8"))
    base = {"model": raw["model"], "training": raw["training"] | {"epochs": 1}}
    study = {
        "title": "small",
        "dataset": "pinads",
        "config": base,
        "rivals": {"mldcn": {"interaction": {"name": "mldcn", "rank": 8}}},
        "baseline": "mldcn",
        "seeds": [0, 1],
    }
    recipe.write_text(yaml.safe_dump(study), encoding="utf-8")


def mldcn_command() -> list[str]:
    """The command line, run by this Python."""
    return [sys.executable, "-c", "from mldcn.cli import main; main()"]


def command_environment() -> dict[str, str]:
    """One thread, no colours, no width that would wrap a message."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "500"}


def digest_bytes(parts: Iterable[bytes]) -> str:
    """A digest of some bytes."""
    found = hashlib.blake2b(digest_size=12)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def digest_files(folder: Path, skip: Sequence[str] = ()) -> dict[str, str]:
    """A digest of every file of a folder, by its relative path; ``skip`` are names of files or folders."""
    return {
        str(file.relative_to(folder)): digest_bytes([file.read_bytes()])
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not set(file.relative_to(folder).parts) & set(skip)
    }


def digest_results(run: Path) -> dict[str, str]:
    """A digest of what a finished run came to: all but its timings."""
    found = {name: digest_bytes([(run / name).read_bytes()]) for name in RESULTS if (run / name).exists()}
    return found | {f"encoder/{name}": value for name, value in digest_files(run / "encoder").items()}


def digest_encoded(data: Any) -> str:
    """A digest of encoded rows in their order, and of what an encoder makes of ids and numbers."""

    def parts() -> Iterable[bytes]:
        for rows in (data.train, data.valid, data.test):
            for batch in rows.batches(4096) if rows is not None else ():
                for tensor in (batch.ids, batch.dense, batch.labels, batch.weight, batch.position):
                    yield tensor.numpy().tobytes()
            for name in ("user", "request", "time") if rows is not None else ():
                yield rows.column(name).tobytes()
        yield repr(data.encoder.layout).encode()
        yield repr({name: value.to_json() for name, value in data.encoder.numerics.items()}).encode()
        yield repr(data.encoder.boundaries).encode()
        for table in data.encoder.tables.values():
            if hasattr(table, "values"):
                yield "\0".join(table.values.to_pylist()).encode()

    return digest_bytes(parts())


def digest_study(folder: Path) -> str:
    """A digest of what a study's runs came to, apart from what was timed."""
    from mldcn.study.rows import load_study

    timed = dict.fromkeys(("seconds", "memory_bytes", "latency_ms"))
    rows = (json.dumps(row.to_json() | timed) for row in load_study(folder).rows)
    return digest_bytes(row.encode() for row in sorted(rows))  # jobs end in any order


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])
