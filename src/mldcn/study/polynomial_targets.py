"""The functions of Section 6 of the DCN V2 paper (Eq. 6 and those of Figure 4 and Table 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """A function of ``features`` inputs that are uniform on [-1, 1], and the deviation of the noise on it."""

    features: int
    function: Callable[[Tensor], Tensor]
    noise: float = 0.0

    def draw(self, rows: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``x (rows, features)`` and ``y (rows,)``."""
        x = torch.rand(rows, self.features, generator=generator, dtype=dtype) * 2 - 1
        y = self.function(x)
        if self.noise:
            y = y + self.noise * torch.randn(rows, generator=generator, dtype=dtype)
        return x, y


def _f1(generator: torch.Generator) -> Target:
    return Target(4, lambda x: x[:, 0] * x.sum(dim=1))


def _f2(generator: torch.Generator) -> Target:
    def function(x: Tensor) -> Tensor:
        a, b, c = x.unbind(dim=1)
        return a * a + 0.1 * a * b + b * c + 0.1 * c * c

    return Target(3, function)


def _f3(generator: torch.Generator) -> Target:
    return Target(100, _monomials(100, 2, torch.randn(100, generator=generator), generator))


def _homogeneous(order: int) -> Callable[[torch.Generator], Target]:
    return lambda generator: Target(50, _monomials(50, order, _signs(20, generator), generator))


def _combined(generator: torch.Generator) -> Target:
    """Orders 1 to 4, a sine and noise.

    The paper leaves the number of inputs and the scales open. The sine's weights have norm 1/4: its cube, which
    holds every product of three inputs, then lies below the noise, and so do its higher orders.
    """
    features, size = 10, 0.2
    parts = [
        _monomials(features, order, size * torch.randn(terms, generator=generator), generator)
        for order, terms in ((2, 20), (3, 10), (4, 5))
    ]
    linear = size * torch.randn(features, generator=generator)
    inner = torch.randn(features, generator=generator)
    inner = 0.25 * inner / inner.norm()

    def function(x: Tensor) -> Tensor:
        total = x @ linear.to(x) + 0.1 * torch.sin(2 * (x @ inner.to(x)) + 0.1)
        for part in parts:
            total = total + part(x)
        return total

    return Target(features, function, noise=0.01)


def _signs(terms: int, generator: torch.Generator) -> Tensor:
    """Weights of one size: the RMSE then shows how many terms are missed, and no term is too small to see."""
    return torch.randint(2, (terms,), generator=generator) * 2.0 - 1.0


def _monomials(
    features: int, order: int, weights: Tensor, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """The weighted sum of products of ``order`` different inputs, drawn at random."""
    chosen: set[tuple[int, ...]] = set()
    while len(chosen) < len(weights):
        chosen.add(tuple(sorted(torch.randperm(features, generator=generator)[:order].tolist())))
    index = torch.tensor(sorted(chosen))  # (terms, order)
    return lambda x: x[:, index].prod(dim=2) @ weights.to(x)


TARGETS: dict[str, Callable[[torch.Generator], Target]] = {
    "f1": _f1,
    "f2": _f2,
    "f3": _f3,
    "order3": _homogeneous(3),
    "order4": _homogeneous(4),
    "combined": _combined,
}
TargetName = Literal["f1", "f2", "f3", "order3", "order4", "combined"]
