"""A batcher at work, and encoded rows for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from mldcn.serving.encoding import Rows
from mldcn.serving.server.batching import Batcher
from mldcn.serving.server.metrics import Metrics
from mldcn.serving.server.options import Batching

T = TypeVar("T")


def rows(*ids: int) -> Rows:
    """Rows of one id each and no numbers."""
    return Rows(np.array(ids, np.int32).reshape(-1, 1), np.zeros((len(ids), 0), np.float32))


def run(test: Callable[[Batcher], Awaitable[T]], **options) -> T:
    """Runs a coroutine with a batcher that is at work."""

    async def body() -> T:
        with ThreadPoolExecutor(2) as pool:
            batcher = Batcher(Batching(**options), pool, Metrics())
            batcher.start()
            try:
                return await test(batcher)
            finally:
                await batcher.stop()

    return asyncio.run(body())
