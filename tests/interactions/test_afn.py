"""AFN: by hand, powers it can represent, the clamp, precision, and how its norms see a batch."""

import pytest
import torch
from families.case import perturb_

from mldcn.interactions import AFN
from mldcn.interactions.afn import LogarithmicLayer
from mldcn.layout import FieldLayout, SecondEmbedding


def without_norms(num_fields, width, neurons, min_value=1e-5):
    """In eval mode, BatchNorms with the statistics they start with are the identity but for their epsilon."""
    layer = LogarithmicLayer(num_fields, width, neurons, min_value).double().eval()
    layer.log_norm.eps = layer.exp_norm.eps = 0.0
    return layer


def test_powers_by_hand():
    """|v_1|^2 |v_2|^-1 and |v_2|^(1/2), in each of two coordinates."""
    layer = without_norms(2, 2, 2)
    layer.weight.data = torch.tensor([[2.0, -1.0], [0.0, 0.5]]).double()
    tokens = torch.tensor([[[2.0, -3.0], [4.0, -9.0]]]).double()
    torch.testing.assert_close(layer(tokens), torch.tensor([[1.0, 1.0, 2.0, 3.0]]).double())


def test_ones_multiply_all_fields():
    layer = without_norms(5, 3, 1)
    torch.nn.init.ones_(layer.weight)
    tokens = torch.rand(4, 5, 3).double() + 0.1
    torch.testing.assert_close(layer(tokens), tokens.prod(dim=1))


def test_signs_are_lost():
    layer = LogarithmicLayer(5, 3, 4, 1e-5).eval()
    tokens = torch.randn(4, 5, 3)
    assert torch.equal(layer(tokens), layer(-tokens))


def test_small_values_are_clamped_and_have_no_gradient():
    layer = without_norms(1, 1, 1, min_value=0.5)
    torch.nn.init.ones_(layer.weight)
    tokens = torch.tensor([0.0, 0.1, -0.4, 0.6]).double().view(4, 1, 1).requires_grad_()
    out = layer(tokens)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5, 0.5, 0.5, 0.6]).double())
    out.sum().backward()
    torch.testing.assert_close(tokens.grad.flatten(), torch.tensor([0.0, 0, 0, 1]).double())


def test_embeddings_of_zero_give_finite_results():
    net = AFN(FieldLayout.uniform(4, 3), num_neurons=5, hidden=(4,))
    x0 = torch.zeros(6, 12, requires_grad=True)
    net(x0).sum().backward()
    assert net(x0).isfinite().all()
    assert x0.grad.isfinite().all()


def test_norms_have_a_channel_a_field_and_a_neuron():
    """Statistics go over rows and coordinates, as in the authors' code."""
    torch.manual_seed(0)
    layer = LogarithmicLayer(4, 6, 3, 1e-5).double()
    tokens = torch.randn(50, 4, 6, dtype=torch.float64)
    out = layer(tokens).view(50, 3, 6)
    torch.testing.assert_close(out.mean(dim=(0, 2)), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
    logs = tokens.abs().log()
    torch.testing.assert_close(layer.log_norm.running_mean, 0.1 * logs.mean(dim=(0, 2)))


def test_rows_see_each_other_in_training_only():
    net = AFN(FieldLayout.uniform(4, 3), num_neurons=5, hidden=())
    x0 = torch.randn(8, 12)
    training = net(x0)[:4], net(x0[:4])
    assert not torch.allclose(*training)
    net.eval()
    torch.testing.assert_close(net(x0)[:4], net(x0[:4]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powers_are_computed_in_float32_under_autocast(dtype):
    """39 fields: in bfloat16 the exponents themselves would be off by several percent."""
    torch.manual_seed(0)
    layer = LogarithmicLayer(39, 8, 20, 1e-5).eval()
    torch.nn.init.normal_(layer.weight, std=1.0)
    tokens = torch.randn(16, 39, 8)
    exact = layer(tokens)
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer(tokens), exact)
        rounded = layer(tokens.to(dtype))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, layer(tokens.to(dtype).float()))


def test_the_plus_is_a_second_tower_on_a_second_embedding():
    layout = FieldLayout.uniform(4, 3)
    net = AFN(layout, num_neurons=5, hidden=(6,), deep_hidden=(7, 2)).eval()
    perturb_(net)
    assert AFN(layout).sides == ()
    assert net.sides == (SecondEmbedding(),)
    x0, second = torch.randn(3, 12), torch.randn(3, 12)
    whole, moved = net(x0, second), net(x0, second + 1)
    assert whole.shape == (3, 8)
    assert torch.equal(whole[:, :6], moved[:, :6])
    assert not torch.equal(whole[:, 6:], moved[:, 6:])
    assert torch.equal(net(x0 + 1, second)[:, 6:], whole[:, 6:])
    torch.testing.assert_close(whole[:, 6:], net.deep(second))


def test_exponents_start_at_a_tenth():
    torch.manual_seed(0)
    assert LogarithmicLayer(39, 8, 600, 1e-5).weight.std().item() == pytest.approx(0.1, rel=0.02)


def test_a_fresh_layer_under_training_has_unit_spread_even_on_small_embeddings():
    """Norms carry embeddings of a standard deviation of 0.01 to logarithms of mean 0 and spread 1."""
    torch.manual_seed(0)
    layer = LogarithmicLayer(10, 8, 50, 1e-5)
    out = layer(0.01 * torch.randn(200, 10, 8)).view(200, 50, 8)
    assert out.std(dim=(0, 2)).sub(1).abs().max() < 0.01
