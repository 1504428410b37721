"""Does a training step cost the same however tall the tables are?

    python benchmarks/table_optim.py                       # 1e5, 1e6, 1e7 and 5e7 rows; needs some 12 GB
    python benchmarks/table_optim.py --rows 1e5 1e6        # smaller

39 categorical fields of width 16, batches of 4096. Batch i touches the same number of distinct rows in tables
of every height. Which rows these are is drawn anew for each step, so that rows of a tall table are never still
in the processor's cache from the step before. That is the worst case: a real log's frequent ids would be. Steps
at the different heights take turns, so that whatever else the machine does falls on all of them alike. Measured
are the embedding's part (look-up, its gradient, the optimiser) and the whole step with a DCN-V2 of three
full-rank layers and an MLP behind it. The optimiser's state is touched beforehand; what the first touch of each
page costs is measured on its own. ``--optimisers torch`` is PyTorch's own way, for comparison: a sparse
``functional.embedding`` and ``SparseAdam``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from turns import Result, machine, report

from mldcn.config import EmbeddingConfig
from mldcn.data.batch import EncodedLayout, IdSlot
from mldcn.embedding import Embedder
from mldcn.schema import Categorical, Label, Schema
from mldcn.training.table_optim import LazyAdam, RowWiseAdagrad, clip_grad_norm

FIELDS, WIDTH, BATCH = 39, 16, 4096
ACTIVE = 2500  # ids of a field that a batch draws from, by Zipf's law


class CrossNet(nn.Module):
    """DCN-V2, x <- x0 * (W x + b) + x, with an MLP behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.deep = nn.Sequential(
            nn.Linear(width, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 1)
        )

    def forward(self, x0: Tensor) -> Tensor:
        """Logits ``(B,)`` from ``x0 (B, d)``."""
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return self.deep(x).squeeze(1)


@dataclass
class Contender:
    """Tables of one height with one optimiser."""

    rows: int
    optimiser: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_field = self.rows // FIELDS
        names = [f"c{i}" for i in range(FIELDS)]
        layout = EncodedLayout(
            tuple(IdSlot(name, name, "context", i, 1) for i, name in enumerate(names)),
            (),
            dict.fromkeys(names, per_field),
            ("click",),
        )
        schema = Schema(
            features=tuple(Categorical(kind="categorical", name=name) for name in names),
            labels=(Label(name="click"),),
        )
        self.per_field = per_field
        self.embedder = Embedder(layout, schema, EmbeddingConfig(dim=WIDTH))
        (self.table,) = self.embedder.tables().values()
        kinds = {"lazy_adam": LazyAdam, "rowwise_adagrad": RowWiseAdagrad, "torch": torch.optim.SparseAdam}
        self.table_optimiser = kinds[self.optimiser]([self.table], lr=1e-3)
        self.shift = torch.arange(FIELDS, dtype=torch.int32) * per_field
        self.dense = CrossNet(FIELDS * WIDTH)
        self.dense_optimiser = torch.optim.Adam(self.dense.parameters(), lr=1e-3, fused=True)

    def ids(self, logical: np.ndarray, rng: np.random.Generator) -> Tensor:
        """A batch of ids: field by field, its logical ids fall on distinct rows drawn anew."""
        columns = [
            rng.choice(self.per_field, ACTIVE, replace=False)[logical[:, column]] for column in range(FIELDS)
        ]
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.int32))

    def look_up(self, ids: Tensor) -> Tensor:
        """``x0 (B, d)``."""
        if self.optimiser == "torch":
            return functional.embedding(ids + self.shift, self.table, sparse=True).flatten(1)
        return self.embedder(ids, NO_NUMBERS)

    def embedding_step(self, ids: Tensor, upstream: Tensor) -> None:
        """Look-up, gradient and update of the tables."""
        self.look_up(ids).backward(upstream)
        self.table_optimiser.step()
        self.table_optimiser.zero_grad(set_to_none=True)

    def whole_step(self, ids: Tensor, labels: Tensor) -> None:
        """One step as the training loop does it."""
        loss = functional.binary_cross_entropy_with_logits(self.dense(self.look_up(ids)), labels)
        loss.backward()
        clip_grad_norm([self.table, *self.dense.parameters()], 10.0)
        for optimiser in (self.table_optimiser, self.dense_optimiser):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def touch_state(self) -> None:
        """Makes the whole state resident."""
        for value in self.table_optimiser.state[self.table].values():
            if isinstance(value, Tensor) and value.dim():
                value.add_(0.0)


NO_NUMBERS = torch.zeros(BATCH, 0)


def logical_batches(count: int) -> list[np.ndarray]:
    """Batches of logical ids ``(BATCH, FIELDS)`` below ``ACTIVE``, by Zipf's law."""
    rng = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, ACTIVE + 1) ** 1.05
    return [rng.choice(ACTIVE, (BATCH, FIELDS), p=weights / weights.sum()) for _ in range(count)]


def measure(heights: list[int], optimiser: str, rounds: int, clock: Callable[[], float]) -> list[Contender]:
    """Times ``rounds`` steps of each part at each height, in turns."""
    contenders = [Contender(rows, optimiser) for rows in heights]
    rng = np.random.default_rng(1)
    upstream = torch.randn(BATCH, FIELDS * WIDTH, generator=torch.Generator().manual_seed(0)) / BATCH
    labels = (torch.rand(BATCH, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    for part, count in (("first touch", 4), ("embedding", 3 * rounds), ("whole step", rounds)):
        for i, logical in enumerate(logical_batches(count + 1)):
            # Whose turn is first changes too: the one before leaves its rows in the cache.
            for contender in contenders[i % len(contenders) :] + contenders[: i % len(contenders)]:
                ids = contender.ids(logical, rng)
                start = clock()
                if part == "whole step":
                    contender.whole_step(ids, labels)
                else:
                    contender.embedding_step(ids, upstream)
                if i or part == "first touch":  # the first step of a part warms up
                    contender.seconds.setdefault(part, []).append(clock() - start)
        if part == "first touch":
            for contender in contenders:
                contender.touch_state()
    return contenders


def main() -> None:
    """Prints a line a height, part and optimiser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6, 1e7, 5e7])
    parser.add_argument(
        "--optimisers",
        nargs="+",
        default=["rowwise_adagrad", "lazy_adam"],
        choices=["rowwise_adagrad", "lazy_adam", "torch"],
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the process's own CPU time, for a machine that does other work too (with one thread)",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    torch.set_num_threads(options.threads)
    heights = [int(rows) for rows in options.rows]
    distinct = [
        sum(len(np.unique(batch[:, column])) for column in range(FIELDS)) for batch in logical_batches(5)
    ]
    print(f"{FIELDS} fields x {WIDTH}, batch {BATCH}, {statistics.mean(distinct):,.0f} distinct rows a batch")
    print(
        f"{options.threads} thread(s); median {options.clock} ms (quartiles), relative to the first height\n"
    )
    found: Result = {"machine": machine(options.threads), "torch": torch.__version__, "milliseconds": {}}
    found["distinct_rows"] = statistics.mean(distinct)
    for optimiser in options.optimisers:
        contenders = measure(heights, optimiser, options.rounds, clock)
        for part in contenders[0].seconds:
            base = statistics.median(contenders[0].seconds[part])
            for contender in contenders:
                low, middle, high = statistics.quantiles(contender.seconds[part], n=4)
                figures = {"median": middle * 1e3, "q1": low * 1e3, "q3": high * 1e3, "ratio": middle / base}
                found["milliseconds"].setdefault(optimiser, {}).setdefault(part, {})[contender.rows] = figures
                print(
                    f"{optimiser:16} {part:12} {contender.rows:>11,} rows  {middle * 1e3:8.1f} "
                    f"({low * 1e3:.1f} .. {high * 1e3:.1f})  x {middle / base:.3f}",
                    flush=True,
                )
        del contenders  # before the next ones take as much memory
    report(found, options.json)


if __name__ == "__main__":
    main()
