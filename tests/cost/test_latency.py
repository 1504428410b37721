import pytest
from cost_cases import model, plain

from mldcn.cost import LatencyMeter, matrix_rate, measure_latency
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
    meter = LatencyMeter(schema, layout, 4, seconds=0.0)
    assert meter(model("dnn")) > 0
    tables = meter._built[1].embedder
    assert meter(model("dnn", options={"hidden": [7]})) > 0
    assert meter._built[1].embedder is tables
    assert meter._built[1].scorer.interaction.out_features == 7
    assert meter(model("deepfm")) > 0
    assert meter._built[1].embedder is not tables
    assert matrix_rate() > 1e6
