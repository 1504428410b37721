"""Batch limits for a latency budget: what is picked from what was measured, and that it is used."""

import numpy as np
import pytest
from serving_clients import expected, rows, serving
from test_repository import ask
from test_server import listless

from mldcn.errors import UserError
from mldcn.serving.encoding import Rows
from mldcn.serving.engine import Scores
from mldcn.serving.server import latency
from mldcn.serving.server.latency import Taken, measure, pick
from mldcn.serving.server.options import Batching, Budget


def line(base, each, reading=0.0):
    """A program that takes ``base`` ms for a batch and ``each`` ms for a row of it."""
    asked = []

    def taken(count):
        asked.append(count)
        return Taken(reading / 1000, (base + each * count) / 1000)

    taken.asked = asked
    return taken


def test_budgets_are_read():
    assert Budget.parse("p99=10") == Budget(99.0, 0.01)
    assert Budget.parse("p99.9=2.5") == Budget(99.9, 0.0025)
    assert str(Budget.parse("p99.9=2.5")) == "p99.9=2.5"
    for wrong in ("10", "p99", "p100=5", "p0=5", "p99=0", "p99=-1", "99=10", "p99=x"):
        with pytest.raises(UserError, match="as in p99=10"):
            Budget.parse(wrong)


def test_the_largest_batches_that_fit_are_picked():
    taken = line(base=1.0, each=0.01, reading=0.5)
    found, wait = pick(Budget.parse("p99=10"), Batching(delay=0.001), taken)
    # 3 * 0.5 + 2 (1 + 0.01 b) <= 10 up to b = 325.
    assert (found.rows, found.queue_rows) == (256, 256)
    assert wait == pytest.approx(1.5e-3 + 2 * 3.56e-3)
    assert found.lag == pytest.approx((10e-3 - 0.5e-3 - 2 * 3.56e-3) / 2)
    assert found.delay == 0.001
    assert taken.asked[-2:] == [512, 384]  # and no further: larger ones could take for ever
    assert pick(Budget.parse("p99=12"), Batching(), line(1.0, 0.01, 0.5))[0].rows == 384
    assert pick(Budget.parse("p99=10"), Batching(), line(1.0, 0.01, 0.5), held=3)[0].rows == 128


def test_the_delay_gives_way_to_the_budget():
    found, _ = pick(Budget.parse("p99=10"), Batching(delay=0.5), line(1.0, 0.01, 0.5))
    assert found.delay == pytest.approx(0.010 - 0.0005 - 0.00356)
    found, _ = pick(Budget.parse("p50=2"), Batching(delay=0.5, workers=3), line(0.9, 0.01))
    assert (found.rows, found.queue_rows) == (8, 24)
    assert found.delay == pytest.approx(0.002 - 0.00098)


def test_a_quick_program_is_not_batched_for_ever():
    assert pick(Budget.parse("p99=1000"), Batching(), line(0, 0))[0].rows == latency.SIZES[-1]


def test_a_budget_that_one_row_exceeds_is_refused():
    with pytest.raises(UserError) as caught:
        pick(Budget.parse("p99=10"), Batching(), line(base=6.0, each=0.5, reading=1.0))
    assert "--latency-ms p99=10: cannot be kept" in str(caught.value)
    assert "1 ms to read and answer and 6.5 ms to score" in str(caught.value)
    assert "allow 16 ms" in str(caught.value)


class Timed:
    """An engine whose calls take as long on a clock of its own as they are told."""

    tasks = ("click",)
    two_steps = False

    def __init__(self, slow):
        self.now = 0.0
        self.slow = slow
        self.batches = []

    def clock(self):
        return self.now

    def sample(self):
        return {"constant": {"user": "u"}, "candidates": {"item": ["a", "b", "c"]}}

    inputs = ()

    def encode(self, columns):
        return Rows(np.zeros((len(columns["item"]), 1), np.int32), np.zeros((len(columns["item"]), 0)))

    def encode_rank(self, constant, candidates):
        self.now += 0.001
        return self.encode({**candidates})

    def score_rows(self, calls):
        count = sum(map(len, calls))
        self.batches.append(count)
        first = len(self.batches) <= 3
        # Every hundredth call is slow, and so are the first ones, which do not count.
        self.now += 9.0 if first else self.slow if len(self.batches) % 100 == 0 else 0.002
        return [Scores(np.zeros((len(call), 1), np.float32)) for call in calls]


@pytest.mark.parametrize(("percentile", "scoring"), [(50, 0.002), (95, 0.002), (99.9, 0.008)])
def test_measures_are_percentiles_of_whole_batches(percentile, scoring):
    engine = Timed(slow=0.008)
    taken = measure(engine, 5, percentile, clock=engine.clock)
    assert taken.reading == pytest.approx(0.001)
    assert taken.scoring == pytest.approx(scoring)
    assert set(engine.batches) == {5}
    if percentile == 99.9:
        assert len(engine.batches) > 100  # as many as there is time for


def test_a_server_measures_says_and_obeys(served_run, engine, caplog, monkeypatch):
    monkeypatch.setattr(latency, "SIZES", (1, 2, 4, 8))
    caplog.set_level("INFO", "mldcn.serving")
    values = listless(rows(engine, 3))
    with serving(served_run, latency=Budget.parse("p90=2000")) as running:
        [version] = running.server.repository.models["ads"]
        assert f"for p90=2000 batches take up to {version.batching.rows} rows" in caplog.text
        assert version.batching.queue_rows == version.batching.rows > 1
        found = ask(running.client, values)
        np.testing.assert_allclose(
            found.json()["outputs"][0]["data"], expected(engine, values)[:, 0], atol=1e-6
        )


def test_a_model_that_is_too_slow_is_not_served(served_run):
    budget = Budget.parse("p99=0.0001")
    with (
        pytest.raises(UserError, match="--latency-ms p99=0.0001: cannot be kept"),
        serving(served_run, latency=budget),
    ):
        pass
