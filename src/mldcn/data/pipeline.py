"""Threads that work ahead by a bounded number of items."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa

In = TypeVar("In")
Out = TypeVar("Out")


def ahead(items: Iterable[Out], lead: int = 2) -> Iterator[Out]:
    """The same items, made by a thread that is at most ``lead`` items ahead; its error is raised in its turn."""
    made: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    room = threading.Semaphore(lead)
    stopped = threading.Event()

    def make() -> None:
        try:
            source = iter(items)
            while room.acquire() and not stopped.is_set():
                made.put((True, next(source)))
        except StopIteration:
            made.put((False, None))
        except BaseException as error:
            made.put((False, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            more, value = made.get()
            if more:
                room.release()
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        room.release()
        thread.join()


def ordered_map(work: Callable[[In], Out], items: Iterable[In], workers: int | None = None) -> Iterator[Out]:
    """Like ``map``, by threads that are a bounded number of items ahead; an error is raised in its turn."""
    workers = workers or cores()
    # An item waits for the next worker that is free; not for a single one, which there is where memory is scarce.
    most = workers if workers > 1 else 0
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
                if len(waiting) > most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            if failed is not None:
                raise failed
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Inside the block a thread that waits for the interpreter asks for it after 0.1 ms.

    By default it waits for 5 ms, in which another thread may take many steps of NumPy that each let go of the
    interpreter for a moment too short to be noticed: the threads would work one after the other.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def give_memory_back() -> None:
    """Returns freed memory to the system, which allocators else keep for later, in pieces too small to use."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cores() -> int:
    """Threads that the process may run at the same time."""
    return len(os.sched_getaffinity(0))
