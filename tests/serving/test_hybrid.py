"""Look-ups on the CPU, one packed transfer, the rest on the device: the same numbers, whatever the way."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from batcher_runs import rows, run
from in_threads import in_threads

from every_feature import columns, log
from mldcn.predict import Predictor
from mldcn.serving.engine import Engine, Scores
from mldcn.serving.export import export_run
from mldcn.serving.refused import Reason, Refused
from mldcn.serving.store import KINDS, TableFile, write_table
from mldcn.serving.transfer import PackedRows, Transfer

CPU = torch.device("cpu")


def batch(seed, rows):
    torch.manual_seed(seed)
    ids = torch.randint(0, 9, (rows, 3), dtype=torch.int32)
    dense = torch.randn(rows, 5)
    return (ids, dense, [torch.randn(rows, 2, 7), torch.randn(rows, 0), torch.arange(rows)])


def flat(tensors):
    ids, dense, others = tensors
    return [ids, dense, *others]


def test_what_is_sent_arrives_whatever_its_size():
    transfer = Transfer(CPU)
    for seed, count in enumerate([4, 1, 0, 300, 17, 5000, 2]):
        given = batch(seed, count)
        found = transfer.send(given)()
        assert isinstance(found, tuple)
        for sent, received in zip(flat(given), flat(found), strict=True):
            assert received.dtype == sent.dtype
            assert torch.equal(received, sent)
            assert received.data_ptr() != sent.data_ptr() or not sent.numel()


def test_a_buffer_that_is_used_again_changes_nothing_that_is_on_its_way():
    transfer = Transfer(CPU)
    given = [batch(seed, 50) for seed in range(6)]
    sent = [transfer.send(each) for each in given]
    for expected, each in zip(given, sent, strict=True):
        for a, b in zip(flat(expected), flat(each()), strict=True):
            assert torch.equal(a, b)


def test_several_threads_may_send():
    transfer = Transfer(CPU)
    wrong = []

    def send(number):
        for turn in range(30):
            given = batch(1000 * number + turn, 1 + (37 * turn) % 200)
            found = transfer.send(given)()
            if not all(torch.equal(a, b) for a, b in zip(flat(given), flat(found), strict=True)):
                wrong.append((number, turn))

    in_threads(send)
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_unpacked_on_the_device_are_those_of_a_look_up(tmp_path, kind):
    weight = torch.randn(60, 7)
    write_table(weight, tmp_path / "table.bin", kind)
    table = TableFile(tmp_path / "table.bin", kind, 60, 7)
    rows = torch.randint(0, 60, (11, 3))
    packed = PackedRows(table.packed(rows.flatten()).view(11, 3, -1), kind, 7)
    (found,) = Transfer(CPU).send([packed])()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, table.look_up(rows), rtol=1e-6, atol=1e-6)
    assert packed.data.nbytes <= found.nbytes


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_a_bundles_answers_do_not_depend_on_the_way_of_its_rows(small_run, tmp_path, kind):
    export_run(Predictor.load(small_run.path, "cpu"), "torch-export", tmp_path / "bundle", embeddings=kind)
    engine = Engine.load(tmp_path / "bundle", "cpu")
    assert engine.two_steps
    values = columns(log(500, seed=4, unseen=True), [each.name for each in engine.inputs])
    request = engine.sample()
    calls = [engine.encode(values), engine.encode_rank(request["constant"], request["candidates"])]
    straight = engine.score_rows(calls)
    # As to a device that is not the CPU: packed, sent in one piece, unpacked there.
    engine.program.transfer = Transfer(CPU)
    sent = []
    send = engine.program.transfer.send
    engine.program.transfer.send = lambda tensors: (sent.append(1), send(tensors))[1]
    both = [engine.look_up([call]) for call in calls]  # on their way at the same time
    for work, expected in zip(both, straight, strict=True):
        (found,) = work()
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)
    assert len(sent) == 2
    assert Engine.load(small_run.path, "cpu").two_steps is False


class TwoSteps:
    """An engine whose probabilities are the rows' ids, computed in two steps that can be held up."""

    two_steps = True

    def __init__(self):
        self.events = []
        self.scoring = threading.Event()  # let through
        self.scoring.set()

    def look_up(self, calls):
        name = int(calls[0].ids[0, 0])
        self.events.append(("look up", name))
        if name == -1:
            raise Refused(Reason.NOT_READY, "no tables")

        def score():
            self.events.append(("score", name))
            assert self.scoring.wait(10)
            if name == -2:
                raise RuntimeError("broken")
            self.events.append(("done", name))
            return [Scores(call.ids.astype(np.float32)) for call in calls]

        return score


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_the_next_batch_is_looked_up_while_this_one_is_computed_and_no_other():
    engine = TwoSteps()

    async def test(batcher):
        engine.scoring.clear()
        tasks = [asyncio.create_task(batcher.score(engine, rows(n))) for n in (1, 2, 3)]
        await until(lambda: len(engine.events) == 3)
        await asyncio.sleep(0.05)
        assert sorted(engine.events) == [("look up", 1), ("look up", 2), ("score", 1)]
        assert batcher.waiting == 1
        engine.scoring.set()
        return [(await task).probabilities[0, 0] for task in tasks]

    assert run(test, rows=1, delay=0.0) == [1, 2, 3]
    assert [each for each in engine.events if each[0] != "look up"] == [
        (step, number) for number in (1, 2, 3) for step in ("score", "done")
    ]


def test_a_step_that_fails_refuses_its_own_batch_and_no_other():
    engine = TwoSteps()

    async def test(batcher):
        tasks = [asyncio.create_task(batcher.score(engine, rows(n))) for n in (1, -1, 2, -2, 3)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [each.probabilities[0, 0] for each in found[::2]] == [1, 2, 3]
        assert isinstance(found[1], Refused)
        assert isinstance(found[3], RuntimeError)

    run(test, rows=1, delay=0.0)


def test_stopping_leaves_nobody_waiting():
    engine = TwoSteps()

    async def test(batcher):
        engine.scoring.clear()
        tasks = [asyncio.create_task(batcher.score(engine, rows(n))) for n in (1, 2, 3)]
        await until(lambda: len(engine.events) == 3)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.01)
        engine.scoring.set()
        await stopping
        async with asyncio.timeout(10):
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, asyncio.CancelledError | Refused) for each in found] == [True] * 3

    run(test, rows=1, delay=0.0)
