"""Hiformer: heterogeneous and composite projections, task tokens, the pruned last layer."""

import math

import pytest
import torch
from families.case import perturb_
from torch import nn

from mldcn.config import ModelConfig
from mldcn.cost.flops import module_flops
from mldcn.interactions import Hiformer
from mldcn.interactions.hiformer import CompositeProjection, FeatureTokens, HiformerLayer
from mldcn.layout import FieldLayout
from mldcn.model import Scorer

LAYOUT = FieldLayout.build(
    [
        ("age", "numeric", "user", 1),
        ("user", "categorical", "user", 4),
        ("price", "numeric", "item", 1),
        ("item", "categorical", "item", 4),
        ("image", "embedding", "item", 6),
    ]
)


def layer(total, kept, projection, seed=0):
    torch.manual_seed(seed)
    made = HiformerLayer(total, kept, 6, 2, 3, 4, 5, 5, 7, projection).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def test_tokens_are_the_fields_the_dense_group_and_the_tasks():
    torch.manual_seed(0)
    tokens = FeatureTokens(LAYOUT, 8, dense_tokens=2, task_tokens=3)
    x0 = torch.randn(4, LAYOUT.width)
    out = tokens(x0)
    assert out.shape == (4, 3 + 2 + 3, 8)
    assert torch.equal(out[0, 5:], tokens.tasks)
    assert torch.equal(out[3, 5:], tokens.tasks)
    moved = x0.clone()
    moved[:, 5] += 1.0  # the price: numeric columns meet in the MLP
    changed = (tokens(moved) != out).any(dim=2).any(dim=0)
    assert changed.tolist() == [False, False, False, True, True, False, False, False]


@pytest.mark.parametrize("projection", ["composite", "per_token"])
def test_the_last_layer_computes_what_a_whole_one_would_have_of_the_task_tokens(projection):
    """Pruning: the same numbers, from the slices of a whole layer's weights."""
    whole, pruned = layer(5, 5, projection), layer(5, 2, projection)
    state = whole.state_dict()
    with torch.no_grad():
        for name, value in pruned.state_dict().items():
            given = state[name]
            if given.shape != value.shape:
                tokens = given.unflatten(0, (5, -1)) if name == "query.up.weight" else given
                given = tokens[-2:].reshape(value.shape)
            value.copy_(given)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), whole(x)[:, -2:])
    assert pruned.flops() < whole.flops()


def test_composite_keys_read_every_token_and_per_token_keys_their_own():
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    moved = x.clone()
    moved[:, 1] += 1.0
    for projection, changed in (("composite", [True] * 4), ("per_token", [False, True, False, False])):
        made = layer(4, 4, projection)
        for name in ("query", "key", "value"):
            project = getattr(made, name)
            assert (project(moved) != project(x))[0].any(dim=1).tolist() == changed


def test_a_composite_projection_is_a_product_of_two_factors():
    torch.manual_seed(0)
    project = CompositeProjection(3, 4, 2, 5, rank=6).double()
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    matrix = project.up.weight @ project.down.weight  # (10, 12)
    torch.testing.assert_close(project(x).flatten(1), x.flatten(1) @ matrix.T)
    assert torch.linalg.matrix_rank(matrix) == 6


def test_equal_per_token_weights_are_a_plain_transformers():
    """Homogeneous attention is the special case in which all tokens share their maps."""
    made = layer(4, 4, "per_token")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("norms"):
                parameter.copy_(parameter[:1].expand_as(parameter))
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(made(x[:, order]), made(x)[:, order])
    other = layer(4, 4, "per_token")
    assert not torch.allclose(other(x[:, order]), other(x)[:, order])


def test_the_result_is_one_representation_a_task():
    torch.manual_seed(0)
    x0 = torch.randn(4, LAYOUT.width)
    assert Hiformer(LAYOUT, token_width=8)(x0).shape == (4, 8)
    several = Hiformer(LAYOUT, token_width=8, num_tasks=3)
    perturb_(several)
    out = several(x0)
    assert out.shape == (4, 3, 8)
    assert not torch.allclose(out[:, 0], out[:, 1])
    # A task's head reads its own task token.
    with torch.no_grad():
        several.tokens.tasks[1] += 1.0
    assert (several.layers[-1](several.tokens(x0))[:, 1] != out[:, 1]).any()


def test_in_a_model_every_task_has_its_token():
    config = ModelConfig.model_validate(
        {"interaction": {"name": "hiformer", "token_width": 8}, "deep": {"hidden": (4,)}}
    )
    scorer = Scorer(config, LAYOUT, ["click", "save", "hide"]).eval()
    assert scorer.interaction.num_tasks == 3
    x0 = torch.randn(5, LAYOUT.width)
    assert scorer(x0).shape == (5, 3)
    assert sum(scorer.flops().values()) == module_flops(scorer, x0)


def test_weights_start_with_the_spread_of_one_tokens_matrix():
    """Xavier on a stack of 16 matrices reads the fans of none of them: 25 and more times too small."""
    torch.manual_seed(0)
    made = HiformerLayer(16, 16, 64, 4, 16, 16, 32, 32, 256, "per_token")
    expected = {
        "query.weight": 2 / (64 + 64),
        "out.weight": 2 / (64 + 64),
        "ffn.up.weight": 2 / (64 + 256),
        "ffn.down.weight": 2 / (64 + 256),
    }
    state = made.state_dict()
    for name, variance in expected.items():
        assert state[name].std().item() == pytest.approx(math.sqrt(variance), rel=0.02)
    for bias in (made.ffn.up.bias, made.ffn.down.bias):
        assert not bias.any()
    composite = HiformerLayer(16, 16, 64, 4, 16, 16, 32, 32, 256, "composite")
    assert composite.key.down.weight.std().item() == pytest.approx(math.sqrt(2 / (1024 + 32)), rel=0.02)
    tasks = FeatureTokens(FieldLayout.uniform(1, 4), 256, 1, 8).tasks
    assert tasks.std().item() == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize("rank", [128, 256])
def test_sizes_at_the_published_widths(rank):
    """D = 128, four heads of 16 and 64, f = 4D, r_v = 1024; r_k is 128 in a table and 256 in the text."""
    fields = 40
    with torch.device("meta"):
        net = Hiformer(
            FieldLayout.uniform(fields, 128),
            num_layers=2,
            token_width=128,
            num_heads=4,
            key_width=16,
            value_width=64,
            key_rank=rank,
            value_rank=1024,
        )
    d, total = 128, fields + 1
    entry = fields * d * d + d
    layers = 0
    for kept in (total, 1):
        layers += rank * (2 * total * d + (kept + total) * 64) + 1024 * total * (d + 256)
        layers += kept * (256 * d + 2 * d * 512 + 512 + d) + 4 * d
    assert sum(p.numel() for p in net.parameters()) == entry + layers


def test_without_numeric_fields_there_is_no_dense_part():
    net = Hiformer(FieldLayout.uniform(3, 4), token_width=8, dense_tokens=7)
    assert net.tokens.num_tokens == 4
    assert net.tokens.dense is None
    dense = FieldLayout.build([("a", "numeric", "user", 1), ("b", "numeric", "user", 1)])
    only = Hiformer(dense, token_width=8, dense_tokens=7)
    assert only.tokens.num_tokens == 8
    assert only(torch.randn(2, 2)).shape == (2, 8)
