"""Batches of several requests: what is in them, how long they wait, what is refused."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from batcher_runs import rows, run

from mldcn.serving.engine import Scores
from mldcn.serving.refused import Reason, Refused
from mldcn.serving.server.batching import Batcher
from mldcn.serving.server.metrics import Metrics
from mldcn.serving.server.options import Batching


class Echo:
    """An engine whose probabilities are the rows' ids. ``gate`` holds it up; ``batches``: sizes of its calls."""

    two_steps = False

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []

    def score_rows(self, calls):
        self.batches.append([len(call) for call in calls])
        self.entered.set()
        assert self.gate.wait(10)
        if any((call.ids == -1).any() for call in calls):
            raise RuntimeError("broken")
        return [Scores(call.ids.astype(np.float32)) for call in calls]


async def held(engine, batcher):
    """Keeps the only worker busy; the task of its request."""
    engine.gate.clear()
    engine.entered.clear()
    task = asyncio.create_task(batcher.score(engine, rows(0)))
    while not engine.entered.is_set():
        await asyncio.sleep(0.001)
    return task


def test_what_waits_together_is_scored_together_and_each_gets_its_own():
    engine = Echo()

    async def test(batcher):
        first = await held(engine, batcher)
        others = [asyncio.create_task(batcher.score(engine, rows(*range(n, 2 * n)))) for n in (1, 2, 3)]
        await asyncio.sleep(0.01)
        assert batcher.waiting == 6
        engine.gate.set()
        await first
        return [(await other).probabilities[:, 0].tolist() for other in others]

    assert run(test, rows=64, delay=0.0) == [[1], [2, 3], [3, 4, 5]]
    assert engine.batches == [[1], [1, 2, 3]]


def test_a_batch_has_no_more_rows_than_it_may_but_a_long_request_is_not_cut():
    engine = Echo()

    async def test(batcher):
        first = await held(engine, batcher)
        tasks = [asyncio.create_task(batcher.score(engine, rows(*[1] * n))) for n in (2, 2, 1, 9, 1)]
        await asyncio.sleep(0.01)
        engine.gate.set()
        await asyncio.gather(first, *tasks)

    run(test, rows=4, delay=0.0)
    assert engine.batches == [[1], [2, 2], [1], [9], [1]]


def test_a_request_waits_for_others_no_longer_than_the_delay():
    engine = Echo()

    async def test(batcher):
        begun = time.monotonic()
        first = asyncio.create_task(batcher.score(engine, rows(1)))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(batcher.score(engine, rows(2)))
        await asyncio.gather(first, second)
        return time.monotonic() - begun

    assert run(test, rows=64, delay=0.2) >= 0.2
    assert engine.batches == [[1, 1]]


def test_a_full_batch_does_not_wait():
    engine = Echo()

    async def test(batcher):
        async with asyncio.timeout(5):
            await asyncio.gather(*(batcher.score(engine, rows(1, 2)) for _ in range(2)))

    run(test, rows=4, delay=60.0)
    assert engine.batches == [[2, 2]]


def test_no_batch_mixes_engines():
    old, new = Echo(), Echo()

    async def test(batcher):
        first = await held(old, batcher)
        tasks = [asyncio.create_task(batcher.score((old, new)[i % 2], rows(i))) for i in range(6)]
        await asyncio.sleep(0.01)
        old.gate.set()
        answers = await asyncio.gather(*tasks)
        await first
        return [answer.probabilities[0, 0] for answer in answers]

    assert run(test, rows=64, delay=0.0) == [0, 1, 2, 3, 4, 5]
    assert old.batches == [[1], [1, 1, 1]]
    assert new.batches == [[1, 1, 1]]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again():
    engine = Echo()

    async def test(batcher):
        first = await held(engine, batcher)
        waiting = asyncio.create_task(batcher.score(engine, rows(*range(4))))
        await asyncio.sleep(0.01)
        with pytest.raises(Refused) as caught:
            await batcher.score(engine, rows(*range(5)))
        assert caught.value.reason is Reason.BUSY
        assert caught.value.retry_after >= 1
        fits = asyncio.create_task(batcher.score(engine, rows(*range(4))))
        await asyncio.sleep(0.01)
        engine.gate.set()
        await asyncio.gather(first, waiting, fits)
        # An empty queue takes even a request that is longer than it.
        return len(await batcher.score(engine, rows(*range(20))))

    assert run(test, rows=64, delay=0.0, queue_rows=8) == 20


def test_nobody_joins_a_queue_in_which_one_has_waited_too_long():
    engine = Echo()

    async def test(batcher):
        first = await held(engine, batcher)
        waiting = asyncio.create_task(batcher.score(engine, rows(1)))
        await asyncio.sleep(0.01)
        soon = asyncio.create_task(batcher.score(engine, rows(2)))
        await asyncio.sleep(0.25)
        with pytest.raises(Refused) as caught:
            await batcher.score(engine, rows(3))
        assert caught.value.reason is Reason.BUSY
        patient = asyncio.create_task(batcher.score(engine, rows(4), Batching(queue_seconds=60.0)))
        await asyncio.sleep(0.01)
        engine.gate.set()
        await asyncio.gather(first, waiting, soon, patient)
        return len(await batcher.score(engine, rows(5)))  # nobody waits any more

    assert run(test, delay=0.0, queue_seconds=0.2) == 1


def test_nobody_scores_what_nobody_waits_for():
    engine = Echo()

    async def test(batcher):
        first = await held(engine, batcher)
        gone = asyncio.create_task(batcher.score(engine, rows(1)))
        stays = asyncio.create_task(batcher.score(engine, rows(2)))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, stays)
        return batcher.waiting

    assert run(test, rows=64, delay=0.0) == 0
    assert engine.batches == [[1], [1]]


def test_an_error_reaches_those_of_its_batch_and_work_goes_on():
    engine = Echo()

    async def test(batcher):
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.score(engine, rows(-1))
        return (await batcher.score(engine, rows(5))).probabilities.tolist()

    assert run(test, rows=4, delay=0.0) == [[5.0]]


def test_a_request_of_no_rows_gets_its_answer():
    engine = Echo()

    async def test(batcher):
        return len(await batcher.score(engine, rows()))

    assert run(test, rows=4, delay=0.0) == 0


def test_who_still_waits_when_the_server_ends_is_told():
    engine = Echo()

    async def test():
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(Batching(delay=0.0), pool, Metrics())
            batcher.start()
            first = await held(engine, batcher)
            waiting = asyncio.create_task(batcher.score(engine, rows(1)))
            await asyncio.sleep(0.01)
            engine.gate.set()
            await batcher.stop()
            results = await asyncio.gather(first, waiting, return_exceptions=True)
        return [type(result) for result in results]

    found = asyncio.run(test())
    assert all(kind in (Refused, asyncio.CancelledError, Scores) for kind in found), found
