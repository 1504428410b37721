"""Where a run's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

from mldcn.data.batch import Batch


class Clock:
    """Measures the time spent training, evaluations and checkpoints left out, and that spent waiting for data.

    waiting: seconds in which the loop had no batch to work on. rows: trained on.
    """

    def __init__(self) -> None:
        self.waiting = 0.0
        self.rows = 0
        self._spent = 0.0
        self._since: float | None = None
        self._lap = (0.0, 0)

    @property
    def seconds(self) -> float:
        """Spent training, waiting included."""
        return self._spent + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The clock runs inside the block."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._spent, self._since = self.seconds, None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside the block, which lies in one where it runs, the clock stands."""
        self._spent, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; how long each was waited for is measured."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waiting += time.perf_counter() - asked
            if batch is None:
                return
            self.rows += len(batch)
            yield batch

    def rate(self) -> float:
        """Rows a second since it was last asked for."""
        now, rows = self.seconds, self.rows
        rate = (rows - self._lap[1]) / max(now - self._lap[0], 1e-9)
        self._lap = (now, rows)
        return rate

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"seconds": self.seconds, "waiting": self.waiting, "rows": self.rows}

    def restore(self, state: dict[str, float]) -> None:
        """Goes on from what :meth:`state` gave."""
        self._spent, self.waiting, self.rows = state["seconds"], state["waiting"], int(state["rows"])
        self._lap = (self._spent, self.rows)
