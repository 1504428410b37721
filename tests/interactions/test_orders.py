"""The interaction order that each architecture claims, as the polynomial degree along a line; identities.

Where a claim drops norms, activations and gates, they are switched off here: norms and activations are the
identity (``Algebraic``), and a gate is made constant by the weights before it.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families.case import LAYOUT
from interaction_cases import perturb_
from torch import nn
from torch.overrides import TorchFunctionMode

from mldcn import interactions
from mldcn.interactions import DCN, DCNV2, EDCN, FM, GDCN, MLDCN, DCNMix, DCNV2LowRank, FwFM
from mldcn.interactions.dcnv3 import SelfMaskCrossLayer
from mldcn.interactions.fibinet import SqueezeExcitation
from mldcn.interactions.gdcn import GatedCrossLayer
from mldcn.layout import FieldLayout, FirstOrder

DROPPED = {F.layer_norm, F.batch_norm, F.normalize, F.relu, torch.relu, torch.Tensor.relu, F.gelu}


class Algebraic(TorchFunctionMode):
    """Norms and activations give back what they are given."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function in DROPPED else function(*args, **(kwargs or {}))


def on_a_line(module, layout, degree, *, reach=2.0**10, through_origin=False):
    """Sizes of the Chebyshev coefficients, from order 0 to some orders above ``degree``, of the outputs.

    Every input is ``a + t reach b`` with t in [-1, 1] at Chebyshev nodes; a long reach lets the highest
    power show. Each output is divided by its largest value; the largest output counts.
    """
    torch.manual_seed(3)
    count = degree + 9
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    t = torch.tensor(nodes).unsqueeze(1)
    given = []
    for width in (layout.width, *(side.width(layout) for side in module.sides)):
        start, way = torch.randn(2, width, dtype=torch.float64)
        given.append(reach * t * way + (0.0 if through_origin else 1.0) * start)
    with torch.no_grad():
        values = module(*given).flatten(1).numpy()
    values = values[:, np.abs(values).max(axis=0) > 0]
    basis = np.polynomial.chebyshev.chebvander(nodes, count - 1)
    found = 2 / count * basis.T @ (values / np.abs(values).max(axis=0))
    return np.abs(found).max(axis=1)


def degree_of(module, claimed, dropped=True, layout=LAYOUT):
    module.double().eval()
    with Algebraic() if dropped else torch.no_grad():
        sizes = on_a_line(module, layout, claimed)
    return int(np.flatnonzero(sizes > 1e-11).max())


def perturbed(name, options, layout=LAYOUT):
    torch.manual_seed(0)
    module = interactions.build({"name": name, **options}, layout).double()
    perturb_(module)
    return module


def constant_gates(module):
    """Gates of GDCN and FiBiNET at one half, masks of DCNv3 at one."""
    for part in module.modules():
        if isinstance(part, GatedCrossLayer):
            nn.init.zeros_(part.gate.weight)
        elif isinstance(part, SqueezeExcitation):
            nn.init.zeros_(part.excite.weight)
        elif isinstance(part, SelfMaskCrossLayer):
            nn.init.zeros_(part.layer_norm.weight)
            nn.init.ones_(part.layer_norm.bias)
    return module


# Claims ------------------------------------------------------------------------------------------------------

ORDERS = {
    "1": lambda L: 1,
    "2": lambda L: 2,
    "L + 1": lambda L: L + 1,
    "2 (L + 1)": lambda L: 2 * (L + 1),
    "2^L": lambda L: 2**L,
    "2^(L+1) - 1": lambda L: 2 ** (L + 1) - 1,
}


def layers(**options):
    return lambda L: {"num_layers": L, **options}


# Options that make L layers of each architecture, and the L to try.
CLAIMS = {
    "dcn": (layers(), (1, 2, 4)),
    "dcnv2": (layers(), (1, 2, 4)),
    "dcnv2_concat": (layers(), (1, 3)),
    "dcnv2_lowrank": (layers(rank=3), (1, 2, 4)),
    "dcnv2_parallel": (layers(), (2, 3)),
    "dcnv3": (lambda L: {"num_deep_layers": L, "num_shallow_layers": 2}, (2, 3)),
    "sdcnv3": (lambda L: {"num_deep_layers": L, "num_shallow_layers": 2}, (2, 3)),
    "ecn": (lambda L: {"num_deep_layers": L}, (1, 2, 3, 4)),
    "lcn": (lambda L: {"num_shallow_layers": L}, (1, 2, 4)),
    "edcn": (layers(), (1, 2, 3)),
    "gdcn_p": (layers(hidden=[5]), (1, 2, 4)),
    "gdcn_s": (layers(hidden=[5]), (1, 2, 4)),
    "homefeed": (layers(width=5), (1, 4)),
    "homefeed_baseline": (layers(), (1, 4)),
    "masknet": (layers(), (1, 2, 3, 4)),
    "masknet_parallel": (lambda L: {"width": 5}, (1,)),
    "masknet_serial": (lambda L: {"width": 5, "num_blocks": L}, (1, 2, 4)),
    "mldcn": (layers(rank=3), (1, 2, 3, 4)),
    "mldcn_plain": (layers(rank=3), (1, 2, 3, 4)),
    "lr": (lambda L: {}, (1,)),
    "wide_deep": (lambda L: {"hidden": [5]}, (1,)),
    "fm": (lambda L: {}, (1,)),
    "fwfm": (lambda L: {}, (1,)),
    "deepfm": (lambda L: {"hidden": [5]}, (1,)),
    "deeplight": (lambda L: {"hidden": [5]}, (1,)),
    "fibinet": (lambda L: {"hidden": [5], "excitation": "sigmoid"}, (1,)),
    "nfm": (lambda L: {"hidden": [5]}, (1,)),
    "ipnn": (lambda L: {"hidden": [5]}, (1,)),
    "opnn": (lambda L: {"hidden": [5]}, (1,)),
    "pnn": (lambda L: {"hidden": [5]}, (1,)),
    "ipnn_2016": (lambda L: {"hidden": [5]}, (1,)),
    "opnn_2016": (lambda L: {"hidden": [5]}, (1,)),
    "dlrm": (lambda L: {"bottom": [5], "hidden": [5]}, (1,)),
    "xdeepfm": (lambda L: {"cin_layers": [4] * L, "hidden": [5]}, (1, 2, 4)),
    "wukong": (layers(num_fmb=2, num_lcb=2, rank=3, hidden=5), (1, 2, 3, 4)),
}

SELF_MASKED = {"dcnv3", "sdcnv3", "ecn", "lcn"}


def claims(name):
    return not interactions.info(name).order.startswith("none")


@pytest.mark.parametrize("name", [name for name in interactions.names() if claims(name)])
def test_every_claimed_order_is_exact(name):
    order, (options, depths) = ORDERS[interactions.info(name).order], CLAIMS[name]
    # The masks of DCNv3 are constant only behind their norm.
    dropped = name not in SELF_MASKED
    found = {L: degree_of(constant_gates(perturbed(name, options(L))), order(L), dropped) for L in depths}
    assert found == {L: order(L) for L in depths}


def test_all_claims_here_are_claimed():
    assert set(CLAIMS) == set(filter(claims, interactions.names()))


# ML-DCN ------------------------------------------------------------------------------------------------------

PLAIN = {"norm": "none", "activation": "identity", "mask_start": "xavier"}


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, lambda n: 2 ** (n + 1) - 1),
        ({"mask": "linear"}, lambda n: 2 ** (n + 1) - 1),
        ({"mask_input": "projected"}, lambda n: 2 ** (n + 1) - 1),
        ({"bias": "outside"}, lambda n: 2 ** (n + 1) - 1),
        ({"mask_input": "x0"}, lambda n: 2 * n + 1),
        ({"mask": "none"}, lambda n: n + 1),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_readings_of_mldcn_have_these_orders(depth, options, order):
    """With the module's own switches. The paper's claim (Section 3.3) needs a mask made from the layer's input."""
    module = perturbed("mldcn", {"num_layers": depth, "rank": 3, **PLAIN, **options})
    assert degree_of(module, order(depth), dropped=False) == order(depth)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_without_biases_mldcn_has_odd_orders_only(depth):
    module = perturbed("mldcn", {"num_layers": depth, "rank": 3, **PLAIN})
    for name, value in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(value)
    sizes = on_a_line(module, LAYOUT, 2 ** (depth + 1) - 1, reach=1.0, through_origin=True)
    assert sizes[::2].max() < 1e-13
    assert sizes[1 : 2 ** (depth + 1) : 2].min() > 1e-9
    perturb_(module)
    sizes = on_a_line(module, LAYOUT, 2 ** (depth + 1) - 1, reach=1.0, through_origin=True)
    assert sizes[: 2 ** (depth + 1)].min() > 1e-9


def test_mldcn_without_mask_and_norm_is_the_low_rank_cross_network():
    """Table 4's first row, and the fresh mask (W2 = 0, b2 = 1)."""
    for options in ({}, {"mask": "none"}, {"mask": "linear"}, {"mask": "relu"}):
        torch.manual_seed(3)
        masked = MLDCN(9, num_layers=3, rank=4, norm="none", **options).double()
        low_rank = DCNV2LowRank(9, num_layers=3, rank=4).double()
        perturb_(low_rank)  # biases too: theirs must be inside the product
        masked.load_state_dict({**masked.state_dict(), **low_rank.state_dict()})
        x0 = torch.randn(6, 9, dtype=torch.float64)
        torch.testing.assert_close(masked(x0), low_rank(x0), rtol=1e-12, atol=1e-12)


def test_with_weights_of_the_mask_at_zero_and_its_bias_at_one_there_is_no_mask():
    module = perturbed("mldcn", {"num_layers": 2, "rank": 3})
    bare = interactions.build({"name": "mldcn", "num_layers": 2, "rank": 3, "mask": "none"}, LAYOUT).double()
    bare.load_state_dict({k: v for k, v in module.state_dict().items() if "mask" not in k})
    x0 = torch.randn(5, LAYOUT.width, dtype=torch.float64)
    assert (module(x0) - bare(x0)).abs().max() > 0.1
    for layer in module.layers:
        nn.init.zeros_(layer.mask.net[-1].weight)
        nn.init.ones_(layer.mask.net[-1].bias)
    torch.testing.assert_close(module(x0), bare(x0))


# Cross networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bridge", ["add", "concat"])
def test_edcn_without_a_product_of_its_towers_has_the_order_of_dcn(depth, bridge):
    module = perturbed("edcn", {"num_layers": depth, "bridge": bridge})
    assert degree_of(module, depth + 1) == depth + 1


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_dcn_mix_with_a_constant_gate_has_the_order_of_dcnv2(depth):
    module = DCNMix(5, num_layers=depth, num_experts=2, rank=2, gate="constant")
    perturb_(module)
    assert degree_of(module, depth + 1, layout=FieldLayout.flat(5)) == depth + 1


@pytest.mark.parametrize("depth", [1, 3])
def test_a_dhen_has_the_product_of_its_layers_orders(depth):
    module = perturbed(
        "dhen", {"layers": [[{"name": "dcnv2", "num_layers": depth}, "dnn"], ["dnn", "masknet_parallel"]]}
    )
    assert degree_of(module, 2 * (depth + 1)) == 2 * (depth + 1)


def test_dcnv2_with_equal_rows_and_no_bias_is_dcn():
    """DCN V2, Section 3.2: W = 1 w^T."""
    dcn, dcnv2 = DCN(7, num_layers=3).double(), DCNV2(7, num_layers=3).double()
    for vector, full in zip(dcn.layers, dcnv2.layers, strict=True):
        full.linear.weight.data = torch.ones(7, 1, dtype=torch.float64) @ vector.linear.weight.data
    x0 = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(dcnv2(x0), dcn(x0), rtol=1e-12, atol=1e-12)


def test_gdcn_with_its_gates_at_one_half_is_dcnv2_with_half_its_weights():
    gdcn, dcnv2 = GDCN(7, num_layers=3, structure="stacked", hidden=()).double(), DCNV2(7).double()
    perturb_(gdcn)
    constant_gates(gdcn)
    for gated, plain in zip(gdcn.layers, dcnv2.layers, strict=True):
        plain.linear.weight.data = gated.cross.weight.data / 2
        plain.linear.bias.data = gated.cross.bias.data / 2
    x0 = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(gdcn(x0), dcnv2(x0))


def test_edcn_adds_its_towers_to_dcn_and_a_dense_layer_where_it_has_one_field_and_layer():
    edcn, dcn = EDCN(7, num_layers=1, bridge="add", batch_norm=False).double(), DCN(7, num_layers=1).double()
    perturb_(edcn)
    layer = edcn.layers[0]
    dcn.layers.load_state_dict({f"0.{k}": v for k, v in layer.cross.state_dict().items()})
    x0 = torch.randn(5, 7, dtype=torch.float64)
    x, h = dcn(x0), layer.dense(x0).relu()
    torch.testing.assert_close(edcn(x0), torch.cat([x, h, x + h], dim=1))


# Factorisation machines --------------------------------------------------------------------------------------


def one_cross_layer(fields, width, pairs, first):
    """DCN V2, Section 4.2: ``1^T (x * (W x + b))``; block (i, j) of W is ``w_ij I`` for i < j, b is beta."""
    network = DCNV2(fields * width, num_layers=1).double()
    layer = network.layers[0].linear
    layer.weight.data = torch.kron(torch.triu(pairs, diagonal=1), torch.eye(width, dtype=torch.float64))
    layer.bias.data = first.flatten()
    return lambda x0: (network(x0) - x0).sum(dim=1, keepdim=True)


def test_fm_is_one_cross_layer_without_its_residual():
    x0 = torch.randn(6, 12, dtype=torch.float64)
    first = torch.randn(4, 3, dtype=torch.float64)
    cross = one_cross_layer(4, 3, torch.ones(4, 4, dtype=torch.float64), first)
    terms = torch.einsum("bfe,fe->bf", x0.unflatten(1, (4, 3)), first)
    fm = FM(FieldLayout.uniform(4, 3)).double()
    assert fm.sides == (FirstOrder(),)
    torch.testing.assert_close(fm(x0, terms), cross(x0))


def test_fwfm_is_one_cross_layer_with_a_weight_a_pair():
    fwfm = FwFM(FieldLayout.uniform(4, 3), first_order="embedding").double()
    perturb_(fwfm)
    pairs = torch.zeros(4, 4, dtype=torch.float64)
    pairs[*torch.triu_indices(4, 4, offset=1)] = fwfm.weight.data
    x0 = torch.randn(6, 12, dtype=torch.float64)
    cross = one_cross_layer(4, 3, pairs, fwfm.linear.linear.weight.data)
    torch.testing.assert_close(fwfm(x0), cross(x0))
