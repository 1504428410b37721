"""What a load test draws at random: when requests leave, whose they are, how many candidates they have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mldcn.errors import UserError

Arrivals = Literal["poisson", "constant"]
_SPREAD = 0.7  # of the logarithm of a lognormal number of candidates
_TAIL = 10  # times the median: its greatest


def arrivals(kind: Arrivals, rate: float, seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Seconds from the start at which requests leave, ``rate`` a second on average, all before ``seconds``."""
    if kind == "constant":
        return np.arange(0.0, seconds, 1.0 / rate)
    # Given their number, the times of a Poisson process are independent and uniform.
    return np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds)))


def zipf(users: int, exponent: float, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``count`` users from 0; user k comes with a probability proportional to (k + 1)^-exponent."""
    weights = np.arange(1, users + 1, dtype=np.float64) ** -exponent
    shares = np.cumsum(weights) / weights.sum()
    found: NDArray[np.int64] = np.searchsorted(shares[:-1], rng.random(count), side="right")
    return found


@dataclass(frozen=True)
class Candidates:
    """How many candidates requests have: always ``100``, ``20-500`` uniform, ``lognormal:100`` of that median."""

    kind: Literal["uniform", "lognormal"]
    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Candidates:
        """Reads the command line's form.

        Raises:
            UserError: it is none.
        """
        found = re.fullmatch(r"(?:(lognormal):)?([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?", text)
        if found is None or (found[1] and found[3]):
            raise UserError(f"--candidates {text}: write 100, 20-500 or lognormal:100")
        low, high = int(found[2]), int(found[3] or found[2])
        if found[1]:
            return cls("lognormal", low, _TAIL * low)
        if low > high:
            raise UserError(f"--candidates {text}: the smaller number goes first")
        return cls("uniform", low, high)

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Numbers of candidates, at least 1."""
        if self.kind == "uniform":
            return rng.integers(self.low, self.high + 1, count, dtype=np.int64)
        drawn = self.low * np.exp(_SPREAD * rng.standard_normal(count))
        found: NDArray[np.int64] = np.clip(np.rint(drawn), 1, self.high).astype(np.int64)
        return found
