"""Both loops on a clock that does not run by itself, against servers made up for it."""

import asyncio

import numpy as np
import pytest

from mldcn.loadtest.loops import Recorder, closed_loop, open_loop, percentiles


class Clock(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time: its clock jumps to what is due next."""

    def __init__(self):
        super().__init__()
        self.now = 100.0
        select = self._selector.select

        def jump(timeout=None):
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.now


def on_clock(work):
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(work)


def server(stall=(0.0, 0.0), takes=0.01):
    """Answers one request after another, none within the ``stall`` (its begin and end, from the start)."""

    async def make():
        turn = asyncio.Lock()
        begun = asyncio.get_running_loop().time()

        async def send(number):
            async with turn:
                now = asyncio.get_running_loop().time() - begun
                if stall[0] <= now < stall[1]:
                    await asyncio.sleep(stall[1] - now)
                await asyncio.sleep(takes)

        return send

    return make()


def test_a_stall_shows_in_all_who_would_have_waited():
    async def both():
        times = np.arange(0, 10, 0.02).tolist()  # 50 a second, where 100 are possible
        opened = await open_loop(await server(stall=(5.0, 6.0)), times, 50, 10, Recorder())
        closed = await closed_loop(await server(stall=(5.0, 6.0)), 1, 10, Recorder())
        return opened, closed

    opened, closed = on_clock(both())
    assert opened.sent == opened.answered == 500
    # 50 requests came while it stalled, and nearly as many while it worked them off: a fifth of all were late.
    assert opened.latencies[50.0] == pytest.approx(0.01)
    assert 0.4 < opened.latencies[90.0] < 0.6
    assert 0.9 < opened.latencies[99.0] < 1.02
    assert opened.longest == pytest.approx(1.01)
    # The patient caller lost a second too, and noticed one late answer of 900: its p99 hides the stall.
    assert closed.answered == pytest.approx(900, abs=2)
    assert closed.latencies[99.0] == pytest.approx(0.01)
    assert closed.longest == pytest.approx(1.01)


def test_latencies_count_from_the_intended_time():
    async def late():
        loop = asyncio.get_running_loop()
        recorder = Recorder()
        blocked = []

        async def send(number):
            if not blocked:
                blocked.append(True)
                loop.now += 2.0  # the generator itself hangs
            await asyncio.sleep(0.1)

        return await open_loop(send, [0.0, 0.5, 1.0, 5.0], 1, 5, recorder), recorder

    step, recorder = on_clock(late())
    # The first is sent when the second's time has come, and makes the second and third late.
    assert list(recorder.lags) == pytest.approx([0.0, 1.5, 1.0, 0.0], abs=0.51)
    assert sorted(recorder.latencies)[-1] > 1.5
    assert step.lag > 1.0


def test_more_than_it_can_do_is_not_kept_up_with():
    async def overload(rate):
        times = np.arange(0, 10, 1 / rate).tolist()
        return await open_loop(await server(), times, rate, 10, Recorder())

    right, too_much = on_clock(overload(90)), on_clock(overload(150))
    assert right.kept_up
    assert right.throughput == pytest.approx(90, rel=0.01)
    assert not too_much.kept_up
    assert too_much.seconds == pytest.approx(15.0, abs=0.1)
    assert too_much.throughput == pytest.approx(100, rel=0.01)


def test_callers_share_a_server():
    async def callers(count):
        return await closed_loop(await server(), count, 5, Recorder())

    for count in (1, 4):
        step = on_clock(callers(count))
        assert step.throughput == pytest.approx(100, rel=0.01)
        assert step.latencies[50.0] == pytest.approx(0.01 * count)


def test_errors_are_counted_by_kind_and_have_no_latency():
    async def failing():
        async def send(number):
            await asyncio.sleep(0.001)
            return (None, "HTTP 503", "HTTP 503", None)[number % 4]

        return await open_loop(send, np.arange(0, 1, 0.01).tolist(), 100, 1, Recorder())

    step = on_clock(failing())
    assert (step.answered, step.errors, step.kept_up) == (50, {"HTTP 503": 50}, False)


def test_what_cannot_be_sent_is_an_error(monkeypatch):
    monkeypatch.setattr("mldcn.loadtest.loops._UNDER_WAY", 5)

    async def hanging():
        async def send(number):
            await asyncio.sleep(100)

        return await open_loop(send, np.arange(0, 1, 0.1).tolist(), 10, 1, Recorder())

    step = on_clock(hanging())
    assert (step.sent, step.answered) == (10, 5)
    assert step.errors == {"not sent, too many under way": 5}


def test_percentiles_are_exact_and_none_where_answers_are_too_few():
    values = np.random.default_rng(0).permutation(np.arange(1, 1001)).tolist()
    assert percentiles(values) == {50.0: 500, 90.0: 900, 99.0: 990, 99.9: 999}
    assert percentiles(values[:999])[99.9] is None
    assert percentiles([3.0]) == {50.0: None, 90.0: None, 99.0: None, 99.9: None}
    assert percentiles([3.0, 4.0])[50.0] == 3.0
    assert set(percentiles([]).values()) == {None}
