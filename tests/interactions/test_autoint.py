"""AutoInt: by hand, its scores and heads, and DCN V2's sizes."""

import math

import pytest
import torch

from mldcn.interactions import AutoInt
from mldcn.interactions.autoint import InteractingLayer
from mldcn.layout import FieldLayout

TOKENS = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
EYE = torch.eye(2)


def layer_of(query, key, value, residual=None, heads=1):
    layer = InteractingLayer(2, 2, heads, len(query) // heads, residual is not None)
    for name, weight in {"query": query, "key": key, "value": value, "residual": residual}.items():
        if weight is not None:
            getattr(layer, name).weight.data = torch.as_tensor(weight)
    return layer


def test_one_head_by_hand():
    """Scores <v_i, v_j>, not divided by any root: (1, 0) and (0, 4)."""
    out = layer_of(EYE, EYE, EYE)(TOKENS)
    first, second = math.e / (math.e + 1), math.e**4 / (math.e**4 + 1)
    expected = torch.tensor([[[first, 2 * (1 - first)], [1 - second, 2 * second]]])
    torch.testing.assert_close(out, expected)


def test_heads_are_side_by_side_and_the_residual_is_added_before_the_relu():
    """Head 1 attends to nothing in particular and takes coordinate 0, head 2 coordinate 1."""
    zeros = torch.zeros(2, 2)
    out = layer_of(zeros, EYE, EYE, residual=torch.tensor([[-1.0, 0.0], [0.0, 0.0]]), heads=2)(TOKENS)
    assert out.tolist() == [[[0, 1], [0.5, 1]]]


def test_heads_attend_apart():
    """A head's scores come from its own rows of the projections alone."""
    torch.manual_seed(0)
    layer = InteractingLayer(5, 4, 2, 3, residual=False)
    tokens = torch.randn(6, 5, 4)
    before = layer(tokens)
    layer.query.weight.data[3:] += 1
    after = layer(tokens)
    assert torch.equal(after[..., :3], before[..., :3])
    assert not torch.equal(after[..., 3:], before[..., 3:])


def test_permuted_fields_are_permuted_tokens():
    """Attention knows no places; the flat output does."""
    torch.manual_seed(0)
    net = AutoInt(FieldLayout.uniform(5, 4), num_layers=2, attention_width=3).double()
    x0, order = torch.randn(3, 5, 4, dtype=torch.float64), torch.tensor([3, 1, 4, 0, 2])
    out = net(x0.flatten(1)).view(3, 5, 6)
    torch.testing.assert_close(net(x0[:, order].flatten(1)).view(3, 5, 6), out[:, order])


def test_the_plus_is_a_dnn_beside_it():
    torch.manual_seed(0)
    layout = FieldLayout.uniform(3, 4)
    plus = AutoInt(layout, num_layers=1, attention_width=2, hidden=(5,))
    plain = AutoInt(layout, num_layers=1, attention_width=2)
    plain.load_state_dict({key: value for key, value in plus.state_dict().items() if "mlp" not in key})
    x0 = torch.randn(7, 12)
    torch.testing.assert_close(plus(x0)[:, :12], plain(x0))
    torch.testing.assert_close(plus(x0)[:, 12:], plus.mlp(x0))


def test_huge_scores_attend_to_one_field():
    """The softmax is over the shifted scores: 1e8 overflows nothing."""
    out = layer_of(EYE, EYE, EYE)(1e4 * TOKENS)
    torch.testing.assert_close(out, 1e4 * TOKENS)


def test_initial_spreads():
    torch.manual_seed(0)
    layer = InteractingLayer(4, 200, 3, 100, residual=True)
    for linear in layer.children():
        assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)


def sizes(net):
    """Millions of parameters and FLOPs with a logit behind, and FLOPs without the layers' projections."""
    parameters = sum(p.numel() for p in net.parameters()) + net.out_features + 1
    flops = net.flops() + 2 * net.out_features
    tokens = net.layers[0].num_tokens
    projections = sum(2 * tokens * p.numel() for p in net.layers.parameters())
    return parameters / 1e6, flops / 1e6, (flops - projections) / 1e6


def test_sizes_in_dcnv2_table_6():
    """AutoInt+, l = 2, h = 2, e = 40: printed 4.2M and 8.7M for Criteo, 260K and 500K for MovieLens-1M.

    On Criteo's 26 features with heads 40 wide there are 10.8M FLOPs. One reading gives all four figures: e is
    the width of both heads together, the numbers are one more feature (27 x 39 = 1,053 inputs), MovieLens's
    settings, not printed, are the same with a DNN of (4, 256), and the FLOPs leave out the projections to
    queries, keys, values and residuals. With them they are 9.4M and 630K.
    """
    options = {"num_layers": 2, "num_heads": 2}
    with torch.device("meta"):
        plain = AutoInt(FieldLayout.uniform(26, 39), **options, attention_width=40, hidden=(1024,) * 4)
        criteo = AutoInt(FieldLayout.uniform(27, 39), **options, attention_width=20, hidden=(1024,) * 4)
        movielens = AutoInt(FieldLayout.uniform(6, 30), **options, attention_width=20, hidden=(256,) * 4)
    assert sizes(plain)[:2] == pytest.approx((4.229, 10.787), rel=1e-3)
    assert sizes(criteo) == pytest.approx((4.243, 9.367, 8.685), rel=1e-3)
    assert sizes(movielens) == pytest.approx((0.2554, 0.6323, 0.4979), rel=1e-3)
    assert round(sizes(criteo)[0], 1) == 4.2
    assert round(sizes(criteo)[2], 1) == 8.7
    assert round(sizes(movielens)[0], 2) == 0.26
    assert round(sizes(movielens)[2], 2) == 0.50
