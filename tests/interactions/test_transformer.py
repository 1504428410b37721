"""The Transformer over field tokens, and its tokenisation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mldcn.interactions import Transformer
from mldcn.interactions.transformer import EncoderLayer, HomefeedTokens, attend
from mldcn.layout import FieldLayout

HOMEFEED = FieldLayout.build(
    [
        ("clicks", "numeric", "user", 1),
        ("user", "categorical", "user", 6),
        ("history", "sequence", "user", 5),
        ("saves", "numeric", "item", 2),
        ("topics", "multi", "item", 4),
        ("pin", "embedding", "item", 7),
        ("board", "sequence", "user_item", 3),
    ]
)


def test_tokens_are_s_sparse_c_dense_and_u_of_each_sequence():
    """Homefeed, 5.3.1: every sparse field, and the embedding, once; the dense group C, a sequence U times."""
    torch.manual_seed(0)
    tokens = HomefeedTokens(HOMEFEED, 4, dense_tokens=2, sequence_tokens=3)
    x0 = torch.randn(5, HOMEFEED.width)
    assert tokens.num_tokens == 3 + 2 + 3 * 2
    assert tokens(x0).shape == (5, 11, 4)
    assert sum(p.numel() for p in tokens.parameters()) == 4 * (6 + 4 + 7 + 2 * (1 + 2) + 3 * (5 + 3))
    assert tokens.flops() == 2 * 4 * (6 + 4 + 7 + 2 * 3 + 3 * 8)


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_products_with_each_fields_own_matrix_on_random_layouts(seed):
    draw = np.random.default_rng(seed)
    kinds = ["numeric", "categorical", "multi", "embedding", "sequence"]
    layout = FieldLayout.build(
        [
            (f"f{i}", kinds[draw.integers(5)], "user", int(draw.integers(1, 4)))
            for i in range(draw.integers(1, 9))
        ]
    )
    torch.manual_seed(seed)
    tokens = HomefeedTokens(layout, 3, dense_tokens=2, sequence_tokens=2).double()
    x0 = torch.randn(1, layout.width, dtype=torch.float64)
    row = x0[0].numpy()
    state = {name: value.numpy() for name, value in tokens.state_dict().items()}
    own = [
        matrix
        for name in sorted(state, key=lambda name: int(name.split(".")[2 if "proj" in name else 1]))
        if name.startswith("fields.")
        for matrix in state[name]
    ]
    expected = [
        row[field.columns] @ matrix
        for field, matrix in zip(
            [field for field in layout if field.kind not in ("numeric", "sequence")], own, strict=True
        )
    ]
    numeric = [field for field in layout if field.kind == "numeric"]
    groups = [np.concatenate([row[field.columns] for field in numeric])] if numeric else []
    groups += [row[field.columns] for field in layout if field.kind == "sequence"]
    for i, group in enumerate(groups):
        weight = state[f"groups.{i}.weight"]
        expected += [weight[:3] @ group, weight[3:] @ group]
    np.testing.assert_allclose(tokens(x0)[0].detach().numpy(), np.stack(expected), atol=1e-12)


@pytest.mark.parametrize(
    ("field", "moved"),
    [
        ("user", [0]),
        ("topics", [1]),
        ("pin", [2]),
        ("clicks", [3, 4]),
        ("saves", [3, 4]),
        ("history", [5, 6, 7]),
        ("board", [8, 9, 10]),
    ],
)
def test_a_field_moves_its_own_tokens_only(field, moved):
    torch.manual_seed(0)
    tokens = HomefeedTokens(HOMEFEED, 4, dense_tokens=2, sequence_tokens=3)
    x0 = torch.randn(1, HOMEFEED.width)
    other = x0.clone()
    other[:, next(each for each in HOMEFEED if each.name == field).columns] += 1.0
    changed = (tokens(other) != tokens(x0))[0].any(dim=1)
    assert changed.nonzero().flatten().tolist() == moved


def test_the_tokens_of_a_group_are_different_views_of_it():
    torch.manual_seed(0)
    tokens = HomefeedTokens(HOMEFEED, 4, dense_tokens=2, sequence_tokens=3)
    dense = tokens(torch.randn(1, HOMEFEED.width))[0, 3:5]
    assert not torch.allclose(dense[0], dense[1])


@pytest.mark.parametrize("kind", ["numeric", "sequence", "multi"])
def test_a_layout_of_one_kind_only(kind):
    layout = FieldLayout.build([(f"f{i}", kind, "user", 2) for i in range(3)])
    net = Transformer(layout, head_width=2, dense_tokens=5, sequence_tokens=2)
    tokens = {"numeric": 5, "sequence": 6, "multi": 3}[kind]
    assert net(torch.randn(4, 6)).shape == (4, tokens * 4)


def test_attention_of_equal_scores_is_the_mean_and_of_sharp_ones_a_choice():
    value = torch.tensor([[[[1.0, 2.0], [5.0, 8.0]]]])
    key = torch.tensor([[[[0.0], [1.0]]]])
    query = torch.tensor([[[[0.0], [1000.0]]]])
    torch.testing.assert_close(attend(query, key, value, width=1), torch.tensor([[[3.0, 5.0], [5.0, 8.0]]]))


def test_scores_are_divided_by_the_root_of_a_heads_width():
    key = torch.tensor([[[[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]])
    query = torch.tensor([[[[3.0, 0.0, 0.0, 0.0]]]])
    value = torch.tensor([[[[1.0], [0.0]]]])
    got = attend(query, key, value, width=4).item()
    assert got == pytest.approx(1 / (1 + math.exp(-3)))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_layer_equals_torchs_own(heads):
    """torch's layer has other defaults (inner width 2048, dropout 0.1, batch second), the same equations."""
    torch.manual_seed(0)
    ours = EncoderLayer(8, heads, 12).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = nn.TransformerEncoderLayer(8, heads, 12, dropout=0.0, batch_first=True).double()
    names = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "out.",
        "linear1.": "up.",
        "linear2.": "down.",
        "norm1.": "norms.0.",
        "norm2.": "norms.1.",
    }
    theirs.load_state_dict(
        {
            their + part: ours.state_dict()[our + part]
            for their, our in names.items()
            for part in ("weight", "bias")
        }
    )
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_tokens_are_told_apart_by_their_projections_alone():
    """Two fields that swap their values *and* their projections swap their outputs."""
    torch.manual_seed(0)
    net = Transformer(FieldLayout.uniform(3, 4), head_width=4, num_layers=1).double()
    x0 = torch.randn(2, 12, dtype=torch.float64)
    before = net(x0).unflatten(1, (3, -1))
    swapped = torch.cat([x0[:, 4:8], x0[:, :4], x0[:, 8:]], dim=1)
    assert not torch.allclose(net(swapped).unflatten(1, (3, -1)), before[:, [1, 0, 2]])
    with torch.no_grad():
        stack = net.tokens.fields.projections["0"]
        stack.copy_(stack[[1, 0, 2]])
    torch.testing.assert_close(net(swapped).unflatten(1, (3, -1)), before[:, [1, 0, 2]])


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    net = Transformer(FieldLayout.uniform(3, 4), dropout=0.5)
    x0 = torch.randn(2, 12)
    assert not torch.equal(net(x0), net(x0))
    net.eval()
    assert torch.equal(net(x0), net(x0))


def test_weights_start_with_the_spread_of_one_matrix():
    """Queries, keys and values are stacked for speed; so are the projections of a group."""
    torch.manual_seed(0)
    layout = FieldLayout.build([("n", "numeric", "user", 64), ("s", "sequence", "user", 32)])
    net = Transformer(layout, num_heads=4, head_width=32, num_layers=1)
    layer = net.layers[0]
    assert layer.qkv.weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 128)), rel=0.02)
    assert layer.up.weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 512)), rel=0.02)
    dense, sequence = net.tokens.groups
    assert dense.weight.std().item() == pytest.approx(math.sqrt(2 / (64 + 128)), rel=0.03)
    assert sequence.weight.std().item() == pytest.approx(math.sqrt(2 / (32 + 128)), rel=0.03)
    assert not layer.qkv.bias.any()


def test_the_inner_width_follows_the_token_width_unless_given():
    net = Transformer(FieldLayout.uniform(2, 4), num_heads=2, head_width=6)
    assert net.layers[0].up.out_features == 48
    wide = Transformer(FieldLayout.uniform(2, 4), num_heads=2, head_width=6, feedforward=10)
    assert wide.layers[0].up.out_features == 10


def test_sizes_at_a_published_scale():
    """Homefeed: C = U = 4 and two layers; 30 sparse fields and one sequence, D = 128 by hand."""
    layout = FieldLayout.build(
        [("d", "numeric", "user", 100)]
        + [(f"s{i}", "categorical", "item", 64) for i in range(30)]
        + [("u", "sequence", "user", 256)]
    )
    with torch.device("meta"):
        net = Transformer(layout, num_layers=2, num_heads=4, head_width=32)
    tokens, d = 30 + 4 + 4, 128
    assert net.out_features == tokens * d
    entry = d * (30 * 64 + 4 * 100 + 4 * 256)
    layer = np.array([12 * d * d + 13 * d, tokens * 24 * d * d + 4 * tokens**2 * d])
    assert sum(p.numel() for p in net.parameters()) == 2 * layer[0] + entry
    assert net.flops() == 2 * layer[1] + 2 * entry
