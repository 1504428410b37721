"""What a case of the interaction tests is: a variant of an architecture, with its sizes in closed form."""

from dataclasses import dataclass, field
from typing import Any

import torch

from mldcn import interactions
from mldcn.layout import FieldLayout, as_layout

LAYOUT = FieldLayout.build(
    [
        ("age", "numeric", "user", 1),
        ("user", "categorical", "user", 3),
        ("item", "categorical", "item", 4),
        ("genre", "categorical", "item", 4),
    ]
)
D = LAYOUT.width


@dataclass(frozen=True)
class Case:
    """``params`` and ``flops`` are those on ``LAYOUT``, by a formula written out in the case."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    params: int = 0
    flops: int = 0
    reads_x0: bool = True  # not only its side inputs

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())]).replace(" ", "")

    def build(self, features=LAYOUT, perturb=True, seed=0):
        torch.manual_seed(seed)
        module = interactions.build({"name": self.name, **self.options}, features).double()
        if perturb:
            perturb_(module)
        return module


def inputs(module, layout=LAYOUT, n=5, dtype=torch.float64, seed=1):
    """``(x0, *side inputs)`` for n rows."""
    layout = as_layout(layout)
    draw = torch.Generator().manual_seed(seed)
    widths = [layout.width, *(side.width(layout) for side in module.sides)]
    return tuple(torch.randn(n, width, dtype=dtype, generator=draw) for width in widths)


def perturb_(module):
    """Random noise on every parameter and running statistic, so that none is at its special start."""
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
        for name, tensor in module.named_buffers():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) if "var" in name else 0.3 * torch.randn_like(tensor))
