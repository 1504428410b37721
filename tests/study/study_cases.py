from mldcn.config import parse
from mldcn.study.recipe import Recipe
from mldcn.study.rows import RunRow

# Two rivals at two budgets, each tuned by two trials; small enough to be trained in a second.
RECIPE = {
    "title": "small",
    "dataset": "pinads",
    "config": {
        "model": {"embedding": {"dim": 4}},
        "training": {"batch_size": 256, "epochs": 2, "monitor": "click/auc"},
    },
    "rivals": {
        "dnn": {"interaction": {"name": "dnn", "hidden": [32]}},
        "mldcn": {"interaction": {"name": "mldcn", "num_layers": 1, "rank": 24}},
    },
    "baseline": "dnn",
    "budgets": [{"flops": 20_000}, {"flops": 40_000, "config": {"model": {"embedding": {"dim": 6}}}}],
    "tuning": {
        "trials": 2,
        "space": {"training.optimiser.lr": {"low": 0.0005, "high": 0.01, "log": True}},
        "own": {"mldcn": {"model.interaction.num_layers": [1, 2]}},
    },
    "seeds": [0],
    "latency_batches": [1],
}


def recipe(**changes):
    return parse(Recipe, {**RECIPE, **changes}, "recipe")


def row(**changes):
    plain = {
        "rival": "dnn",
        "budget": 20_000,
        "point": "20k",
        "axis": None,
        "seed": 0,
        "stage": "final",
        "trial": -1,
        "settings": {},
        "interaction": {"name": "dnn", "hidden": [59]},
        "knob": "hidden=59",
        "flops": {"embedding": 7, "interaction": 19_000, "deep": 900, "heads": 100},
        "residual": 0.0,
        "parameters": {"dense": 10_000, "embedding": 500},
        "valid": {"auc": 0.6, "logloss": 0.3},
        "test": {"auc": 0.61, "logloss": 0.31},
        "attainable": None,
        "curve": ((10, 0.55), (20, 0.6)),
        "seconds": 1.0,
        "epochs": 2,
        "steps": 20,
        "troubles": 0,
        "diverged": False,
        "pruned": False,
        "memory_bytes": None,
        "memory_how": None,
        "latency_ms": None,
        "run": "runs/dnn/20k/seed-0",
        "config_hash": "0123456789abcdef",
    }
    return RunRow(**{**plain, **changes})


def in_turns(ready, run, done, jobs):
    """``run_ready`` in this process; of jobs at the same time the last begun is the first to end."""
    running = []
    while True:
        while len(running) < jobs and (job := ready()) is not None:
            running.append(job)
        if not running:
            return
        job = running.pop()
        done(job, run(job))
