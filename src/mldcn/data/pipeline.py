"""Threads that work ahead by a bounded number of items, and a file that keeps parsed blocks between passes."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mldcn.data.parsing import Ids, ParsedBlock
from mldcn.data.splits import Parts

In = TypeVar("In")
Out = TypeVar("Out")


def ahead(items: Iterable[Out], lead: int = 2) -> Iterator[Out]:
    """The same items, made by a thread that is at most ``lead`` items ahead; its error is raised in its turn."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(lead)
    stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            more, value = made.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join()


def ordered_map(work: Callable[[In], Out], items: Iterable[In], workers: int | None = None) -> Iterator[Out]:
    """Like ``map``, by threads that are a bounded number of items ahead; an error is raised in its turn."""
    workers = workers or len(os.sched_getaffinity(0))
    waiting: deque[Future[Out]] = deque()
    iterator = iter(items)
    failed: Exception | None = None
    with ThreadPoolExecutor(workers) as pool:
        try:
            while failed is None:
                try:
                    waiting.append(pool.submit(work, next(iterator)))
                except StopIteration:
                    break
                except Exception as error:
                    failed = error
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            if failed is not None:
                raise failed
        finally:
            for future in waiting:
                future.cancel()


class Spool:
    """Parsed blocks in a temporary file, without their texts; use it as a context manager.

    Args:
        folder: where the file lies while it is there.
    """

    def __init__(self, folder: Path) -> None:
        handle, name = tempfile.mkstemp(prefix=".parsed-", dir=folder)
        self._path = Path(name)
        self._file = os.fdopen(handle, "wb")
        self._blocks: list[list[tuple[str, str, np.dtype[Any], tuple[int, ...]]]] = []
        self.rows = 0
        self.bytes = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, parsed: ParsedBlock, parts: Parts) -> None:
        """Appends a block, and the part of each of its rows."""
        arrays: list[tuple[str, str, NDArray[Any]]] = [("parts", "", parts)]
        for name in _PLAIN:
            arrays.append((name, "", getattr(parsed, name)))
        arrays += [("ids", name, ids.keys) for name, ids in parsed.ids.items()]
        arrays += [("numbers", name, values) for name, values in parsed.numbers.items()]
        arrays += [("vectors", name, values) for name, values in parsed.vectors.items()]
        for _, _, array in arrays:
            self._file.write(np.ascontiguousarray(array).data)
            self.bytes += array.nbytes
        self._blocks.append([(group, name, array.dtype, array.shape) for group, name, array in arrays])
        self.rows += parsed.rows

    def __iter__(self) -> Iterator[tuple[ParsedBlock, Parts]]:
        """The blocks in their order."""
        self._file.flush()
        with self._path.open("rb") as file:
            for block in self._blocks:
                groups: dict[str, dict[str, Any]] = {"ids": {}, "numbers": {}, "vectors": {}}
                plain: dict[str, Any] = {}
                for group, name, dtype, shape in block:
                    array = np.fromfile(file, dtype, int(np.prod(shape))).reshape(shape)
                    if group == "ids":
                        groups[group][name] = Ids(array, _NO_TEXTS)
                    elif name:
                        groups[group][name] = array
                    else:
                        plain[group] = array
                parts = plain.pop("parts")
                fields: dict[str, Any] = {**groups, **plain}
                yield ParsedBlock(rows=len(parts), **fields), parts


_PLAIN = ("labels", "weight", "position", "request", "user", "time")
_NO_TEXTS = pa.array([], pa.string())
