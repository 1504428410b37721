"""xDeepFM, FiBiNET, AFN, AutoInt and HCNet alike: on random layouts, in low precision, at every width."""

import numpy as np
import pytest
import torch
from families.case import inputs, perturb_
from interaction_cases import REFERENCES

from mldcn import interactions
from mldcn.layout import FieldLayout

OPTIONS = {
    "xdeepfm": {"cin_layers": (3, 2), "split_half": True, "hidden": (4,)},
    "fibinet": {"bilinear": "each", "hidden": (4,)},
    "afn": {"num_neurons": 3, "hidden": (4,)},
    "afn_plus": {"num_neurons": 3, "hidden": (4,), "deep_hidden": (4,)},
    "autoint": {"num_layers": 2, "num_heads": 3, "attention_width": 2},
    "autoint_plus": {"num_layers": 2, "num_heads": 3, "attention_width": 2, "hidden": (4,)},
    "hcnet": {"codeword_width": 2, "orders": (3, 2), "restoring": "attentive", "hidden": (4,)},
}


def random_layout(seed):
    """One to eight fields of a few widths, numbers among them."""
    draw = np.random.default_rng(seed)
    widths = draw.choice([1, 2, 5, 5, 7], size=draw.integers(1, 9))
    return FieldLayout.build(
        [(f"f{i}", "categorical" if w > 1 else "numeric", "context", int(w)) for i, w in enumerate(widths)]
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_equations_on_random_layouts(name, seed):
    layout = random_layout(seed)
    torch.manual_seed(seed)
    module = interactions.build({"name": name, **OPTIONS[name]}, layout).double().eval()
    perturb_(module)
    given = inputs(module, layout)
    parameters = {key: value.numpy() for key, value in module.state_dict().items()}
    ids = [i for i, field in enumerate(layout) if field.kind == "categorical"]
    options = {**OPTIONS[name], **({"ids": ids} if name == "hcnet" else {})}
    expected = []
    for x0, *sides in zip(*(each.numpy() for each in given), strict=True):
        beside = {"sides": sides} if sides else {}
        expected.append(REFERENCES[name](parameters, x0, layout.widths, **beside, **options))
    expected = np.stack(expected)
    got = module(*given).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("name", OPTIONS)
def test_under_autocast(name):
    torch.manual_seed(0)
    layout = FieldLayout.uniform(12, 8)
    module = interactions.build({"name": name}, layout).eval()
    given = inputs(module, layout, n=32, dtype=torch.float32)
    with torch.no_grad():
        exact = module.double()(*(each.double() for each in given))
        module.float()
        with torch.autocast("cpu", torch.bfloat16):
            got = module(*given)
    assert (got.double() - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.parametrize("name", OPTIONS)
def test_learns_under_autocast(name):
    torch.manual_seed(0)
    layout = FieldLayout.uniform(4, 8)
    module = interactions.build({"name": name, **OPTIONS[name]}, layout)
    given = inputs(module, layout, n=16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(*given).float().square().mean()
    loss.backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_number_of_side_inputs_is_refused(name):
    layout = FieldLayout.uniform(4, 8)
    module = interactions.build({"name": name, **OPTIONS[name]}, layout)
    given = inputs(module, layout, dtype=torch.float32)
    wrong = given[:-1] if module.sides else (*given, given[0])
    with pytest.raises((ValueError, TypeError), match="side inputs beside x0|positional argument"):
        module(*wrong)


@pytest.mark.parametrize("name", OPTIONS)
def test_flops_grow_with_every_knob(name):
    known = interactions.info(name)
    for knob in (known.knob, known.secondary):
        sizes = []
        shape = known.config.model_fields[knob].default
        for width in (1, 2, 3, 8, 9, 64):
            value = (width,) * len(shape) if isinstance(shape, tuple) else width
            with torch.device("meta"):
                sizes.append(interactions.build({"name": name, knob: value}, random_layout(3)).flops())
        assert sizes == sorted(set(sizes))
