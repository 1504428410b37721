"""WuKong: its factorisation machine block, its residual, its order."""

import math

import numpy as np
import pytest
import torch
from families.case import perturb_
from torch import nn

from mldcn.cost.flops import module_flops
from mldcn.interactions import Wukong
from mldcn.interactions.wukong import FactorizationMachineBlock, TokenMap, WukongLayer
from mldcn.layout import FieldLayout


def test_the_optimised_machine_is_the_inner_products_times_y():
    """X (X^T Y) = (X X^T) Y, by hand for two tokens."""
    block = FactorizationMachineBlock(2, 2, rank=1, out_tokens=1, hidden=())
    seen = []
    block.norm = nn.Identity()
    block.norm.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        block.projection.copy_(torch.tensor([[1.0], [10.0]]))
    block(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    # <x1,x1> = 5, <x1,x2> = 11, <x2,x2> = 25.
    assert seen[0].tolist() == [[5 + 110, 11 + 250]]


def test_it_never_makes_the_products_of_all_pairs():
    """4nek FLOPs, where the products alone would take 2 n^2 e."""
    n, e, k = 100, 4, 2
    block = FactorizationMachineBlock(n, e, rank=k, out_tokens=1, hidden=(3,))
    rest = 2 * (n * k * 3 + 3 * e)
    assert module_flops(block, torch.randn(2, n, e)) == 4 * n * e * k + rest == block.flops()
    assert 4 * n * e * k < 2 * n * n * e


def test_the_linear_block_combines_tokens_not_columns():
    block = TokenMap(3, 2)
    with torch.no_grad():
        block.weight.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]]))
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert block(x).tolist() == [[[6.0, 8.0], [6.0, 8.0]]]


@pytest.mark.parametrize(("num_fmb", "num_lcb"), [(1, 2), (2, 1)])
def test_a_residual_without_change_of_number_is_the_input_itself(num_fmb, num_lcb):
    """The machine's tokens come first: with both blocks silent the layer is the norm of its input."""
    layer = WukongLayer(3, 4, num_fmb, num_lcb, rank=2, hidden=(5,))
    assert layer.residual is None
    with torch.no_grad():
        layer.lcb.weight.zero_()
        layer.fmb.out.weight.zero_()
    x = torch.randn(6, 3, 4)
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(x, (4,)))
    with torch.no_grad():
        layer.fmb.out.bias.copy_(torch.arange(4.0 * num_fmb))
    changed = (layer(x) != nn.functional.layer_norm(x, (4,)))[0].any(dim=1)
    assert changed.tolist() == [True] * num_fmb + [False] * num_lcb


def test_a_residual_over_another_number_of_tokens_is_projected():
    layer = WukongLayer(3, 4, 2, 2, rank=2, hidden=(5,))
    with torch.no_grad():
        layer.lcb.weight.zero_()
        layer.fmb.out.weight.zero_()
        layer.residual.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    x = torch.randn(6, 3, 4)
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(x[:, [0, 1, 2, 0]], (4,)))


def test_new_tokens_have_both_signs():
    """A ReLU at the end of the block's MLP, as a public version has it, would make them one-sided."""
    torch.manual_seed(0)
    block = FactorizationMachineBlock(5, 4, rank=3, out_tokens=6, hidden=(32,))
    out = block(torch.randn(64, 5, 4))
    assert 0.3 < (out > 0).float().mean() < 0.7
    assert not any(isinstance(module, nn.BatchNorm1d) for module in block.modules())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_order_doubles_with_every_layer(layers):
    """Along a line through the inputs, norms and ReLU off: a polynomial of degree 2^L exactly."""
    torch.manual_seed(0)
    net = Wukong(FieldLayout.uniform(3, 2), num_layers=layers, num_fmb=2, num_lcb=2, rank=2, hidden=3)
    net = net.double().eval()
    perturb_(net)
    for layer in net.layers:
        layer.norm = layer.fmb.norm = nn.Identity()
        layer.fmb.mlp.net[1] = nn.Identity()
    degree = 2**layers
    points = np.cos(np.pi * (np.arange(degree + 6) + 0.5) / (degree + 6))
    line = torch.from_numpy(points)[:, None] * torch.randn(1, 6, dtype=torch.float64)
    with torch.no_grad():
        values = net(line).numpy()
    found = np.abs(np.polynomial.chebyshev.chebfit(points, values, degree + 5)).max(axis=1)
    assert found[degree] > 1e-6 * found.max()
    assert found[degree + 1 :].max() < 1e-9 * found.max()


def test_weights_start_with_the_right_fan():
    """Kaiming on an (n, m) matrix that is used as x W takes m for the fan-in: 4.75 times too much at 720, 32."""
    torch.manual_seed(0)
    layer = WukongLayer(720, 4, 16, 16, rank=64, hidden=(8,))
    assert layer.lcb.weight.std().item() == pytest.approx(math.sqrt(2 / (720 + 16)), rel=0.03)
    assert layer.residual.weight.std().item() == pytest.approx(math.sqrt(2 / (720 + 32)), rel=0.03)
    assert layer.fmb.projection.std().item() == pytest.approx(math.sqrt(1 / 720), rel=0.03)
    x = torch.randn(32, 720, 4)
    assert torch.matmul(x.mT, layer.fmb.projection).std().item() == pytest.approx(1.0, rel=0.05)


def test_sizes_at_a_published_scale():
    """D = 128, n_L = n_F = 16, k = 24, three layers, MLP of two times 512, on 26 fields, written out."""
    with torch.device("meta"):
        net = Wukong(
            FieldLayout.uniform(26, 128),
            num_layers=3,
            num_fmb=16,
            num_lcb=16,
            rank=24,
            hidden=512,
            num_hidden=2,
        )
    params = flops = 0
    for n in (26, 32, 32):
        mlp = [(n * 24, 512), (512, 512), (512, 16 * 128)]
        maps = n * 16 + (n * 32 if n != 32 else 0)
        params += 3 * n * 24 + sum(a * b + b for a, b in mlp) + maps + 2 * 128
        flops += 4 * n * 128 * 24 + sum(2 * a * b for a, b in mlp) + 2 * maps * 128
    assert sum(p.numel() for p in net.parameters()) == params
    assert net.flops() == flops
    assert net.out_features == 32 * 128


def test_fields_of_other_widths_are_projected_and_counted():
    layout = FieldLayout.build(
        [("a", "numeric", "user", 1), ("b", "multi", "item", 4), ("c", "multi", "item", 4)]
    )
    equal = FieldLayout.uniform(3, 4)
    sizes = {"num_layers": 1, "num_fmb": 1, "num_lcb": 1, "rank": 1, "hidden": 2}
    assert Wukong(layout, **sizes).flops() == Wukong(equal, **sizes).flops() + 2 * 4
    assert Wukong(equal, token_width=4, **sizes).flops() == Wukong(equal, **sizes).flops() + 2 * 3 * 4 * 4
