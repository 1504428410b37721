"""Training's peak memory: what fake tensors foretell is what PyTorch's allocator then sees."""

import pytest
from cost_cases import model, plain, rich

from mldcn.config import TrainingConfig, parse
from mldcn.cost import Training, estimate_memory, measure_memory
from mldcn.training.step import TrainingStep


def training(config, log, batch_size=256, **settings):
    how = parse(TrainingConfig, settings, "training")
    return Training(config, *log, batch_size, lambda ranker: TrainingStep(ranker, how))


@pytest.mark.parametrize(
    "name",
    [
        "mldcn",
        "dcnv2",
        "dnn",
        "deepfm",
        "dlrm",
        "xdeepfm",
        "fibinet",
        "hcnet",
        "masknet_parallel",
        "finalmlp",
        "wukong",
        "transformer",
        "mmoe",
    ],
)
def test_the_estimate_is_within_a_tenth(name):
    asked = training(model(name), plain())
    estimated, measured = estimate_memory(asked), measure_memory(asked)
    assert estimated.lasting == measured.lasting
    assert estimated.step == pytest.approx(measured.step, rel=0.2)
    assert estimated.peak == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize(
    ("log", "batch_size", "settings"),
    [
        (plain(), 1, {}),
        (plain(), 4096, {}),
        (plain(rows=20), 1024, {}),
        (
            plain(tasks=3),
            256,
            {"optimiser": {"table": "rowwise_adagrad", "dense": "adamw", "clip_norm": None}},
        ),
        (rich(), 512, {"optimiser": {"table_l2": 1e-4, "clip_norm": 0.1}}),
    ],
    ids=["one row", "computed in parts", "few ids", "other optimisers", "every kind of feature"],
)
def test_the_estimate_is_within_a_tenth_elsewhere(log, batch_size, settings):
    asked = training(model("mldcn", deep={"hidden": [200, 100]}), log, batch_size, **settings)
    estimated, measured = estimate_memory(asked), measure_memory(asked)
    assert estimated.peak == pytest.approx(measured.peak, rel=0.1)


def test_weights_and_moments_last():
    log = plain(fields=2, rows=100)
    found = estimate_memory(training(model("dnn", options={"hidden": [4]}, deep={"hidden": []}), log))
    weights = 2 * 100 * 8 + 16 * 4 + 4 + 4 + 1
    batch = 256 * (2 + 1 + 1 + 1)
    buffers = 2 * 5 + 2  # of the look-ups: columns, where the tables begin and end
    # Each weight has two moments; Adam counts its steps tensor by tensor.
    assert found.lasting == pytest.approx(4 * (3 * weights + batch + buffers), rel=0.01)
    assert found.peak == found.lasting + found.step


def test_a_model_larger_than_any_memory_can_be_estimated():
    found = estimate_memory(training(model("mldcn", embedding={"dim": 64}), plain(rows=10**10)))
    assert found.lasting > 3 * 4 * 8 * 10**10 * 64


def test_a_step_takes_more_where_more_rows_are_trained_on():
    log = plain()
    steps = [estimate_memory(training(model("dcnv2"), log, size)).step for size in (64, 128, 256)]
    assert 1.5 * steps[0] < steps[1] < steps[2] / 1.5
