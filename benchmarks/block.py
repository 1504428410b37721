"""ML-DCN layers alone, eager and compiled, as a share of the machine's own matrix-product rate.

    python benchmarks/block.py                                             # small, for a CPU
    python benchmarks/block.py --width 4096 --rank 1024 --dtype bfloat16   # for a GPU
    python benchmarks/block.py --width 16384 --rank 4096 --dtype bfloat16

The rate of matrix products is measured in turn with the block, on its own shapes and in its type: for the forward
pass one product a matrix, for the backward pass two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from turns import Result, machine, report, shown, spread

from mldcn.interactions import MLDCN


class Block:
    """The work to be timed.

    Args:
        options: the command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.batch = options.batch
        like = {"device": self.device, "dtype": getattr(torch, options.dtype)}
        self.model = MLDCN(options.width, num_layers=options.layers, rank=options.rank).to(**like)
        self.compiled: nn.Module = torch.compile(self.model)  # type: ignore[assignment]
        self.x0 = torch.randn(options.batch, options.width, **like).requires_grad_()
        self.grad = torch.randn(options.batch, self.model.out_features, **like)
        shapes = [tuple(p.shape) for p in self.model.parameters() if p.dim() == 2]
        self.products = [
            tuple(torch.randn(shape, **like) for shape in ((self.batch, i), (o, i), (self.batch, o)))
            for o, i in shapes
        ]
        self.flops = sum(2 * self.batch * o * i for o, i in shapes)

    def run_products(self, backward: bool) -> None:
        """The block's matrix products and nothing else."""
        for x, weight, grad in self.products:
            x @ weight.t()
            if backward:
                grad @ weight
                grad.t() @ x

    def run(self, model: nn.Module, backward: bool) -> None:
        """A forward pass for inference, or a forward and a backward pass."""
        if not backward:
            with torch.no_grad():
                model(self.x0)
            return
        model(self.x0).backward(self.grad)
        model.zero_grad(set_to_none=True)
        self.x0.grad = None

    def seconds(self, work: Callable[[], None]) -> float:
        """The wall time of a call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(options: argparse.Namespace) -> Result:
    """Times eager and compiled passes and the products, in turns."""
    torch.manual_seed(0)
    block = Block(options)
    models: dict[str, nn.Module] = {"eager": block.model}
    if options.compile:
        models["compiled"] = block.compiled
    device = torch.cuda.get_device_name(block.device) if block.device.type == "cuda" else "cpu"
    found: Result = {
        "machine": machine(torch.get_num_threads()) | {"device": device, "torch": torch.__version__},
        "shape": {k: getattr(options, k) for k in ("width", "rank", "layers", "batch", "dtype")},
    }
    for part, backward in (("forward", False), ("forward and backward", True)):
        works: dict[str, Callable[[], None]] = {"products": lambda b=backward: block.run_products(b)}
        for name, model in models.items():
            works[name] = lambda m=model, b=backward: block.run(m, b)
        taken: dict[str, list[float]] = {name: [] for name in works}
        for i in range(options.warm + options.rounds):
            for name, work in works.items():
                elapsed = block.seconds(work)
                if i >= options.warm:
                    taken[name].append(elapsed)
        flops = block.flops * (3 if backward else 1)
        found[part] = {
            "products_tflops": flops / statistics.median(taken["products"]) / 1e12,
            "seconds": {name: spread(values) for name, values in taken.items()},
            "share_of_products": {
                name: spread([p / t for p, t in zip(taken["products"], taken[name], strict=True)])
                for name in models
            },
        }
    return found


def main() -> None:
    """Prints each pass's share of the matrix-product rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=624, help="d")
    parser.add_argument("--rank", type=int, default=256, help="r")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    print(found["machine"], found["shape"])
    for part in ("forward", "forward and backward"):
        print(f"{part}: matrix products alone {found[part]['products_tflops']:.3f} TFLOP/s")
        for name, share in found[part]["share_of_products"].items():
            taken = {k: v * 1e3 for k, v in found[part]["seconds"][name].items()}
            print(f"  {name:10} {shown(taken, 1)} ms, {shown(share, 3)} of that rate")
    report(found, options.json)


if __name__ == "__main__":
    main()
