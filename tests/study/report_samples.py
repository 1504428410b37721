"""Made-up studies: seeded numbers of no log and no model, in the shape that a finished study has."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from mldcn.config import parse
from mldcn.study.recipe import Point, Recipe
from mldcn.study.rows import Facts, RunRow, Study

RIVALS = ("mldcn", "dcnv2", "dcnv2_lowrank", "masknet", "wukong", "rankmixer", "dnn")
BUDGETS = (50_000, 150_000, 450_000, 1_250_000)
# Gain at the first budget, and per tenfold FLOPs: invented.
_STRENGTH = {
    "mldcn": (0.0006, 0.0024),
    "dcnv2": (0.0, 0.0012),
    "dcnv2_lowrank": (0.0002, 0.0014),
    "masknet": (-0.0002, 0.0018),
    "wukong": (-0.0011, 0.0006),
    "rankmixer": (-0.0015, 0.0010),
    "dnn": (-0.0022, 0.0009),
}
_SPACE = {"training.optimiser.lr": {"low": 0.0003, "high": 0.003, "log": True}}


def scaling_recipe(**changes: Any) -> Recipe:
    return _recipe(
        {
            "title": "Made-up numbers: seven rivals at four budgets",
            "rivals": {name: {"interaction": {"name": name}} for name in RIVALS},
            "baseline": "dcnv2",
            "budgets": [{"flops": flops} for flops in BUDGETS],
            "tuning": {"trials": 8, "space": _SPACE},
            "limits": {
                "device_memory_gb": 0.25,
                "memory_percent": 75,
                "latency_percent": 60,
                "broken_runs": 0,
            },
        },
        changes,
    )


def single_recipe(count: int = 20, **changes: Any) -> Recipe:
    """Many rivals at one budget."""
    rivals = {f"rival_{i:02d}": {"interaction": {"name": "dnn"}} for i in range(count)}
    return _recipe(
        {
            "title": "Made-up numbers: one budget",
            "rivals": rivals,
            "baseline": "rival_00",
            "budgets": [{"flops": 1e6}],
        },
        changes,
    )


def ablation_recipe(**changes: Any) -> Recipe:
    return _recipe(
        {
            "title": "Made-up numbers: rank and mask",
            "rivals": {
                "mldcn": {"interaction": {"name": "mldcn"}},
                "dcnv2": {"interaction": {"name": "dcnv2"}},
            },
            "baseline": "dcnv2",
            "vary": {
                "model.interaction.rank": [16, 32, 64, 96],
                "model.interaction.mask": ["none", "first", "first_relu", "full"],
            },
            "quoted": {
                "source": "An imagined paper, Table 9",
                "what": "AUC gain",
                "values": {"rank=16": 0.0005, "rank=32": 0.0006, "rank=64": 0.0007, "mask=full": 0.0009},
                "notes": ["its baseline is another model"],
            },
        },
        changes,
    )


def sample_study(
    recipe: Recipe,
    out: Path,
    *,
    keep: float = 1.0,
    folders: bool = False,
    attainable: float | None = None,
    seed: int = 0,
) -> Study:
    """A study with made-up rows.

    Args:
        recipe: of the study.
        out: its folder.
        keep: share of the final runs that are finished.
        folders: whether runs have folders with a config and a reliability curve.
        attainable: AUC of the true probabilities, where it is to be known.
        seed: of the numbers.
    """
    draw = random.Random(seed)
    rows = []
    for rival in recipe.rivals:
        if recipe.tuning is not None:
            rows += [_trial(recipe, rival, trial, draw) for trial in range(recipe.tuning.trials)]
        for i, point in enumerate(recipe.points(rival)):
            rows += [_final(recipe, rival, point, i, s, attainable, draw) for s in recipe.seeds]
    final = [row for row in rows if row.stage == "final"]
    left = set(draw.sample(range(len(final)), round((1 - keep) * len(final))))
    lost = {id(row) for i, row in enumerate(final) if i in left}
    study = Study(recipe, tuple(row for row in rows if id(row) not in lost), out, _facts(recipe))
    if folders:
        for row in study.rows:
            _folder(out / row.run, draw)
    return study


def _recipe(plain: dict[str, Any], changes: dict[str, Any]) -> Recipe:
    return parse(Recipe, {"dataset": "pinads", "seeds": [0, 1, 2], **plain, **changes}, "sample")


def _facts(recipe: Recipe) -> Facts:
    return Facts(
        dataset=recipe.dataset,
        log=dict(recipe.log),
        rows={"train": 800_000, "valid": 100_000, "test": 100_000},
        features=26,
        task="click",
        monitor="click/auc",
        higher_is_better=True,
        threads=1,
        jobs=2,
        device="cpu",
        machine="x86_64, 2 cores",
        versions={"python": "3.12", "mldcn": "0.0", "torch": "2.0"},
        seconds=4321.0,
    )


def _final(
    recipe: Recipe, rival: str, point: Point, i: int, seed: int, attainable: float | None, draw: random.Random
) -> RunRow:
    number = list(recipe.rivals).index(rival)
    flops = (point.budget or 20_000 * (1 + i) * (1 + 0.1 * number)) * (1 + draw.uniform(-0.004, 0.004))
    base, slope = _STRENGTH.get(rival, (-0.0001 * number, 0.001))
    tenfold = math.log10(flops / 50_000)
    luck = random.Random(seed).gauss(0, 0.0004)  # of the seed: paired differences are free of it
    auc = 0.74 + base + slope * tenfold + luck + draw.gauss(0, 0.0003)
    if point.key is not None and point.axis is None:
        auc += 0.0003 * i
    return _row(
        recipe,
        rival,
        point.name,
        point.budget,
        point.axis,
        seed,
        "final",
        flops,
        auc,
        draw,
        test={"auc": auc, "logloss": 0.41 - 0.4 * (auc - 0.74), "calibration": 1.01, "ece": 0.004},
        attainable={"auc": attainable} if attainable is not None else None,
        memory_bytes=round(3e7 + 90 * flops * (1 + 0.1 * number)),
        memory_how="PyTorch's allocator on cpu, a step of 1,024 rows",
        latency_ms={1: _times(0.4 + 1e-7 * flops, draw), 256: _times(1 + 1.1e-5 * flops, draw)},
        run=f"runs/{rival}/{point.name}/seed-{seed}",
    )


def _trial(recipe: Recipe, rival: str, trial: int, draw: random.Random) -> RunRow:
    point = recipe.tuning_point(rival)
    settings = {"training.optimiser.lr": 0.0003 * 10 ** draw.random()}
    flops, run = point.budget or 20_000.0, f"runs/{rival}/tuning/trial-{trial:02d}"
    auc = 0.739 + draw.gauss(0, 0.001)
    stopped = trial % 4 == 3
    return _row(
        recipe,
        rival,
        point.name,
        point.budget,
        None,
        1000,
        "tune",
        flops,
        auc,
        draw,
        trial=trial,
        settings=settings,
        pruned=stopped,
        run=run,
    )


def _row(
    recipe: Recipe,
    rival: str,
    point: str,
    budget: float | None,
    axis: float | None,
    seed: int,
    stage: str,
    flops: float,
    auc: float,
    draw: random.Random,
    **more: Any,
) -> RunRow:
    whole = round(flops)
    plain: dict[str, Any] = {
        "rival": rival,
        "budget": budget,
        "point": point,
        "axis": axis,
        "seed": seed,
        "stage": stage,
        "trial": 2 if recipe.tuning is not None else -1,
        "settings": {},
        "interaction": recipe.rivals[rival].get("interaction", {}),
        "knob": "width=48",
        "flops": {
            "embedding": 0,
            "interaction": whole * 7 // 10,
            "deep": whole // 4,
            "heads": whole - whole * 7 // 10 - whole // 4,
        },
        "residual": None if budget is None else flops / budget - 1,
        "parameters": {"dense": whole // 2 + 1000, "embedding": 350_000},
        "valid": {"auc": auc + 0.001, "logloss": 0.41},
        "test": None,
        "attainable": None,
        "curve": tuple(
            (100 * k, auc - 0.02 * math.exp(-k / 2) - 0.0004 * max(0, k - 7) + draw.gauss(0, 0.0002))
            for k in range(1, 11)
        ),
        "seconds": 30 + flops / 40_000,
        "epochs": 5,
        "steps": 1000,
        "troubles": 0,
        "diverged": False,
        "pruned": False,
        "memory_bytes": None,
        "memory_how": None,
        "latency_ms": None,
        "run": "runs/none",
        "config_hash": f"{draw.getrandbits(64):016x}",
    }
    return RunRow(**{**plain, **more})


def _times(median: float, draw: random.Random) -> dict[str, float]:
    median *= 1 + draw.uniform(-0.05, 0.05)
    return {"median": median, "p99": 1.4 * median}


def _folder(run: Path, draw: random.Random) -> None:
    run.mkdir(parents=True)
    predicted = [0.01 * 1.5**k for k in range(10)]
    observed = [p * (1 + draw.gauss(0, 0.06)) for p in predicted]
    curve = {"predicted": predicted, "observed": observed, "weight": [1000.0] * 10}
    (run / "reliability.json").write_text(json.dumps({"click": curve}), encoding="utf-8")
    lines = "".join(f"  - {{name: feature_{i}, kind: categorical, min_count: 5}}\n" for i in range(110))
    (run / "config.yaml").write_text(f"model:\n  features:\n{lines}", encoding="utf-8")
