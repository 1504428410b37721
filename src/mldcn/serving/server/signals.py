"""Signals to the process that leads a server: drain, or look at the models' folders again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from typing import Any


def take_signals(stop: asyncio.Event, refresh: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In the running event loop: SIGTERM and SIGINT set ``stop``, SIGHUP begins ``refresh``."""
    loop = asyncio.get_running_loop()
    pending: set[asyncio.Task[None]] = set()

    def begin() -> None:
        task = loop.create_task(refresh())
        pending.add(task)
        task.add_done_callback(pending.discard)

    with contextlib.suppress(RuntimeError, ValueError):  # only the main thread takes signals
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, begin)
