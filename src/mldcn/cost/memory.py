"""Peak memory of a training step: measured, and estimated on tensors without values."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from mldcn.config import ModelConfig
from mldcn.cost.flops import ValueGuess
from mldcn.cost.sample import sample_batch
from mldcn.data.batch import Batch, EncodedLayout
from mldcn.embedding.sides import CrossedCodewords
from mldcn.embedding.tables import TableStack
from mldcn.model import Ranker
from mldcn.schema import Schema

aten = torch.ops.aten
# What reads one of a sparse tensor's two parts.
_PARTS = {aten._indices: 0, aten.indices: 0, aten._values: 1, aten.values: 1}


class Step(Protocol):
    """A training step: called with a batch, it moves the weights of the model that it was made for."""

    @property
    def optimisers(self) -> Sequence[torch.optim.Optimizer]:
        """Whose state lasts from step to step."""

    def __call__(self, batch: Batch) -> object:
        """Trains on a batch."""


Trainer = Callable[[Ranker], Step]


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors in training.

    lasting: weights, buffers, optimisers' state (of every row of a table, as after it was touched once) and
    the batch. step: the most that a step holds beyond them: activations, gradients, temporaries.
    """

    lasting: int
    step: int

    @property
    def peak(self) -> int:
        """The most that training holds."""
        return self.lasting + self.step


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    trainer: makes the training step of a model.
    """

    model: ModelConfig
    schema: Schema
    layout: EncodedLayout
    batch_size: int
    trainer: Trainer
    device: str = "cpu"

    def start(self) -> tuple[Ranker, Step, Batch]:
        """The model, its step, and a batch, on the device."""
        with torch.device(self.device):  # fake weights cannot be moved
            model = Ranker(self.model, self.schema, self.layout).train()
        batch = sample_batch(self.layout, self.batch_size).to(self.device)
        return model, self.trainer(model), batch


def measure_memory(training: Training) -> Memory:
    """Trains two steps and gives the peak of the second, by PyTorch's own allocator.

    Memory that PyTorch's kernels take from elsewhere is not in it, nor is the interpreter's.
    """
    model, step, batch = training.start()
    step(batch)
    lasting = _lasting(model, step, batch)
    if training.device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(batch)
        torch.cuda.synchronize()
        return Memory(lasting, torch.cuda.max_memory_allocated() - before)
    with (
        _without_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        step(batch)
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    assert results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return Memory(lasting, peak)


def estimate_memory(training: Training) -> Memory:
    """What :func:`measure_memory` would find, without allocating a model or computing anything.

    Two steps run on fake tensors, which have the sizes of real ones. Numbers of distinct ids in a batch are
    those expected of ids uniform over their tables. Temporaries inside a kernel are not seen.
    """
    tracker = _Tracker()
    with FakeTensorMode(), tracker:
        model, step, batch = training.start()
        tracker.distinct = _distinct_rows(model, training.layout, training.batch_size)
        step(batch)
        lasting = _lasting(model, step, batch)
        before = tracker.peak = tracker.live
        step(batch)
    return Memory(lasting, tracker.peak - before)


def _lasting(model: Ranker, step: Step, batch: Batch) -> int:
    states = [value for o in step.optimisers for state in o.state.values() for value in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *vars(batch).values(), *states]
    sizes = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _distinct_rows(model: Ranker, layout: EncodedLayout, batch_size: int) -> dict[int, int]:
    """Look-ups in a weight -> how many distinct rows they are expected to read."""
    columns: Counter[str] = Counter()
    for slot in layout.ids:
        columns[slot.table] += slot.length * slot.hashes
    expected: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, TableStack):
            reads = [(layout.tables[name], batch_size * columns[name]) for name in module.spans]
        elif isinstance(module, CrossedCodewords):
            reads = [(module.rows, batch_size * module.salts.numel())]
        else:
            continue
        distinct = sum(rows * (1 - (1 - 1 / rows) ** count) for rows, count in reads)
        expected[sum(count for _, count in reads)] = round(distinct)
    return expected


class _Tracker(ValueGuess):  # type: ignore[no-untyped-call]
    """Knows how many bytes of tensors are alive, and the most that ever were.

    ``distinct``: the answer to "how many of so many ids are new", which needs values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.distinct: dict[int, int] = {}
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        # A fake sparse tensor forgets its rows: they are kept here.
        self._rows = WeakTensorKeyDictionary()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation, and follows the storages of its results."""
        packet = func.overloadpacket
        if packet in _PARTS and args[0] in self._rows:
            return self._rows[args[0]][_PARTS[packet]]
        if packet in (aten.normal_, aten.uniform_):
            return args[0]  # there are no values to draw
        if packet is aten.nonzero:
            asked = args[0]
            found = self.distinct.get(asked.numel(), asked.numel())
            out = asked.new_empty((found, asked.dim()), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.layout == torch.sparse_coo:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._rows[out] = self._rows[given[0]] if given[0] in self._rows else tuple(given)
            return out
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = None
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """PyTorch's profiler tells the standard error stream that it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
