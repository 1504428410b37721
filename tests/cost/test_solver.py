"""Widths that meet a budget, or a refusal that names the nearest."""

import re

import pytest
from cost_cases import outcome

from mldcn import interactions
from mldcn.cost import interaction_flops, interaction_parameters, solve_width
from mldcn.cost.solver import Dial, solve
from mldcn.errors import UserError
from mldcn.interactions import DCNV2LowRank
from mldcn.layout import FieldLayout

LAYOUT = FieldLayout.uniform(16, 16)
WITH_KNOB = [name for name in interactions.names() if interactions.info(name).knob]


@pytest.mark.parametrize("name", WITH_KNOB)
def test_every_architecture_meets_a_budget_or_says_why_not(name):
    built = []

    def flops(module):
        built.append(module)
        return module.flops()

    met = 0
    for budget in (400_000, 3_000_000, 30_000_000):
        built.clear()
        solution, refusal = outcome(lambda budget=budget: solve_width(name, LAYOUT, budget, cost=flops))
        if solution is None:
            found = re.search(r"interaction (\w+): no .* comes within 1.0% of .* has ([\d,]+) \(", refusal)
            assert found, refusal
            assert found[1] == name
            assert abs(int(found[2].replace(",", "")) / budget - 1) > 0.01
        else:
            met += 1
            assert solution.cost == pytest.approx(budget, rel=0.01)
            assert solution.residual == pytest.approx(solution.cost / budget - 1)
            assert interactions.build(solution.options, LAYOUT).flops() == solution.cost
        # A probe takes some milliseconds: this is what keeps a search under a second.
        assert len(built) < 60
    assert met >= 1


def test_the_nearest_width_is_found():
    for budget in range(20_000, 24_000, 700):
        solution = solve_width("dcnv2_lowrank", 100, budget, {"num_layers": 3}, tolerance=0.05)
        gaps = {r: abs(DCNV2LowRank(100, num_layers=3, rank=r).flops() - budget) for r in range(1, 40)}
        assert gaps[solution.options["rank"]] == min(gaps.values())
        assert solution.settings == {"rank": solution.options["rank"]}


def test_a_refusal_is_right_that_no_width_meets_the_budget():
    """Against all widths one by one."""
    refused = 0
    flops = [DCNV2LowRank(64, num_layers=2, rank=r).flops() for r in range(1, 80)]
    for budget in range(3_000, 30_000, 1_100):
        possible = any(abs(each / budget - 1) <= 0.01 for each in flops)
        met, _ = outcome(lambda budget=budget: solve_width("dcnv2_lowrank", 64, budget, {"num_layers": 2}))
        assert (met is not None) == possible
        refused += met is None
    assert refused


def test_a_stack_of_widths_keeps_its_proportions():
    solution = solve_width("dnn", 128, 500_000, {"hidden": [200, 100]})
    wide, narrow = solution.options["hidden"]
    assert wide / narrow == pytest.approx(2, abs=0.02)


def test_parameters_are_a_budget_too():
    solution = solve_width("mldcn", LAYOUT, 200_000, cost=interaction_parameters, what="parameters")
    module = interactions.build(solution.options, LAYOUT)
    assert interaction_parameters(module) == solution.cost == pytest.approx(200_000, rel=0.01)


def test_a_noisy_measure_ends_at_once_where_it_is_close():
    """As a measured latency: a tenth of a percent of noise, 5 % to meet."""
    calls = []

    def seconds(module):
        calls.append(module)
        return (1e-4 + 1e-9 * module.flops()) * (1 + 0.001 * (-1) ** len(calls))

    solution = solve_width("dnn", LAYOUT, 3e-3, cost=seconds, what="s", tolerance=0.05, close=0.02)
    assert solution.cost == pytest.approx(3e-3, rel=0.02)
    assert len(calls) < 10


def dial(name, start, possible=lambda value: True):
    def turn(subject, value):
        return {**subject, name: value if possible(value) else None}

    return Dial(name, start, turn)


def multiply(subject):
    if None in subject.values():
        raise UserError("no such width")
    return 1000 * subject["coarse"] ** 2 + 7 * subject.get("fine", 0)


def test_widths_that_an_architecture_refuses_are_passed_over():
    found = solve(
        {"coarse": 36}, [dial("coarse", 36, lambda v: v % 12 == 0)], multiply, 1000 * 300**2, tolerance=0.001
    )
    assert found.settings == {"coarse": 300}
    with pytest.raises(UserError, match=r"no coarse comes.*nearest, coarse 300"):
        solve({"coarse": 36}, [dial("coarse", 36, lambda v: v % 12 == 0)], multiply, 1000 * 305**2)


def test_a_finer_width_takes_up_what_a_coarse_one_leaves():
    dials = [dial("coarse", 2), dial("fine", 100)]
    found = solve({"coarse": 2, "fine": 100}, dials, multiply, 11_000)
    assert found.settings == {"coarse": 3, "fine": 286}
    assert found.cost == 1000 * 9 + 7 * 286
    with pytest.raises(UserError, match=r"no coarse and fine comes within 1.0% of 100 FLOPs"):
        solve({"coarse": 2, "fine": 100}, dials, multiply, 100)


def test_what_meets_the_budget_is_left_as_it_is():
    found = solve({"coarse": 7}, [dial("coarse", 7)], multiply, 49_000)
    assert (found.subject, found.settings) == ({"coarse": 7}, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dcnv2_lowrank", 1000, 100), "no rank comes within 1.0% of 100 FLOPs.*nearest, rank 1, has 12,000"),
        (("dcnv2", 1000, 1e9, {}, "rank"), "called 'rank'"),
        (("dcnv2_lowrank", 1000, 1e9, {}, "relu"), "relu is no width"),
        (("mldcn", 1000, 1e9, {}, "mask_ratio"), "mask_ratio is no width"),
        (("dnn", 10, 1e4, {"hidden": []}), "there is no width to turn"),
        (("dnn", 10, 1e4, {"hidden": []}, "hidden"), "hidden is no width"),
        (("lowrank", 10, 1e4), "no architecture"),
        (("mldcn", 10, 1e4, {"num_layres": 3}), "did you mean 'num_layers'"),
        (("mldcn", 10, 0), "must be above 0"),
    ],
)
def test_what_cannot_be_solved_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        solve_width(*arguments)


def test_flops_are_the_default_cost():
    module = interactions.build(solve_width("mldcn", 64, 1e6).options, 64)
    assert interaction_flops(module) == module.flops() == pytest.approx(1e6, rel=0.01)
