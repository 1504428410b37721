"""How long a model takes to score a batch, beside how fast the machine multiplies matrices."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mldcn.config import ModelConfig
from mldcn.cost.sample import sample_batch
from mldcn.data.batch import EncodedLayout
from mldcn.model import Ranker, Scorer
from mldcn.schema import Schema

BATCH_SIZES = (1, 4, 16, 64, 256, 1024, 4096)
SECONDS = 1.0  # of timing a batch size
LEAST, MOST = 30, 5_000  # calls timed


@dataclass(frozen=True)
class Latency:
    """Seconds to score a batch.

    calls: how many were timed. share: of the machine's rate of matrix products, reached by the model's.
    """

    batch: int
    median: float
    p99: float
    calls: int
    share: float


@dataclass(frozen=True)
class Timings:
    """Latencies by batch size. matrix_rate: FLOPs a second of one large product, measured in the same run."""

    device: str
    threads: int
    matrix_rate: float
    latencies: tuple[Latency, ...]


def measure_latency(
    config: ModelConfig,
    schema: Schema,
    layout: EncodedLayout,
    flops: int,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    device: str = "cpu",
    seconds: float = SECONDS,
) -> Timings:
    """Times a model that scores random rows, embedding included, from ids to logits.

    Args:
        config: the model.
        schema: the log's schema.
        layout: what the columns of its encoded rows are.
        flops: GEMM FLOPs per example.
        batch_sizes: rows scored at once.
        device: where.
        seconds: to spend on each batch size.
    """
    model = Ranker(config, schema, layout).to(device).eval()
    rate = matrix_rate(device)
    found = []
    for size in batch_sizes:
        times = _times(model, layout, size, device, seconds)
        median = statistics.median(times)
        found.append(Latency(size, median, quantile(times, 0.99), len(times), flops * size / median / rate))
    return Timings(device, torch.get_num_threads(), rate, tuple(found))


class LatencyMeter:
    """Median seconds to score a batch: a cost for :func:`mldcn.cost.meet_budget`.

    Tables are filled once: a search changes what is behind them.

    Args:
        schema: the log's schema.
        layout: what the columns of its encoded rows are.
        batch_size: rows scored at once.
        device: where.
        seconds: to spend on each config.
    """

    def __init__(
        self,
        schema: Schema,
        layout: EncodedLayout,
        batch_size: int,
        *,
        device: str = "cpu",
        seconds: float = 0.2,
    ) -> None:
        self.schema, self.layout, self.batch_size = schema, layout, batch_size
        self.device, self.seconds = device, seconds
        self._built: tuple[ModelConfig, Ranker] | None = None

    def __call__(self, config: ModelConfig) -> float:
        """The median latency of a config's model."""
        return statistics.median(
            _times(self._model(config), self.layout, self.batch_size, self.device, self.seconds)
        )

    def _model(self, config: ModelConfig) -> Ranker:
        if self._built is not None and self._built[0].embedding == config.embedding:
            model = self._built[1]
            scorer = Scorer(config, model.embedder.layout, model.tasks).to(self.device).eval()
            if scorer.interaction.sides == model.scorer.interaction.sides:
                model.scorer = scorer
                return model
        model = Ranker(config, self.schema, self.layout).to(self.device).eval()
        self._built = (config, model)
        return model


def matrix_rate(device: str = "cpu") -> float:
    """FLOPs a second of the machine's product of two large float32 matrices, the best of several."""
    size = 4096 if device.startswith("cuda") else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = min(call_times(lambda: torch.mm(a, b), device, seconds=0.5, least=5))
    return 2.0 * size**3 / best


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least a share of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def call_times(
    call: Callable[[], object], device: str, *, seconds: float = SECONDS, least: int = LEAST
) -> list[float]:
    """Seconds of each of many calls, after three that warm up."""
    wait = _wait_for_cuda if device.startswith("cuda") else _go_on
    for _ in range(3):
        call()
    wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < MOST):
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return times


def _times(model: Ranker, layout: EncodedLayout, size: int, device: str, seconds: float) -> list[float]:
    batch = sample_batch(layout, size).to(device)
    return call_times(lambda: model.relevance(batch.ids, batch.dense), device, seconds=seconds)


def _wait_for_cuda() -> None:
    torch.cuda.synchronize()


def _go_on() -> None:
    """A CPU is done when the call is."""
