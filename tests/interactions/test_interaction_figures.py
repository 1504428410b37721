"""Properties and figures that the papers state."""

import math

import pytest
import torch
from interaction_cases import perturb_

from mldcn import interactions
from mldcn.interactions import DCNV2, DNN, MLDCN, DCNMix, DCNV2LowRank, Homefeed, MaskNet
from mldcn.interactions.fields import FieldL2Norm, FieldLayerNorm
from mldcn.layout import FieldLayout

PLAIN = {"norm": "none", "activation": "identity", "dropout": 0.0, "mask_start": "xavier"}


def degree(module, width=5):
    """The exponent with which the output grows along a ray far from the origin."""
    torch.manual_seed(0)
    module.double().eval()
    perturb_(module)
    x = torch.randn(1, width, dtype=torch.float64)
    with torch.no_grad():
        near, far = module(2.0**14 * x), module(2.0**15 * x)
    slopes = (far / near).abs().log2()
    assert slopes.max() - slopes.min() < 0.05
    return round(slopes.mean().item())


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
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
def test_order_of_mldcn(layers, options, order):
    """ML-DCN, Section 3.3: 2^(l+1) - 1 with l layers."""
    assert degree(MLDCN(5, num_layers=layers, rank=3, **PLAIN, **options)) == order(layers)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_order_of_cross_networks(layers):
    """DCN V2, Section 4.1: l + 1."""
    assert degree(DCNV2(5, num_layers=layers)) == layers + 1
    assert degree(DCNV2LowRank(5, num_layers=layers, rank=2)) == layers + 1
    assert degree(DCNMix(5, num_layers=layers, num_experts=2, rank=2, gate="constant")) == layers + 1


def test_without_biases_mldcn_has_odd_orders_only():
    module = MLDCN(5, num_layers=2, rank=3, **PLAIN).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(module(-x), -module(x))
    perturb_(module)
    assert (module(-x) + module(x)).abs().max() > 1e-3


def test_with_its_mask_at_one_mldcn_is_the_low_rank_cross_network():
    for options in ({}, {"mask": "none"}, {"mask": "linear"}, {"mask": "relu"}):
        torch.manual_seed(3)
        masked = MLDCN(9, num_layers=3, rank=4, norm="none", dropout=0.0, **options)
        low_rank = DCNV2LowRank(9, num_layers=3, rank=4)
        low_rank.load_state_dict({k: v for k, v in masked.state_dict().items() if "mask" not in k})
        x0 = torch.randn(6, 9)
        torch.testing.assert_close(masked(x0), low_rank(x0), rtol=0, atol=1e-6)


def test_the_mask_reads_each_example():
    module = MLDCN(9, num_layers=1, rank=4, norm="none", dropout=0.0)
    perturb_(module)
    mask = module.layers[0].mask(torch.randn(8, 9))
    assert mask.shape == (8, 4)
    assert mask.std(dim=0).min() > 0


def test_a_fresh_mldcn_with_zero_gain_is_the_identity():
    x0 = torch.randn(6, 9)
    assert torch.equal(MLDCN(9, norm_gain=0.0).eval()(x0), x0)
    plain = interactions.build({"name": "mldcn_plain"}, 9)
    assert (plain(x0) - x0).abs().max() > 0.1


def test_dropout_falls_on_x0_once_for_all_layers():
    torch.manual_seed(0)
    module = MLDCN(400, norm_gain=0.0, dropout=0.25).train()
    out = module(torch.ones(50, 400))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(module.eval()(torch.ones(2, 400)), torch.ones(2, 400))


def test_one_expert_is_the_low_rank_network():
    """DCN V2, below Eq. 3."""
    for gate in ("softmax", "constant"):
        mix = DCNMix(7, num_layers=2, num_experts=1, rank=3, gate=gate).double()
        low_rank = DCNV2LowRank(7, num_layers=2, rank=3).double()
        perturb_(mix)
        state = mix.state_dict()
        for i in range(2):
            low_rank.layers[i].down.weight.data = state[f"layers.{i}.down.weight"]
            low_rank.layers[i].up.weight.data = state[f"layers.{i}.up.weight"]
            low_rank.layers[i].up.bias.data = state[f"layers.{i}.bias"]
        x0 = torch.randn(4, 7, dtype=torch.float64)
        torch.testing.assert_close(mix(x0), low_rank(x0))


def test_a_shared_gate_is_one_matrix():
    shared = DCNMix(7, num_layers=3, num_experts=2, rank=3, share_gate=True)
    assert sum("gates" in name for name in shared.state_dict()) == 1
    assert sum("gates" in name for name in DCNMix(7, num_layers=3).state_dict()) == 3


def test_fields_of_one_column_keep_their_value():
    layout = FieldLayout.build(
        [("a", "numeric", "user", 1), ("b", "categorical", "user", 3), ("c", "numeric", "user", 1)]
    )
    x0 = torch.tensor([[5.0, 3.0, 0.0, 4.0, -2.0]])
    torch.testing.assert_close(FieldL2Norm(layout)(x0), torch.tensor([[5.0, 0.6, 0.0, 0.8, -2.0]]))
    normalised = FieldLayerNorm(layout)(x0)
    assert normalised[0, [0, 4]].tolist() == [5.0, -2.0]
    assert normalised[0, 1:4].mean().item() == pytest.approx(0, abs=1e-6)
    assert normalised[0, 1:4].std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert FieldL2Norm(layout)(torch.zeros(1, 5)).tolist() == [[0.0] * 5]


# Initial weights --------------------------------------------------------------------------------------------


def spread(tensor):
    return tensor.std().item()


def test_experts_start_with_the_fans_of_their_own_matrix():
    torch.manual_seed(0)
    layer = DCNMix(1027, num_layers=1, num_experts=4, rank=64, with_c=True).layers[0]
    assert spread(layer.down.weight) == pytest.approx(math.sqrt(2 / (1027 + 64)), rel=0.02)
    assert spread(layer.up.weight) == pytest.approx(math.sqrt(2 / (1027 + 64)), rel=0.02)
    assert spread(layer.inner) == pytest.approx(1 / 8, rel=0.03)


def test_initial_spreads():
    torch.manual_seed(0)
    assert spread(DNN(400, hidden=(300,)).mlp.net[0].weight) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert spread(DCNV2(300).layers[0].linear.weight) == pytest.approx(math.sqrt(2 / 300), rel=0.02)
    low = DCNV2LowRank(400, rank=100).layers[0]
    assert spread(low.down.weight) == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    masked = MLDCN(400, rank=100).layers[0]
    assert spread(masked.up.weight) == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    assert masked.mask.net[-1].weight.eq(0).all()
    assert masked.mask.net[-1].bias.eq(1).all()
    for module in (DNN(8), DCNV2(8), DCNV2LowRank(8), DCNMix(8), MaskNet(8)):
        for name, value in module.named_parameters():
            assert not name.endswith("bias") or value.eq(0).all()


# Sizes ------------------------------------------------------------------------------------------------------


def sizes(module, hidden=(), parallel=False):
    """Millions of parameters and of FLOPs with a DNN (stacked by default) and a logit with its bias behind."""
    deep = DNN(module.in_features if parallel else module.out_features, hidden=hidden)
    last = deep.out_features + (module.out_features if parallel else 0)
    parameters = sum(p.numel() for part in (module, deep) for p in part.parameters()) + last + 1
    return parameters / 1e6, (module.flops() + deep.flops() + 2 * last) / 1e6


# The module, the DNN behind it; the sizes that it has and those that the paper prints.
TABLE_6 = {
    "Criteo DNN": (lambda: DNN(1027, hidden=(1024,) * 3), {}, (3.153, 6.30), (3.2, 6.3)),
    "Criteo DCN-V2": (lambda: DCNV2(1027, num_layers=2), {"hidden": (768,) * 2}, (3.492, 6.98), (3.5, 7.0)),
    "Criteo DCN-Mix": (
        lambda: DCNMix(1027, rank=64, gate="constant", activation="hardtanh", with_c=True),
        {"hidden": (512,) * 2},
        (2.419, 4.83),
        (2.4, 4.8),
    ),
    "Criteo CrossNet": (lambda: DCNMix(1027, num_layers=4, rank=64), {}, (2.125, 4.24), (2.1, 4.2)),
    "ML-1M DNN": (lambda: DNN(180, hidden=(256,)), {}, (0.0466, 0.0927), (0.046, 0.092)),
    "ML-1M DCN-V2": (
        lambda: DCNV2(180, num_layers=2),
        {"hidden": (256,), "parallel": True},
        (0.1120, 0.2226),
        (0.110, 0.220),
    ),
    "ML-1M CrossNet": (lambda: DCNV2(180, num_layers=2), {}, (0.0653, 0.1300), (0.065, 0.130)),
}


@pytest.mark.parametrize(("make", "deep", "computed", "printed"), TABLE_6.values(), ids=TABLE_6)
def test_sizes_of_dcnv2_table_6(make, deep, computed, printed):
    with torch.device("meta"):
        got = sizes(make(), **deep)
    assert got == pytest.approx(computed, rel=2e-3)
    assert got == pytest.approx(printed, rel=0.025)


@pytest.mark.parametrize(("width", "params", "mflops"), [(4096, 201.4, 402.7), (16384, 704.9, 1409)])
def test_sizes_of_the_published_mldcn(width, params, mflops):
    """l = 4, r = 4096, t = 0.5: 40,972 d + 33,579,008 parameters and 81,920 d + 67,108,864 FLOPs."""
    with torch.device("meta"):
        module = MLDCN(width, num_layers=4, rank=4096, mask_ratio=0.5)
    parameters = sum(p.numel() for p in module.parameters())
    assert parameters == 40_972 * width + 33_579_008
    assert module.flops() == 81_920 * width + 67_108_864
    assert (parameters / 1e6, module.flops() / 1e6) == pytest.approx((params, mflops), rel=1e-3)


def test_at_the_break_even_rank_a_layer_costs_a_full_one():
    for ratio, share in ((0.5, 0.372), (1.0, 0.303), (2.0, 0.225)):
        rank = MLDCN.break_even_rank(2000, ratio)
        assert rank / 2000 == pytest.approx(share, abs=1e-3)
        with torch.device("meta"):
            masked = MLDCN(2000, num_layers=1, rank=round(rank), mask_ratio=ratio)
            full = DCNV2(2000, num_layers=1)
        assert masked.flops() == pytest.approx(full.flops(), rel=2e-3)


def test_homefeed_at_half_the_width_in_its_masks_costs_what_four_cross_layers_do():
    """Homefeed, Section 5.4: no net increase of parameters, here at 4,000 inputs."""
    with torch.device("meta"):
        stack = Homefeed(4000, aggregation_ratio=0.5)
        crosses = DCNV2(4000, num_layers=4)
    counts = [sum(p.numel() for p in module.parameters()) for module in (stack, crosses)]
    assert counts[0] == pytest.approx(counts[1], rel=0.02)
