"""A pruned DNN computed as a dense and as a sparse one: what zeros are worth at inference on a CPU.

    python benchmarks/sparse.py --json docs/results/sparse.json

The layers are DeepLight's (400 wide on 39 fields of 10) and wider ones. ``csr`` has the zeros that
``training.pruning`` makes, the smallest weights of each layer wherever they are. ``bsr`` has as many zeros in
whole blocks of 16 x 16, the blocks of smallest norm: no training here makes these, they show what another kind
of pruning would gain. The formats take turns of a few calls, and of each round's turns a format's fastest counts.
A ratio is that of one round's times. With one thread they are the thread's processor time, to which other work
on the machine adds little; with more, wall time, which wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import Result, machine, report, shown, spread

NETS = {"deeplight": (390, 400, 400, 400), "wide": (1024, 1024, 1024, 1024)}
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
BATCHES = (1, 16, 256)
BLOCK = 16
TURNS = 3  # of a format in a round


def pruned(weight: Tensor, sparsity: float, block: int = 1) -> Tensor:
    """A copy whose blocks of smallest norm are zero."""
    rows, columns = (-(-size // block) * block for size in weight.shape)
    padded = F.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))
    blocks = padded.reshape(rows // block, block, columns // block, block)
    norms = blocks.norm(dim=(1, 3), keepdim=True)
    count = max(1, round(sparsity * norms.numel()))
    kept = blocks * (norms > norms.flatten().kthvalue(count).values)
    return kept.reshape(rows, columns)


class Layers:
    """A DNN for inference: ``h = ReLU(W h + b)``.

    Args:
        weights: ``(out, in)`` each.
        biases: ``(out,)`` each.
        kind: ``dense``, ``csr`` or ``bsr``.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor], kind: str) -> None:
        self.kind = kind
        if kind == "csr":
            weights = [weight.to_sparse_csr() for weight in weights]
        elif kind == "bsr":
            weights = [weight.to_sparse_bsr((BLOCK, BLOCK)) for weight in weights]
        self.weights, self.biases = weights, biases

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, in)`` to ``(B, out)``."""
        if self.kind == "dense":
            for weight, bias in zip(self.weights, self.biases, strict=True):
                x = F.linear(x, weight, bias).relu_()
            return x
        # A sparse matrix stands on the left: examples are columns from here on.
        h = x.t().contiguous()
        for weight, bias in zip(self.weights, self.biases, strict=True):
            h = torch.addmm(bias.unsqueeze(1), weight, h).relu_()
        return h.t()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Of one call, out of so many in a row."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        work()
    return (clock() - start) / repeats


def measure(
    widths: tuple[int, ...], sparsity: float, batch: int, rounds: int, turn: float
) -> dict[str, Result]:
    """Milliseconds of each format, and its speed over that of the dense product, round by round."""
    torch.manual_seed(0)
    # Whole blocks need whole numbers of them; a few columns more change nothing.
    sizes = [-(-width // BLOCK) * BLOCK for width in widths]
    raw = [torch.randn(o, i) / i**0.5 for i, o in pairwise(sizes)]
    biases = [torch.randn(o) for o in sizes[1:]]
    zeros = {"csr": [pruned(w, sparsity) for w in raw], "bsr": [pruned(w, sparsity, BLOCK) for w in raw]}
    nets = {kind: Layers(weights, biases, kind) for kind, weights in zeros.items()}
    nets["dense"] = Layers(zeros["csr"], biases, "dense")
    x = torch.randn(batch, sizes[0])
    for kind, weights in zeros.items():
        torch.testing.assert_close(nets[kind](x), Layers(weights, biases, "dense")(x), rtol=1e-3, atol=1e-4)
    repeats = {
        name: max(1, round(turn / max(seconds(lambda n=net: n(x), 3), 1e-7))) for name, net in nets.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds):
        turns: dict[str, list[float]] = {name: [] for name in nets}
        for _ in range(TURNS):
            for name, net in nets.items():
                turns[name].append(seconds(lambda n=net: n(x), repeats[name]))
        for name, times in turns.items():
            taken[name].append(min(times))
    found = {name: {"milliseconds": spread([1e3 * t for t in times])} for name, times in taken.items()}
    for name in zeros:
        pairs = zip(taken["dense"], taken[name], strict=True)
        found[name]["times_as_fast"] = spread([dense / other for dense, other in pairs])
    return found


def verdict(ratio: Result) -> str:
    """Whether a format is faster, beyond what the rounds differ by."""
    if ratio["low"] > 1:
        return "faster"
    return "slower" if ratio["high"] < 1 else "no clear difference"


@torch.inference_mode()
def main() -> None:
    """Prints a line for each net, number of threads, sparsity and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.004, help="seconds that a turn takes, about")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # A later run of one number of threads keeps the others' rows.
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    rows: list[Result] = [row for row in known.get("rows", []) if row["threads"] not in options.threads]
    for name, threads, sparsity, batch in product(NETS, options.threads, SPARSITIES, BATCHES):
        torch.set_num_threads(threads)
        found = measure(NETS[name], sparsity, batch, options.rounds, options.turn)
        row = {"net": name, "threads": threads, "sparsity": sparsity, "batch": batch, **found}
        dense = shown(found["dense"]["milliseconds"], 3)
        print(f"{name}, {threads} threads, {sparsity:.0%} zeros, batch {batch}: dense {dense} ms")
        for kind in ("csr", "bsr"):
            ratio = found[kind]["times_as_fast"]
            row[kind]["verdict"] = verdict(ratio)
            print(f"  {kind}: {shown(ratio, 2)} times as fast as dense: {row[kind]['verdict']}", flush=True)
        rows.append(row)
    nets = {name: list(widths) for name, widths in NETS.items()}
    about = {"machine": machine(max(options.threads)) | {"torch": torch.__version__}, "nets": nets}
    report({**about, "rounds": options.rounds, "bsr_block": BLOCK, "rows": rows}, options.json)


if __name__ == "__main__":
    main()
