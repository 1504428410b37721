"""Every architecture computes on a device other than the CPU, which nobody here has: no tensor stays behind."""

import pytest
import torch
from families.case import inputs
from interaction_cases import CASES

from second_device import MixedDevicesError, second_device


def results(module, given):
    """The output and the gradients of the inputs and parameters, all on the CPU."""
    torch.manual_seed(2)  # dropout, where a case has it
    given = [each.detach().requires_grad_() for each in given]
    out = module(*given)
    out.square().sum().backward()
    named = [*enumerate(given), *module.named_parameters()]
    return {
        "out": out.detach().cpu(),
        **{name: each.grad.cpu() for name, each in named if each.grad is not None},
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_computes_there_what_it_computes_here(case):
    given = inputs(case.build(), n=6)
    here = results(case.build().train(), given)
    with second_device() as device:
        there = results(case.build().train().to(device), [each.to(device) for each in given])
    torch.testing.assert_close(there, here)


def test_a_tensor_that_stays_behind_is_found():
    with second_device() as device:
        moved = torch.ones(2, device=device)
        assert (moved + torch.tensor(1.0)).device == device  # one number may come from the CPU
        assert torch.equal((moved + moved).cpu(), torch.full((2,), 2.0))
        with pytest.raises(MixedDevicesError):
            moved + torch.ones(2)
        with pytest.raises(MixedDevicesError):
            torch.ones(2)[torch.zeros(2, dtype=torch.long, device=device)]
        with pytest.raises(RuntimeError):
            moved.numpy()
