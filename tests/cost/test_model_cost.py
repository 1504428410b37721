"""The cost of a whole model, part by part, against numbers by hand and the model itself."""

import pytest
import torch
from cost_cases import model, outcome, plain, rich

from mldcn import interactions
from mldcn.cost import (
    Work,
    match_flops,
    meet_budget,
    model_cost,
    sample_batch,
    scorer_flops,
    total,
    x0_layout,
)
from mldcn.cost.budget import scorer_parameters
from mldcn.errors import UserError
from mldcn.layout import FieldLayout
from mldcn.model import Ranker


def test_a_small_model_by_hand():
    schema, layout = plain(fields=3, rows=50, tasks=2)
    config = model("dnn", options={"hidden": [10]}, deep={"hidden": [4]})
    cost = model_cost(config, schema, layout)
    assert cost.example == {
        "embedding": Work(0, 0, 3 * 8 * 4),
        "interaction": Work(2 * 24 * 10, 10 + 10),
        "deep": Work(2 * 10 * 4, 4 + 4),
        "heads": Work(2 * 2 * 4, 2),
    }
    assert cost.parameters == {"embedding": 0, "interaction": 250, "deep": 44, "heads": 2 * 5}
    assert cost.table_parameters == 3 * 50 * 8
    assert cost.dense_bytes == 4 * (250 + 44 + 10)
    assert total(cost.request(100)) == total(cost.example) * 100
    assert cost.bytes_read(1) == 96 + 4 * 304
    assert cost.bytes_read(64) == 96 + 4 * 304 / 64


@pytest.mark.parametrize(
    ("name", "structure"),
    [*((name, "stacked") for name in interactions.names()), ("mldcn", "parallel"), ("mmoe", "parallel")],
)
def test_every_architecture_in_a_model(name, structure):
    """Side inputs, heads of several tasks and every kind of feature are in it."""
    schema, layout = rich()
    config = model(name, deep={"hidden": [12], "structure": structure})
    cost = model_cost(config, schema, layout)
    ranker = Ranker(config, schema, layout)
    counted = {part: work.gemm + cost.call[part].gemm for part, work in cost.example.items()}
    formula = ranker.flops()
    # The formula tells a projection and attention; counted are also the pooled sums of lists.
    assert counted.pop("embedding") >= formula.pop("embedding")
    assert counted == formula
    assert cost.table_parameters == ranker.parameter_counts()["embedding"]
    assert sum(cost.parameters.values()) == ranker.parameter_counts()["dense"]
    batch = sample_batch(layout, 3)
    assert ranker(batch.ids, batch.dense).shape == (3, 2)


def test_side_inputs_are_looked_up_too():
    schema, layout = plain(fields=5)
    plain_rows = model_cost(model("dnn"), schema, layout).example["embedding"].row_bytes
    first_order = model_cost(model("deepfm"), schema, layout).example["embedding"].row_bytes
    assert (plain_rows, first_order) == (5 * 8 * 4, 5 * 8 * 4 + 5 * 4)


def test_the_embedding_counts_every_kind_of_feature():
    schema, layout = rich()
    work = model_cost(model("dnn"), schema, layout).example["embedding"]
    lookups = 1 + 2 + 5 + 7 + 7
    assert work.row_bytes == lookups * 8 * 4
    # The image's projection; tags' mean; seen's scores and sum.
    assert work.gemm == 2 * 6 * 4 + 2 * 5 * 8 + 2 * 2 * 7 * 8
    assert work.elementwise > 0


def test_a_model_larger_than_any_memory_can_be_counted():
    schema, layout = plain(fields=100, rows=1_000_000_000)
    cost = model_cost(model("mldcn", embedding={"dim": 256}), schema, layout)
    assert cost.table_parameters == 100 * 1_000_000_000 * 256


LAYOUT = FieldLayout.uniform(20, 16)
BUDGET = scorer_flops(model("mldcn", options={"rank": 600}), LAYOUT, ("click",))


@pytest.mark.parametrize("name", interactions.names())
def test_whole_models_meet_the_reference_budget(name):
    matched, refusal = outcome(lambda: match_flops(model(name), LAYOUT, ("click",), BUDGET))
    if matched is None:
        # Without a knob only the deep part can be turned, and that by a factor of four.
        assert interactions.info(name).knob is None, refusal
        assert "comes within 1.0% of" in refusal
    else:
        assert scorer_flops(matched, LAYOUT, ("click",)) == pytest.approx(BUDGET, rel=0.01)


def test_the_deep_part_takes_up_what_is_left_over():
    """A knob with coarse steps: the number of xDeepFM's maps, for example."""
    start = model("masknet_parallel", options={"num_blocks": 8, "reduction_ratio": 0.05})
    budget = 1_234_567
    matched = match_flops(start, LAYOUT, ("click",), budget)
    assert scorer_flops(matched, LAYOUT, ("click",)) == pytest.approx(budget, rel=0.005)
    none = model("lr", deep={"hidden": [64]})
    own = scorer_flops(none, LAYOUT, ("click",))
    found = meet_budget(none, LAYOUT, lambda c: scorer_flops(c, LAYOUT, ("click",)), 2 * own)
    assert found.settings == {"deep.hidden": 128}


def test_parameters_of_a_model_are_a_budget():
    found = meet_budget(
        model("mldcn"), LAYOUT, lambda c: scorer_parameters(c, LAYOUT, ("click",)), 300_000, what="parameters"
    )
    assert found.cost == pytest.approx(300_000, rel=0.01)


def test_a_model_without_widths_says_so():
    with pytest.raises(UserError, match="interaction lr: there is no width to turn"):
        match_flops(model("lr", deep={"hidden": []}), LAYOUT, ("click",), 1_000_000)


def test_the_layout_of_x0_is_that_of_the_model():
    schema, layout = rich()
    with torch.device("meta"):
        ranker = Ranker(model("dnn"), schema, layout)
    assert x0_layout(model("dnn"), schema, layout) == ranker.embedder.layout
