"""What requests save by sharing, and how close exported programs come to the machine's rate of matrix products.

    python benchmarks/serving_model.py --json docs/results/serving_model.json

``sharing``: models on x0 of 1,024 columns (64 ids of 16), of which 30, 50 or 70 % tell of the user; one request
with N candidates, from encoded rows to logits, look-ups included, by the same bundle with and without sharing.
``encoding``: such a request from raw values to encoded rows.
``products``: ML-DCN alone, as exported, against its layers' bare matrix products, each a call of
``torch.nn.functional.linear`` of its own, in the same rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from turns import Result, machine, report, shown, spread

from mldcn.config import Config, dump_config, parse
from mldcn.data.encoder import Encoder
from mldcn.data.reading import table_blocks
from mldcn.interactions import MLDCN
from mldcn.model import Ranker, save_weights
from mldcn.predict import Predictor
from mldcn.run import RunFolder
from mldcn.serving.engine import Engine
from mldcn.serving.export import export_run

FIELDS, WIDTH, ROWS = 64, 16, 10_000
MODELS: dict[str, dict[str, Any]] = {
    "dnn": {"name": "dnn", "hidden": (1024, 512, 256)},
    "deepfm": {"name": "deepfm", "hidden": (1024, 512, 256)},
    "dcnv2": {"name": "dcnv2", "num_layers": 3},
    "dcnv2_lowrank": {"name": "dcnv2_lowrank", "num_layers": 3, "rank": 256},
    "mldcn": {"name": "mldcn", "num_layers": 4, "rank": 256},
    "mldcn, 1 layer": {"name": "mldcn", "num_layers": 1, "rank": 256},
    "masknet": {"name": "masknet", "num_layers": 2, "mask_ratio": 0.5, "width": 512},
    "masknet_parallel": {"name": "masknet_parallel", "num_blocks": 3, "width": 256, "reduction_ratio": 0.5},
}


def run_of(
    folder: Path, features: list[dict[str, Any]], interaction: dict[str, Any], log: pa.Table
) -> RunFolder:
    """A finished run with random weights."""
    model = {"embedding": {"dim": WIDTH}, "interaction": interaction, "deep": {"hidden": []}}
    raw = {"schema": {"features": features, "labels": [{"name": "click"}]}, "model": model}
    config = parse(Config, raw, "benchmark")
    encoder = Encoder.fit(config.log_schema, table_blocks(log, 1 << 16))
    run = RunFolder.create(folder, dump_config(config))
    encoder.save(run.encoder)
    torch.manual_seed(0)
    ranker = Ranker(config.model, config.log_schema, encoder.layout)
    with torch.no_grad():
        for parameter in ranker.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0, 0.3)  # norms whose gain is not 0
    save_weights(ranker, run.weights)
    run.finish()
    return run


def in_turns(
    works: dict[str, Callable[[], object]], rounds: int, least: float = 0.02
) -> dict[str, list[float]]:
    """Seconds of a call of each work, round by round; short ones are called several times in a row.

    With one thread these are seconds of its own, which other work on the machine disturbs less.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, work in works.items():
        work()
        begun = clock()
        work()
        repeats[name] = max(1, int(least / (clock() - begun)))
    taken: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds):
        names = list(works)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begun = clock()
            for _ in range(repeats[name]):
                works[name]()
            taken[name].append((clock() - begun) / repeats[name])
    return taken


def over(taken: dict[str, list[float]], above: str, below: str) -> Result:
    """The spread of one work's seconds over another's, round by round."""
    return spread([a / b for a, b in zip(taken[above], taken[below], strict=True)])


def sharing(options: argparse.Namespace, folder: Path) -> Result:
    """Seconds without sharing over seconds with it, by model, user's share and candidates."""
    rng = np.random.default_rng(0)
    names = [f"f{i}" for i in range(FIELDS)]
    log = pa.table(
        {name: [f"v{i}" for i in rng.integers(0, 100, 200)] for name in names} | {"click": [0, 1] * 100}
    )
    found: Result = {"speed-up": {}, "encoding": {}}
    for share in options.shares:
        features = [
            {"name": name, "kind": "categorical", "encoding": {"kind": "hash", "rows": ROWS}}
            | {"source": "user" if i < round(share * FIELDS) else "item"}
            for i, name in enumerate(names)
        ]
        for model in options.models:
            path = folder / f"{model}-{share}"
            run = run_of(path, features, MODELS[model], log)
            export_run(Predictor.load(run.path, "cpu"), options.to, path / "bundle")
            engine = Engine.load(path / "bundle", "cpu")
            by_count = found["speed-up"].setdefault(model, {}).setdefault(f"{share:.0%}", {})
            for count in options.candidates:
                works = {"shared": ask(engine, count), "plain": ask(engine, count, shared=False)}
                by_count[str(count)] = over(in_turns(works, options.rounds), "plain", "shared")
            print(model, f"{share:.0%}", {n: shown(each, 2) for n, each in by_count.items()}, flush=True)
        by_count = found["encoding"].setdefault(f"{share:.0%}", {})
        for count in options.candidates:
            by_count[str(count)] = over(in_turns(encode(engine, count), options.rounds), "plain", "shared")
        print("encoding", f"{share:.0%}", {n: shown(each, 2) for n, each in by_count.items()}, flush=True)
    return found


def request_of(engine: Engine, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One request."""
    rng = np.random.default_rng(count)
    constant = dict.fromkeys(sorted(engine.constant), "v1")
    own = [each.name for each in engine.inputs if each.name not in constant]
    return constant, {name: [f"v{i}" for i in rng.integers(0, 10**6, count)] for name in own}


def ask(engine: Engine, count: int, *, shared: bool = True) -> Callable[[], object]:
    """From encoded rows to logits."""
    rows = engine.encode_rank(*request_of(engine, count))
    request = np.zeros(count, np.int64) if shared else None
    return lambda: engine.program(rows.ids, rows.dense, request)


def encode(engine: Engine, count: int) -> dict[str, Callable[[], object]]:
    """From raw values to encoded rows, once a request, and as so many rows."""
    constant, candidates = request_of(engine, count)
    repeated = {name: [value] * count for name, value in constant.items()}
    return {
        "shared": lambda: engine.encode_rank(constant, candidates),
        "plain": lambda: engine.encode(repeated | candidates),
    }


def products(options: argparse.Namespace, folder: Path) -> Result:
    """ML-DCN's speed as a share of that of its bare products."""
    d, rank, layers = options.width, options.rank, options.layers
    features = [{"name": "x0", "kind": "embedding", "width": d, "normalise": False}]
    log = pa.table({"x0": [[float(i)] * d for i in range(4)], "click": [0, 1, 0, 1]})
    run = run_of(folder / "products", features, {"name": "mldcn", "num_layers": layers, "rank": rank}, log)
    model = Predictor.load(run.path, "cpu").model
    cross = model.scorer.interaction
    assert isinstance(cross, MLDCN)
    programs: dict[str, Any] = {"eager": lambda x: model.scorer(x)}
    if options.compile:
        programs["torch.compile"] = torch.compile(model.scorer, dynamic=True)
    for to in options.targets:
        if to == "onnx" and options.threads == 1:
            continue  # its work is done by threads of its own, whose seconds are not counted
        bundle = folder / f"products-{to}"
        export_run(Predictor.load(run.path, "cpu"), to, bundle)
        program = Engine.load(bundle, "cpu").program
        ids = np.zeros((max(options.batches), 0), np.int32)
        programs[to] = lambda x, p=program, ids=ids: p(ids[: len(x)], x.numpy())
    found: Result = {"shape": {"width": d, "rank": rank, "mask": rank // 2, "layers": layers}, "batch": {}}
    with torch.inference_mode():
        for batch in options.batches:
            x = torch.randn(batch, d)
            works: dict[str, Callable[[], object]] = {"products": bare(cross, x)}
            works |= {name: partial(program, x) for name, program in programs.items()}
            taken = in_turns(works, options.rounds)
            by_name = {name: over(taken, "products", name) for name in programs}
            seconds = spread(taken["products"])
            found["batch"][str(batch)] = {"seconds of the products": seconds, "share of their rate": by_name}
            print(batch, {name: shown(each, 2) for name, each in by_name.items()}, flush=True)
    return found


def bare(cross: MLDCN, x: torch.Tensor) -> Callable[[], object]:
    """The matrix products of the layers and nothing else."""
    linear = nn.functional.linear
    weights = [[p for name, p in layer.named_parameters() if p.dim() == 2] for layer in cross.layers]

    def run() -> None:
        for down, up, first, second in weights:
            linear(linear(x, down), up)
            linear(linear(x, first), second)

    return run


def main() -> None:
    """Prints ratios: above 1 is faster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["sharing", "products"], default=["sharing", "products"]
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--to", choices=["torch-export", "aoti"], default="torch-export", help="of sharing")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.5, 0.7], help="of the user in x0")
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 10, 100, 500, 1000])
    parser.add_argument("--targets", nargs="+", default=["torch-export", "aoti", "onnx"], help="of products")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--width", type=int, default=1024, help="d, of products")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: Result = {"machine": machine(options.threads) | {"torch": torch.__version__}}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            found[part] = {"sharing": sharing, "products": products}[part](options, Path(folder))
    found["machine"]["load after"] = machine(options.threads)["load"]
    report(found, options.json)


if __name__ == "__main__":
    main()
