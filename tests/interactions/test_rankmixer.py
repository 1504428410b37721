"""RankMixer: tokens, mixing, published sizes; and its sparse mixture: two routers, a loss that adapts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families.case import perturb_
from torch import nn

from mldcn.interactions import RankMixer, RankMixerMoE, auxiliary_loss
from mldcn.interactions.per_token import PerTokenFFN, PerTokenLinear
from mldcn.interactions.rankmixer import LOG_START, SemanticTokens, SparseExperts, mix_tokens
from mldcn.layout import FieldLayout


def test_tokens_are_slices_of_the_fields_grouped_by_source():
    layout = FieldLayout.build(
        [
            ("hour", "numeric", "context", 1),
            ("item", "categorical", "item", 2),
            ("user", "categorical", "user", 2),
            ("match", "numeric", "user_item", 1),
            ("age", "numeric", "user", 1),
        ]
    )
    tokens = SemanticTokens(layout, num_tokens=4, width=3)
    assert tokens.slice == 2
    with torch.no_grad():
        tokens.projection.weight.zero_()
        tokens.projection.weight[:, 0, 0] = 1.0
        tokens.projection.weight[:, 1, 1] = 1.0
    x0 = torch.tensor([[10.0, 20.0, 21.0, 30.0, 31.0, 40.0, 50.0]])
    # user, age | item | match | context, and a zero.
    assert tokens(x0)[0, :, :2].tolist() == [[30, 31], [50, 20], [21, 40], [10, 0]]


@pytest.mark.parametrize("seed", range(8))
def test_no_column_is_lost_or_used_twice_on_random_layouts(seed):
    draw = np.random.default_rng(seed)
    sources = ["user", "item", "user_item", "context"]
    layout = FieldLayout.build(
        [
            (f"f{i}", "categorical", sources[draw.integers(4)], int(draw.integers(1, 6)))
            for i in range(draw.integers(1, 9))
        ]
    )
    tokens = SemanticTokens(layout, num_tokens=int(draw.integers(1, 7)), width=5)
    seen = []
    tokens.projection.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    tokens(torch.arange(1.0, layout.width + 1)[None])
    columns = seen[0].flatten().int().tolist()
    order = [
        column + 1
        for source in sources
        for field in layout
        if field.source == source
        for column in range(field.columns.start, field.columns.stop)
    ]
    assert columns == order + [0] * (len(columns) - layout.width)


def test_every_token_has_a_projection_of_its_own():
    tokens = SemanticTokens(FieldLayout.flat(8), num_tokens=4, width=3)
    out = tokens(torch.ones(1, 8))[0]
    assert not any(torch.equal(out[0], out[t]) for t in (1, 2, 3))


def test_mixing_gives_a_token_one_head_of_every_token():
    x = torch.arange(2 * 3 * 6.0).reshape(2, 3, 6)
    mixed = mix_tokens(x)
    for h in range(3):
        for t in range(3):
            assert torch.equal(mixed[:, h, 2 * t : 2 * t + 2], x[:, t, 2 * h : 2 * h + 2])
    assert torch.equal(mix_tokens(mixed), x)


def test_every_token_reaches_every_other_after_one_block():
    torch.manual_seed(0)
    net = RankMixer(FieldLayout.uniform(4, 2), num_layers=1, num_tokens=4, head_width=2)
    x0 = torch.randn(1, 8, requires_grad=True)
    tokens = net.blocks[0](net.tokens(x0))
    for t in range(4):
        (gradient,) = torch.autograd.grad(tokens[0, t].pow(2).sum(), x0, retain_graph=True)
        assert gradient.all()


def test_tokens_do_not_share_their_networks():
    torch.manual_seed(0)
    ffn = PerTokenFFN(3, 4, 8)
    x = torch.randn(1, 1, 4).expand(1, 3, 4)
    out = ffn(x)[0]
    assert not torch.allclose(out[0], out[1])
    single = F.gelu(x[0, 1] @ ffn.up.weight[1] + ffn.up.bias[1]) @ ffn.down.weight[1] + ffn.down.bias[1]
    torch.testing.assert_close(out[1], single)


def test_the_result_is_the_mean_of_the_tokens():
    torch.manual_seed(0)
    net = RankMixer(12, num_layers=1, num_tokens=3, head_width=2)
    x0 = torch.randn(4, 12)
    torch.testing.assert_close(net(x0), net.blocks[0](net.tokens(x0)).sum(dim=1) / 3)


# (T, D, published parameters, published FLOPs a batch of 512): RankMixer-100M and -1B.
PUBLISHED = [(16, 768, 107e6, 233e9), (32, 1536, 1e9, 2106e9)]


@pytest.mark.parametrize(("tokens", "width", "params", "flops"), PUBLISHED)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_papers_closed_formulas(tokens, width, params, flops, k):
    """#Param ~ 2kLTD^2 and FLOPs ~ 4kLTD^2: the rest is biases, norms and the projection of the slices."""
    with torch.device("meta"):
        net = RankMixer(tokens * 64, num_tokens=tokens, head_width=width // tokens, hidden=k * width)
    entry = tokens * 65 * width
    got = sum(p.numel() for p in net.parameters()) - entry
    assert got == 2 * (2 * k * tokens * width**2 + tokens * (k + 1) * width + 4 * width)
    assert got == pytest.approx(2 * k * 2 * tokens * width**2, rel=2e-3)
    assert net.flops() - 2 * tokens * 64 * width == 4 * k * 2 * tokens * width**2


@pytest.mark.parametrize(
    ("tokens", "width", "params", "flops", "of_params", "of_flops"),
    [(*PUBLISHED[0], 2.83, 2.01), (*PUBLISHED[1], 3.31, 2.27)],
)
def test_the_k_that_the_published_sizes_imply(tokens, width, params, flops, of_params, of_flops):
    """k is not published. Parameters (the tokeniser's among them) imply about 3; FLOPs, if they are of
    forward and backward (3 x) on a batch of 512, about 2: no one k gives both."""
    square = 2 * tokens * width**2
    assert params / (2 * square) == pytest.approx(of_params, abs=0.01)
    assert flops / (3 * 512 * 4 * square) == pytest.approx(of_flops, abs=0.01)


def test_weights_start_with_the_spread_of_one_tokens_matrix():
    """Xavier read off a (T, D, kD) tensor is 25 times too small."""
    torch.manual_seed(0)
    linear = PerTokenLinear(32, 48, 144)
    assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / (48 + 144)), rel=0.01)
    assert linear.weight.std(dim=(1, 2)).min().item() > 0.9 * math.sqrt(2 / (48 + 144))
    wrong = nn.init.xavier_normal_(torch.empty(32, 48, 144))
    assert wrong.std().item() < 0.25 * linear.weight.std().item()
    experts = SparseExperts(16, 32, 24, num_experts=4, active_ratio=0.5, coefficient_step=1.02)
    for weight, variance in (
        (experts.up.weight, 2 / (32 + 24)),
        (experts.down.weight, 2 / (32 + 24)),
        (experts.infer_router.weight, 2 / (32 + 4)),
        (experts.train_router.weight, 2 / (32 + 4)),
    ):
        assert weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.04)


def experts(**options):
    torch.manual_seed(0)
    made = SparseExperts(
        **{"num_tokens": 2, "width": 6, "hidden": 4, "num_experts": 3, "active_ratio": 0.5}
        | {"coefficient_step": 1.1}
        | options
    )
    perturb_(made)
    with torch.no_grad():
        made.log_coefficient.fill_(math.log(1e-3))
    return made


ROWS = torch.tensor([True] * 8 + [False] * 8)


def test_inference_reads_the_inference_router_only():
    made = experts().eval()
    s = torch.randn(4, 2, 6)
    before = made(s)
    with torch.no_grad():
        made.train_router.weight.add_(1.0)
    assert torch.equal(made(s), before)
    with torch.no_grad():
        made.infer_router.weight.add_(1.0)
    assert not torch.equal(made(s), before)
    assert made.auxiliary is None


def test_a_training_row_goes_by_one_router_exactly_as_in_inference():
    made = experts()
    s = torch.randn(16, 2, 6)
    out = made(s, ROWS)
    torch.testing.assert_close(out[:8], made(s[:8]))
    with torch.no_grad():
        made.infer_router.weight.copy_(made.train_router.weight)
        made.infer_router.bias.copy_(made.train_router.bias)
    torch.testing.assert_close(out[8:], made(s[8:]))


def test_both_routers_learn_from_the_task_and_only_one_is_penalised():
    made = experts()
    s = torch.randn(16, 2, 6)
    routers = [made.infer_router.weight, made.train_router.weight]
    out = made(s, ROWS)
    task = torch.autograd.grad(out.pow(2).sum(), routers, retain_graph=True)
    assert all(gradient.any() for gradient in task)
    penalty = torch.autograd.grad(made.auxiliary, routers, allow_unused=True)
    assert penalty[0].any()
    assert penalty[1] is None or not penalty[1].any()
    # Every expert learns under the free router, too.
    other = torch.autograd.grad(out[8:].pow(2).sum(), made.up.weight)[0].unflatten(2, (3, 4))
    assert other.abs().sum(dim=(1, 3)).all()


def test_the_penalty_is_lambda_times_the_mean_sum_of_gates():
    made = experts()
    s = torch.randn(16, 2, 6)
    made(s, ROWS)
    gates = made.infer_router(s[:8]).relu()
    torch.testing.assert_close(made.auxiliary, 1e-3 * gates.sum() / 8)


@pytest.mark.parametrize(("bias", "moves"), [(50.0, 1), (-50.0, -1)])
def test_lambda_follows_the_share_of_open_gates(bias, moves):
    made = experts()
    with torch.no_grad():
        made.infer_router.bias.fill_(bias)
    start = made.log_coefficient.item()
    made(torch.randn(16, 2, 6), ROWS)
    assert made.log_coefficient.item() == pytest.approx(start + moves * math.log(1.1), abs=1e-5)
    # Rows of the other router say nothing of it.
    made(torch.randn(16, 2, 6), ~ROWS & False)
    assert made.log_coefficient.item() == pytest.approx(start + moves * math.log(1.1), abs=1e-5)


def test_lambda_stands_still_at_the_target_and_stays_within_bounds():
    made = experts(active_ratio=1.0)
    with torch.no_grad():
        made.infer_router.bias.fill_(50.0)
    start = made.log_coefficient.item()
    made(torch.randn(16, 2, 6), ROWS)
    assert made.log_coefficient.item() == start
    with torch.no_grad():
        made.infer_router.bias.fill_(-50.0)
        made.log_coefficient.fill_(LOG_START)
    made(torch.randn(16, 2, 6), ROWS)
    assert made.log_coefficient.item() == pytest.approx(LOG_START)


def test_closed_experts_change_nothing():
    made = experts().eval()
    with torch.no_grad():
        made.infer_router.bias[:, 1] = -100.0
    s = torch.randn(4, 2, 6)
    before = made(s)
    with torch.no_grad():
        made.up.weight.unflatten(2, (3, 4))[:, :, 1] += 1.0
        made.bias[:, 1] += 1.0
    assert torch.equal(made(s), before)


def test_lambda_is_part_of_the_state():
    net = RankMixerMoE(12, num_tokens=3, head_width=2).train()
    net(torch.randn(32, 12))
    other = RankMixerMoE(12, num_tokens=3, head_width=2)
    other.load_state_dict(net.state_dict())
    assert other.blocks[0].ffn.log_coefficient == net.blocks[0].ffn.log_coefficient != LOG_START


def test_every_row_of_a_batch_takes_one_way_through_all_blocks():
    """Or no row would ever see the whole network as inference does."""
    torch.manual_seed(0)
    net = RankMixerMoE(12, num_layers=3, num_tokens=3, head_width=2).train()
    seen = []
    for block in net.blocks:
        block.ffn.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    net(torch.randn(64, 12))
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert 10 < seen[0].sum() < 54


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_training_holds_the_share_of_open_gates_and_inference_has_learnt(ratio):
    """Public code trains the inference router by its penalty alone: it closes, and inference is blind."""
    torch.manual_seed(0)
    layout = FieldLayout.uniform(4, 4)
    net = RankMixerMoE(
        layout, num_layers=1, num_tokens=4, head_width=4, active_ratio=ratio, coefficient_step=1.05
    )
    head = nn.Linear(16, 1)
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=5e-3)

    def batch(rows):
        x0 = torch.randn(rows, 16)
        return x0, (x0[:, 0] * x0[:, 5] + x0[:, 10] > 0).float()

    shares = []
    router = net.blocks[0].ffn.infer_router
    router.register_forward_hook(lambda module, given, out: shares.append((out > 0).float().mean().item()))
    for _ in range(600):
        x0, clicks = batch(128)
        loss = F.binary_cross_entropy_with_logits(head(net(x0))[:, 0], clicks)
        penalty = auxiliary_loss(net)
        assert penalty is not None
        optimiser.zero_grad()
        (loss + penalty).backward()
        optimiser.step()
    assert sum(shares[-200:]) / 200 == pytest.approx(ratio, abs=0.08)
    net.eval()
    x0, clicks = batch(4096)
    with torch.no_grad():
        s = net.blocks[0].norms[0](mix_tokens(net.tokens(x0)) + net.tokens(x0))
        assert net.blocks[0].ffn(s).abs().mean() > 0.05
        right = ((head(net(x0))[:, 0] > 0).float() == clicks).float().mean()
    assert right > 0.85


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_small_batches_in_training(rows):
    torch.manual_seed(1)
    net = RankMixerMoE(12, num_tokens=3, head_width=2).train()
    out = net(torch.randn(rows, 12))
    assert out.shape == (rows, 6)
    penalty = auxiliary_loss(net)
    (out.sum() + penalty).backward()
    assert penalty.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_a_step_of_at_most_one_is_refused():
    with pytest.raises(ValueError, match="coefficient_step must be above 1"):
        RankMixerMoE(12, coefficient_step=1.0)


def test_all_experts_together_are_as_wide_as_the_plain_network_by_default():
    plain, sparse = RankMixer(64, num_tokens=4, head_width=4), RankMixerMoE(64, num_tokens=4, head_width=4)
    assert plain.blocks[0].ffn.up.weight.shape == sparse.blocks[0].ffn.up.weight.shape == (4, 16, 48)
    wide = RankMixerMoE(64, num_tokens=4, head_width=4, num_experts=2, hidden=5)
    assert wide.blocks[0].ffn.up.weight.shape == (4, 16, 10)
