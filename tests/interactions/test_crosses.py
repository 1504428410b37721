"""DCN, EDCN, GDCN, DCNv3 and parallel stacks: numbers by hand, what they must keep apart, how they start."""

import math

import pytest
import torch
from families.crosses import REFERENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_cases import perturb_
from torch import nn

from mldcn.config import DeepConfig, ModelConfig
from mldcn.interactions import DCN, DCNV2, DCNV3, EDCN, GDCN, ParallelDCNV2, build
from mldcn.interactions.dcn import VectorCrossLayer
from mldcn.interactions.dcnv3 import SelfMaskCrossLayer, SplitHeads
from mldcn.interactions.edcn import Bridge, Regulation
from mldcn.interactions.gdcn import GatedCrossLayer
from mldcn.interactions.tokens import ResizedFields
from mldcn.layout import FieldLayout
from mldcn.model import Scorer

widths = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def layout_of(sizes):
    return FieldLayout.build([(f"f{i}", "categorical", "item", size) for i, size in enumerate(sizes)])


def set_(parameter, values):
    parameter.data = torch.tensor(values, dtype=parameter.dtype).view_as(parameter)


# DCN ---------------------------------------------------------------------------------------------------------


def test_a_layer_of_dcn_by_hand():
    layer = VectorCrossLayer(2)
    set_(layer.linear.weight, [3, 4])
    set_(layer.bias, [5, 6])
    # <x, w> = 3 + 8 = 11, then x0 * 11 + b + x.
    assert layer(torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0, 2.0]])).tolist() == [[116.0, 228.0]]


# GDCN --------------------------------------------------------------------------------------------------------


def test_a_layer_of_gdcn_by_hand():
    layer = GatedCrossLayer(2)
    set_(layer.cross.weight, [1, 1, 0, 2])
    set_(layer.cross.bias, [1, -1])
    set_(layer.gate.weight, [math.log(3), 0, 0, -1e9])
    # W x + b = (4, 3), gates sigmoid(ln 3) = 3/4 and 0.
    out = layer(torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0, 2.0]]))
    assert out.tolist() == [[pytest.approx(31.0), 2.0]]


def test_gdcn_puts_its_dnn_behind_or_beside():
    torch.manual_seed(0)
    x0 = torch.randn(3, 6)
    beside = GDCN(6, hidden=(4,))
    out = beside(x0)
    torch.testing.assert_close(out[:, 6:], beside.mlp(x0))
    stacked = GDCN(6, structure="stacked", hidden=(4,))
    stacked.load_state_dict(beside.state_dict())
    torch.testing.assert_close(stacked(x0), beside.mlp(out[:, :6]))
    with pytest.raises(ValueError, match="hidden needs a layer"):
        GDCN(6, hidden=())


def test_gdcn_has_as_many_layers_as_its_config_says():
    """A peer's key for their number is another than its constructor's, and the config's is ignored."""
    assert [len(build({"name": "gdcn_p", "num_layers": n}, 6).layers) for n in (1, 4)] == [1, 4]


# EDCN --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(sizes=widths, bridge=st.sampled_from(["hadamard", "add", "concat", "attention"]), norm=st.booleans())
def test_edcn_on_any_layout(sizes, bridge, norm):
    torch.manual_seed(0)
    net = EDCN(layout_of(sizes), num_layers=2, bridge=bridge, batch_norm=norm, temperature=2.0).double()
    perturb_(net)
    x0 = torch.randn(1, sum(sizes), dtype=torch.float64)
    parameters = {key: value.numpy() for key, value in net.state_dict().items()}
    options = {"bridge": bridge, "batch_norm": norm, "temperature": 2.0}
    expected = REFERENCES["edcn"](parameters, x0[0].numpy(), tuple(sizes), **options)
    torch.testing.assert_close(net.eval()(x0)[0], torch.tensor(expected), rtol=1e-10, atol=1e-10)


def test_regulation_shares_one_among_the_fields_of_each_tower():
    regulation = Regulation(layout_of([1, 2]), temperature=0.5, batch_norm=False)
    ones = torch.ones(1, 3)
    assert regulation(ones)[0].tolist() == [[0.5, 0.5, 0.5]]
    set_(regulation.gates, [math.log(3) / 2, 0, 0, math.log(9) / 2])
    cross, deep = regulation(ones)
    assert cross[0].tolist() == pytest.approx([0.75, 0.25, 0.25])
    assert deep[0].tolist() == pytest.approx([0.1, 0.9, 0.9])


def test_edcn_keeps_the_residual_of_its_cross():
    """A peer's cross gives the update alone."""
    net = EDCN(layout_of([2, 2]), num_layers=1, batch_norm=False)
    nn.init.zeros_(net.layers[0].cross.linear.weight)
    x0 = torch.randn(3, 4)
    torch.testing.assert_close(net(x0)[:, :4], x0 / 2)


def test_bridges_by_hand():
    x, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0]])
    assert Bridge(2, "hadamard")(x, h).tolist() == [[3.0, -8.0]]
    assert Bridge(2, "add")(x, h).tolist() == [[4.0, -2.0]]
    concat = Bridge(2, "concat")
    set_(concat.parts[0][0].weight, [1, 0, 1, 0, 0, 1, 0, 1])
    assert concat(x, h).tolist() == [[4.0, 0.0]]
    attention = Bridge(2, "attention")
    for part, p in zip(attention.parts, ([math.log(3), 0], [0, 0]), strict=True):
        set_(part[0].weight, [1, 0, 0, 1])
        set_(part[2].weight, p)
    # Scores ln 3 and 0: three quarters of x, one of h.
    assert attention(x, h)[0].tolist() == pytest.approx([1.5, 0.5])


def test_both_towers_have_an_attention_of_their_own():
    """A peer scores both with the first one's."""
    attention = Bridge(2, "attention")
    x, h = torch.randn(4, 2), torch.randn(4, 2)
    before = attention(x, h)
    with torch.no_grad():
        attention.parts[1][2].weight.add_(1.0)
        attention.parts[1][0].bias.add_(1.0)
    assert (attention(x, h) - before).abs().max() > 1e-3


# DCNv3 -------------------------------------------------------------------------------------------------------


def test_a_layer_of_dcnv3_by_hand():
    layer = SelfMaskCrossLayer(4, 1, layer_norm=False, batch_norm=False, dropout=0.0)
    set_(layer.linear.weight, [1, 0, 0, 0, 0, -1, 0, 0])
    set_(layer.bias, [0, 0, 1, 1])
    x0, x = torch.tensor([[[2.0, 2, 2, 2]]]), torch.tensor([[[3.0, 1, 0, 5]]])
    # h = (3, -1), its mask ReLU(h) = (3, 0): [h; h * mask] + b = (3, -1, 10, 1).
    assert layer(x0, x).tolist() == [[[9.0, -1.0, 20.0, 7.0]]]
    assert layer(x, x).tolist() == [[[12.0, 0.0, 0.0, 10.0]]]


def test_the_mask_drops_what_is_below_the_mean():
    layer = SelfMaskCrossLayer(8, 1, layer_norm=True, batch_norm=False, dropout=0.0)
    x = torch.randn(5, 1, 8)
    h = layer.linear(x)
    masked = (layer(torch.ones(5, 1, 8), x) - x)[..., 4:]
    assert torch.equal(masked == 0, h < h.mean(dim=2, keepdim=True))


def test_halves_of_every_field():
    assert SplitHeads(FieldLayout.uniform(2, 4), 1).index.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert SplitHeads(FieldLayout.uniform(2, 4), 2).index.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    # Odd columns go to either half by turns; 9 is a column of zeros.
    assert SplitHeads(layout_of([3, 3, 3]), 1).index.tolist() == [0, 1, 3, 6, 7, 2, 4, 5, 8]
    assert SplitHeads(layout_of([1, 8]), 2).index.tolist() == [0, 1, 2, 3, 4, 9, 5, 6, 7, 8]


@given(sizes=widths, heads=st.integers(1, 4))
def test_heads_hold_every_column_once(sizes, heads):
    layout = layout_of(sizes)
    split = SplitHeads(layout, heads)
    assert split.features == sum(math.ceil(size / heads) for size in sizes)
    taken = split.index[split.index < layout.width]
    assert sorted(taken.tolist()) == list(range(layout.width))
    field_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for columns in split.index.view(heads, -1):
        first, second = columns[: (split.features + 1) // 2], columns[(split.features + 1) // 2 :]
        for i, size in enumerate(sizes):
            mine = [sum(field_of[c] == i for c in half if c < layout.width) for half in (first, second)]
            # Where a head holds all it could of a field, its halves differ by one column at most.
            if sum(mine) == math.ceil(size / heads):
                assert abs(mine[0] - mine[1]) <= 1


def test_heads_share_weights_and_are_averaged():
    torch.manual_seed(0)
    two = DCNV3(FieldLayout.uniform(3, 4), num_heads=2)
    one = DCNV3(FieldLayout.uniform(3, 2))
    one.load_state_dict(two.state_dict())
    x0 = torch.randn(5, 12)
    halves = [x0.view(5, 3, 2, 2)[:, :, k].reshape(5, 6) for k in range(2)]
    torch.testing.assert_close(two(x0), (one(halves[0]) + one(halves[1])) / 2)


@pytest.mark.parametrize("detach", [True, False])
def test_tri_bce_by_hand(detach):
    net = DCNV3(4, detach_weights=detach)
    loss = torch.tensor([0.5, 0.5], requires_grad=True)
    streams = torch.tensor([[0.7, 0.3], [0.4, 1.0]], requires_grad=True)
    total = net.stream_loss(loss, streams)
    # 0.5 + 0.2 * 0.7 (the other stream is better than the whole), and 0.5 + 0.5 * 1.
    assert total.tolist() == pytest.approx([0.64, 1.0])
    total.sum().backward()
    if detach:
        assert loss.grad.tolist() == [1.0, 1.0]
        torch.testing.assert_close(streams.grad, torch.tensor([[0.2, 0.0], [0.0, 0.5]]))
    else:
        # d/dL of L + (L_s - L) L_s is 1 - L_s; d/dL_s is 2 L_s - L.
        torch.testing.assert_close(loss.grad, torch.tensor([0.3, 0.0]))
        torch.testing.assert_close(streams.grad, torch.tensor([[0.9, 0.0], [0.0, 1.5]]))


def test_only_dcnv3_trains_its_networks_by_themselves():
    assert len(DCNV3(4).streams) == 2
    for name in ("sdcnv3", "ecn", "lcn"):
        assert build({"name": name}, 4).streams == ()
    with pytest.raises(ValueError, match="one network needs a layer"):
        DCNV3(4, num_deep_layers=0, num_shallow_layers=0)


def test_the_logit_of_dcnv3_is_the_mean_of_its_networks():
    torch.manual_seed(0)
    config = ModelConfig(interaction={"name": "dcnv3"}, deep=DeepConfig(hidden=()))
    scorer = Scorer(config, FieldLayout.uniform(3, 4), ["click", "save"])
    x0 = torch.randn(5, 12)
    whole, streams = scorer.with_streams(x0)
    torch.testing.assert_close(whole, scorer(x0))
    torch.testing.assert_close(whole, streams.mean(dim=0))


def test_dcnv3_joins_the_exponential_and_the_linear_network():
    torch.manual_seed(0)
    both = DCNV3(FieldLayout.uniform(3, 4), num_deep_layers=2, num_shallow_layers=1)
    perturb_(both)
    x0 = torch.randn(5, 12)
    parts = []
    for name, prefix, count in (("ecn", "deep", 2), ("lcn", "shallow", 1)):
        alone = build({"name": name, f"num_{prefix}_layers": count}, FieldLayout.uniform(3, 4))
        alone.load_state_dict({k: v for k, v in both.state_dict().items() if k.startswith(prefix)})
        parts.append(alone(x0))
    torch.testing.assert_close(both(x0), torch.cat(parts, dim=1))


def test_resized_fields_share_the_columns_evenly():
    torch.manual_seed(0)
    resized = ResizedFields(layout_of([1, 3, 2]), 5)
    assert resized.layout.widths == (2, 2, 1)
    x0 = torch.randn(4, 6)
    before = resized(x0)
    x0[:, 1:4] += 1.0
    assert (resized(x0) != before).all(dim=0).tolist() == [False, False, True, True, False]
    with pytest.raises(ValueError, match="projection 2 is below the number of fields, 3"):
        EDCN(layout_of([1, 3, 2]), projection=2)


# Stacks side by side -----------------------------------------------------------------------------------------


def test_parallel_stacks_start_from_the_same_input():
    torch.manual_seed(0)
    net = ParallelDCNV2(6, num_stacks=3, num_layers=2)
    x0 = torch.randn(4, 6)
    alone = []
    for i in range(3):
        stack = DCNV2(6, num_layers=2)
        stack.load_state_dict(net.stacks[i].state_dict())
        alone.append(stack(x0))
    torch.testing.assert_close(net(x0), torch.cat([*alone, x0], dim=1))
    assert not torch.allclose(alone[0], alone[1])


def test_four_stacks_of_two_cost_what_eight_in_one_do():
    """Homefeed, Table 1: their latencies, +21.7 % and +22.8 %, agree."""
    assert ParallelDCNV2(64).flops() == DCNV2(64, num_layers=8).flops()


def test_the_homefeed_baseline_is_four_layers_and_the_input():
    torch.manual_seed(0)
    net = build({"name": "homefeed_baseline"}, 6)
    stack = DCNV2(6, num_layers=4)
    stack.load_state_dict(net.stacks[0].state_dict())
    x0 = torch.randn(4, 6)
    torch.testing.assert_close(net(x0), torch.cat([stack(x0), x0], dim=1))


# Initial weights ---------------------------------------------------------------------------------------------


def spread(tensor):
    return tensor.std().item()


def test_initial_spreads():
    torch.manual_seed(0)
    assert spread(VectorCrossLayer(5000).linear.weight) == pytest.approx(math.sqrt(2 / 5001), rel=0.03)
    gated = GatedCrossLayer(300)
    for linear in (gated.cross, gated.gate):
        assert spread(linear.weight) == pytest.approx(math.sqrt(2 / 600), rel=0.02)
    half = SelfMaskCrossLayer(300, 1, layer_norm=True, batch_norm=False, dropout=0.0)
    assert spread(half.linear.weight) == pytest.approx(math.sqrt(2 / 450), rel=0.02)
    layer = EDCN(300, num_layers=1, bridge="attention").layers[0]
    for linear in (layer.dense, layer.bridge.parts[0][0], layer.bridge.parts[1][0]):
        assert spread(linear.weight) == pytest.approx(math.sqrt(2 / 600), rel=0.02)
    wide = ResizedFields(layout_of([300, 300]), 400)
    assert spread(wide.projections[0]) == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    narrow = DCN(500, projection=100).projection
    assert spread(narrow.weight) == pytest.approx(math.sqrt(2 / 600), rel=0.02)
    nets = [DCN(8), GDCN(8), EDCN(8, bridge="concat"), DCNV3(8), ParallelDCNV2(8)]
    biases = [
        (name, value) for net in nets for name, value in net.named_parameters() if name.endswith("bias")
    ]
    assert [name for name, value in biases if value.any()] == []
