"""What every architecture in the registry must do."""

import numpy as np
import pytest
import torch
from interaction_cases import CASES, LAYOUT, D, perturb_
from interactions_reference import REFERENCES
from safetensors.torch import load, save
from torch import nn

from mldcn import interactions
from mldcn.cost.flops import module_flops
from mldcn.layout import FieldLayout

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def rows(n=5, width=D, dtype=torch.float64, seed=1):
    return torch.randn(n, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_every_architecture_has_cases_and_a_reference():
    assert {case.name for case in CASES} == set(interactions.names()) == set(REFERENCES)


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_papers_equations_in_numpy(case, dtype, tolerance):
    module = case.build().eval()
    x0 = rows()
    parameters = {key: value.numpy() for key, value in module.state_dict().items()}
    reference = REFERENCES[case.name]
    expected = np.stack([reference(parameters, row, LAYOUT.widths, **case.options) for row in x0.numpy()])
    with torch.no_grad():
        got = module.to(dtype)(x0.to(dtype)).double().numpy()
    assert np.abs(got - expected).max() <= tolerance * max(1, np.abs(expected).max())


@every_case
def test_shapes_down_to_a_batch_of_one(case):
    module = case.build().eval()
    assert module.in_features == D
    whole = module(rows(4))
    assert whole.shape == (4, module.out_features)
    one = module(rows(4)[2:3])
    assert one.shape == (1, module.out_features)
    torch.testing.assert_close(one[0], whole[2])
    assert module(rows(0)).shape == (0, module.out_features)


@every_case
@pytest.mark.parametrize(
    "layout",
    [1, 6, FieldLayout.uniform(3, 2), FieldLayout.uniform(4, 1)],
    ids=["one", "flat", "equal", "scalars"],
)
def test_takes_any_layout(case, layout):
    module = case.build(layout).eval()
    x0 = rows(width=module.in_features)
    out = module(x0)
    assert out.shape == (5, module.out_features)
    assert out.isfinite().all()
    assert module.flops() == module_flops(module, x0)


@every_case
def test_refuses_an_x0_of_another_width(case):
    if case.options.get("hidden") == []:
        pytest.skip("the empty DNN is the identity")
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size"):
        case.build()(rows(width=D + 1))


@every_case
def test_parameters_and_flops_are_the_closed_formulas(case):
    module = case.build(perturb=False).eval()
    assert sum(parameter.numel() for parameter in module.parameters()) == case.params
    assert module.flops() == case.flops
    assert module_flops(module, rows(3)) == case.flops


@every_case
def test_gradients_are_the_derivatives(case):
    module = case.build().eval()
    names, values = zip(*module.named_parameters(), strict=True) if case.params else ((), ())
    leaves = [value.detach().clone().requires_grad_() for value in values]

    def run(x0, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x0,))

    assert torch.autograd.gradcheck(run, (rows(2).requires_grad_(), *leaves), fast_mode=True)


@every_case
def test_gradients_reach_every_parameter(case):
    module = case.build().train()
    torch.manual_seed(0)
    # Squares, so that LayerNorm's outputs do not sum to a constant.
    module(rows(64).requires_grad_()).pow(2).sum().backward()
    idle = [name for name, value in module.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle


@every_case
def test_a_fresh_module_learns_with_all_its_parameters(case):
    module = case.build(perturb=False).train()
    head = nn.Linear(module.out_features, 1).double()
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimiser = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.01)
    x0 = rows(256)
    target = x0[:, 1:2] * x0[:, 2:3] + x0[:, 5:6]
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (head(module(x0)) - target).pow(2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, value in module.named_parameters() if torch.equal(value, start[name])] == []


@every_case
def test_rows_do_not_see_each_other(case):
    module = case.build().eval()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(module(rows())[order], module(rows()[order]))
    nudged = rows()
    nudged[0] += 1.0
    changed = (module(nudged) != module(rows())).any(dim=1)
    assert changed.tolist() == [True, False, False, False, False]


@every_case
def test_state_survives_a_file_without_pickle(case):
    module = case.build().eval()
    other = case.build(seed=9).eval()
    other.load_state_dict(load(save(module.state_dict())))
    assert torch.equal(module(rows()), other(rows()))


@every_case
def test_exports_for_any_batch_size(case):
    module = case.build().eval()
    exported = torch.export.export(
        module, (rows(4),), dynamic_shapes={"x0": {0: torch.export.Dim("batch", min=1)}}
    ).module()
    for size in (1, 7):
        torch.testing.assert_close(exported(rows(size)), module(rows(size)))


@pytest.mark.parametrize("name", interactions.names())
def test_defaults_work_on_a_plain_width(name):
    module = interactions.build({"name": name}, 20)
    perturb_(module)
    module.eval()
    assert module(torch.randn(3, 20)).shape == (3, module.out_features)
    assert isinstance(module, interactions.info(name).cls)
