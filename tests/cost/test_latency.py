import pytest
from cost_cases import model, plain

from mldcn.cost import matrix_rate, measure_latency, median_latency
from mldcn.cost.latency import call_times, quantile


def test_quantiles_are_values_that_occurred():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(list(range(1, 101)), 0.99) == 99
    assert quantile([5.0], 0.99) == 5.0


def test_calls_are_timed_after_some_that_warm_up():
    calls = []
    times = call_times(lambda: calls.append(1), "cpu", seconds=0.0, least=4)
    assert (len(times), len(calls)) == (4, 7)


def test_each_batch_size_is_measured():
    schema, layout = plain()
    found = measure_latency(
        model("mldcn"), schema, layout, 100_000, batch_sizes=(1, 32), seconds=0.0, device="cpu"
    )
    assert [each.batch for each in found.latencies] == [1, 32]
    for each in found.latencies:
        assert 0 < each.median <= each.p99
        assert each.calls == 30
        assert each.share == pytest.approx(100_000 * each.batch / each.median / found.matrix_rate)


def test_costs_that_are_times():
    schema, layout = plain()
    assert median_latency(model("dnn"), schema, layout, 4, seconds=0.0) > 0
    assert matrix_rate() > 1e6
