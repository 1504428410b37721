"""What every architecture in the registry must do."""

import numpy as np
import pytest
import torch
from families.case import inputs
from interaction_cases import CASES, LAYOUT, REFERENCES, D, perturb_
from safetensors.torch import load, save
from torch import nn

from mldcn import interactions
from mldcn.cost.flops import module_flops
from mldcn.layout import FieldLayout

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def test_every_architecture_has_cases_and_a_reference():
    assert {case.name for case in CASES} == set(interactions.names()) == set(REFERENCES)


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_papers_equations_in_numpy(case, dtype, tolerance):
    module = case.build().eval()
    given = inputs(module)
    parameters = {key: value.numpy() for key, value in module.state_dict().items()}
    reference = REFERENCES[case.name]
    expected = []
    for x0, *sides in zip(*(each.numpy() for each in given), strict=True):
        beside = {"sides": sides} if sides else {}
        expected.append(reference(parameters, x0, LAYOUT.widths, **beside, **case.options))
    expected = np.stack(expected)
    with torch.no_grad():
        got = module.to(dtype)(*(each.to(dtype) for each in given)).double().numpy()
    assert np.abs(got - expected).max() <= tolerance * max(1, np.abs(expected).max())


def shape(module, n):
    return (
        (n, module.out_features) if module.num_tasks is None else (n, module.num_tasks, module.out_features)
    )


@every_case
def test_shapes_down_to_a_batch_of_one(case):
    module = case.build().eval()
    assert module.in_features == D
    given = inputs(module, n=4)
    whole = module(*given)
    assert whole.shape == shape(module, 4)
    one = module(*(each[2:3] for each in given))
    assert one.shape == shape(module, 1)
    torch.testing.assert_close(one[0], whole[2])
    assert module(*(each[:0] for each in given)).shape == shape(module, 0)


@every_case
@pytest.mark.parametrize(
    "layout",
    [1, 6, FieldLayout.uniform(3, 2), FieldLayout.uniform(4, 1)],
    ids=["one", "flat", "equal", "scalars"],
)
def test_takes_any_layout(case, layout):
    module = case.build(layout).eval()
    given = inputs(module, layout)
    out = module(*given)
    assert out.shape == shape(module, 5)
    assert out.isfinite().all()
    assert module.flops() == module_flops(module, *given)


@every_case
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_stays_finite_on_tiny_and_huge_inputs(case, scale):
    """Fresh modules in float32, as a user has them, forward and backward."""
    module = case.build(perturb=False).float().train()
    x0, *sides = inputs(module, n=16, dtype=torch.float32)
    given = [each.requires_grad_() for each in (scale * x0, *sides)]
    out = module(*given)
    out.mean().backward()
    assert out.isfinite().all()
    assert all(each.grad is None or each.grad.isfinite().all() for each in (*given, *module.parameters()))


@every_case
def test_refuses_an_x0_of_another_width(case):
    if case.options.get("hidden") == []:
        pytest.skip("the empty DNN is the identity")
    if not case.reads_x0:
        pytest.skip("reads side inputs only")
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size"):
        module = case.build()
        x0, *sides = inputs(module)
        module(torch.cat([x0, x0[:, :1]], dim=1), *sides)


@every_case
def test_parameters_and_flops_are_the_closed_formulas(case):
    module = case.build(perturb=False).eval()
    assert sum(parameter.numel() for parameter in module.parameters()) == case.params
    assert module.flops() == case.flops
    assert module_flops(module, *inputs(module, n=3)) == case.flops


@every_case
def test_gradients_are_the_derivatives(case):
    module = case.build().eval()
    names, values = zip(*module.named_parameters(), strict=True) if case.params else ((), ())
    leaves = [value.detach().clone().requires_grad_() for value in values]

    given = [each.requires_grad_() for each in inputs(module, n=2)]

    def run(*values):
        parameters = dict(zip(names, values[len(given) :], strict=True))
        return torch.func.functional_call(module, parameters, values[: len(given)])

    assert torch.autograd.gradcheck(run, (*given, *leaves), fast_mode=True)


@every_case
def test_gradients_reach_every_parameter(case):
    module = case.build().train()
    torch.manual_seed(0)
    # Squares, so that LayerNorm's outputs do not sum to a constant.
    given = [each.requires_grad_() for each in inputs(module, n=64)]
    module(*given).pow(2).sum().backward()
    assert all(each.grad.any() for each in given[0 if case.reads_x0 else 1 :])
    idle = [name for name, value in module.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle


@every_case
def test_a_fresh_module_learns_with_all_its_parameters(case):
    module = case.build(perturb=False).train()
    width = module.out_features * (module.num_tasks or 1)
    head = nn.Sequential(nn.Flatten(), nn.Linear(width, 1)).double()
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimiser = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.01)
    x0, *sides = inputs(module, n=256)
    target = x0[:, 1:2] * x0[:, 2:3] + x0[:, 5:6]
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (head(module(x0, *sides)) - target).pow(2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, value in module.named_parameters() if torch.equal(value, start[name])] == []


@every_case
def test_rows_do_not_see_each_other(case):
    module = case.build().eval()
    given = inputs(module)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(module(*given)[order], module(*(each[order] for each in given)))
    nudged = [each.clone() for each in given]
    for each in nudged:
        each[0] += 1.0
    changed = (module(*nudged) != module(*given)).flatten(1).any(dim=1)
    assert changed.tolist() == [True, False, False, False, False]


@every_case
def test_state_survives_a_file_without_pickle(case):
    module = case.build().eval()
    other = case.build(seed=9).eval()
    other.load_state_dict(load(save(module.state_dict())))
    given = inputs(module)
    assert torch.equal(module(*given), other(*given))


@every_case
def test_exports_for_any_batch_size(case):
    module = case.build().eval()
    batch = torch.export.Dim("batch", min=1)
    given = inputs(module, n=4)
    shapes = tuple({0: batch} for _ in given)
    exported = torch.export.export(_Plain(module), given, dynamic_shapes={"inputs": shapes}).module()
    for size in (1, 7):
        given = inputs(module, n=size)
        torch.testing.assert_close(exported(*given), module(*given))


@every_case
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_to_torchscript_for_any_batch_size(case):
    """By tracing: PyTorch has given up scripting for export, and tracing asks nothing of the code."""
    module = case.build().eval()
    traced = torch.jit.trace(module, inputs(module, n=4), check_trace=False)
    for size in (1, 7):
        given = inputs(module, n=size)
        torch.testing.assert_close(traced(*given), module(*given))


@every_case
@pytest.mark.parametrize("training", [False, True], ids=["serving", "training"])
def test_compiles_without_a_graph_break(case, training):
    """Traced whole; the compiler behind it is PyTorch's own business."""
    module = case.build().train(training)
    given = inputs(module, n=6)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    got = compiled(*given)
    interactions.auxiliary_loss(module)
    other = case.build().train(training)
    torch.manual_seed(0)
    torch.testing.assert_close(got, other(*given))


class _Plain(nn.Module):
    """Any number of inputs under one name."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


@pytest.mark.parametrize("name", interactions.names())
def test_defaults_work_on_a_plain_width(name):
    module = interactions.build({"name": name}, 20)
    perturb_(module)
    module.eval()
    assert module(*inputs(module, 20, n=3, dtype=torch.float32)).shape == shape(module, 3)
    assert isinstance(module, interactions.info(name).cls)
