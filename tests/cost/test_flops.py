import pytest
import torch
from torch import nn

from mldcn import interactions
from mldcn.cost.flops import module_flops, solve_width
from mldcn.errors import UserError
from mldcn.interactions import DCNV2LowRank
from mldcn.layout import FieldLayout

LAYOUT = FieldLayout.uniform(8, 16)


def test_flops_are_two_a_multiply_add_and_example():
    assert module_flops(nn.Linear(3, 5), torch.zeros(7, 3)) == 2 * 3 * 5
    assert module_flops(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LayerNorm(5)), torch.zeros(2, 3)) == 30


@pytest.mark.parametrize("name", interactions.names())
@pytest.mark.parametrize("budget", [150_000, 2_000_000])
def test_every_architecture_meets_a_budget(name, budget):
    options = {"aggregation_ratio": 0.5} if name == "homefeed" else {}
    if name.startswith("masknet_"):
        options = {"reduction_ratio": 0.5}
    solution = solve_width(name, LAYOUT, budget, options)
    module = interactions.build(solution.options, LAYOUT)
    assert module.flops() == solution.flops
    assert solution.flops == pytest.approx(budget, rel=0.05)
    assert solution.residual == pytest.approx(solution.flops / budget - 1)


def test_the_nearest_width_is_found():
    for budget in range(20_000, 24_000, 700):
        solution = solve_width("dcnv2_lowrank", 100, budget, {"num_layers": 3})
        gaps = {r: abs(DCNV2LowRank(100, num_layers=3, rank=r).flops() - budget) for r in range(1, 40)}
        assert gaps[solution.options["rank"]] == min(gaps.values())


def test_a_stack_of_widths_keeps_its_proportions():
    solution = solve_width("dnn", 128, 500_000, {"hidden": [200, 100]})
    wide, narrow = solution.options["hidden"]
    assert wide / narrow == pytest.approx(2, abs=0.02)


def test_what_follows_the_interaction_can_count():
    alone = solve_width("masknet_parallel", 128, 1_000_000, {"reduction_ratio": 0.5})
    before_head = solve_width(
        "masknet_parallel", 128, 1_000_000, {"reduction_ratio": 0.5}, extra_flops=lambda width: 2 * 64 * width
    )
    assert before_head.options["width"] < alone.options["width"]
    assert before_head.flops == pytest.approx(1_000_000, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dcnv2_lowrank", 1000, 100), "no rank comes within 5.0% of 100 FLOPs.*nearest, 1, has 12,000"),
        (("dcnv2", 1000, 1e9, {}, "rank"), "called 'rank'"),
        (("dcnv2_lowrank", 1000, 1e9, {}, "relu"), "relu is no width"),
        (("mldcn", 1000, 1e9, {}, "mask_ratio"), "mask_ratio is no width"),
        (("dnn", 10, 1e4, {"hidden": []}), "hidden is no width"),
        (("lowrank", 10, 1e4), "no architecture"),
        (("mldcn", 10, 1e4, {"num_layres": 3}), "did you mean 'num_layers'"),
    ],
)
def test_what_cannot_be_solved_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        solve_width(*arguments)
