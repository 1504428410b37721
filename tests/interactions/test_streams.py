"""FinalMLP, DHEN and mixtures of experts: what no other architecture has."""

import numpy as np
import pytest
import torch
from families.case import LAYOUT, D, inputs, perturb_
from families.streams import CONTEXTS, LOW, MASKED, REFERENCES

from mldcn import interactions
from mldcn.cost.flops import module_flops
from mldcn.errors import UserError
from mldcn.interactions import DHEN, DNN, MLDCN, DeepFwFM, FinalMLP, FwFM, MMoE, MoE, auxiliary_loss
from mldcn.interactions.finalmlp import BilinearFusion
from mldcn.interactions.moe import NoisyTopKGates
from mldcn.layout import FieldLayout, FirstOrder, SecondEmbedding

# Streams have losses of their own, which only a model can give them.
NESTED = [name for name in interactions.names() if not interactions.build({"name": name}, 16).streams]

# FinalMLP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONTEXTS, ids=lambda case: case.id)
def test_gates_read_the_context_they_are_given(case):
    module = case.build().eval()
    (x0,) = inputs(module)
    parameters = {key: value.numpy() for key, value in module.state_dict().items()}
    expected = [REFERENCES["finalmlp"](parameters, row, LAYOUT.widths, **case.options) for row in x0.numpy()]
    np.testing.assert_allclose(module(x0).detach().numpy(), expected, rtol=1e-10)
    assert sum(p.numel() for p in module.parameters()) == case.params
    assert module.flops() == case.flops == module_flops(module, x0)


def test_a_fresh_constant_gate_passes_everything():
    torch.manual_seed(0)
    gated = FinalMLP(D, hidden1=(4,), hidden2=(3,))
    plain = FinalMLP(D, hidden1=(4,), hidden2=(3,), selection=False)
    missing = plain.load_state_dict(gated.state_dict(), strict=False)
    assert missing.missing_keys == []
    x0 = torch.randn(5, D)
    assert torch.equal(gated(x0), plain(x0))


def test_the_fusion_by_hand():
    """Two heads of o1 = (1, 2, 3, 4) and o2 = (5, 6): 2 W1 5 + 2 W2 6 and the linear terms."""
    fusion = BilinearFusion(4, 2, 1, 2)
    with torch.no_grad():
        fusion.linear1.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
        fusion.linear2.weight.copy_(torch.tensor([[0.0, 10.0]]))
        fusion.linear1.bias.fill_(0.5)
        fusion.weights[0].copy_(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
    y = fusion(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[5.0, 6.0]]))
    assert y.item() == 0.5 + 1 + 4 + 60 + (1 * 1 + 2 * 2) * 5 + (3 * 3 + 4 * 4) * 6


@pytest.mark.parametrize("heads", [1, 8])
def test_a_fresh_fusion_is_of_the_streams_scale(heads):
    torch.manual_seed(0)
    fusion = BilinearFusion(128, 96, 4, heads)
    products = 128 * 96 / heads
    assert fusion.weights[0].std().item() == pytest.approx((2 / (products + 4)) ** 0.5, rel=0.05)
    y = fusion(torch.randn(4000, 128), torch.randn(4000, 96))
    assert 1 < y.std().item() < 2.5


def test_more_heads_are_cheaper_by_their_number():
    one, eight = (BilinearFusion(64, 32, 1, heads).flops() for heads in (1, 8))
    assert one == 2 * (64 * 32 + 96)
    assert eight == 2 * (64 * 32 / 8 + 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context1": ["source:userr"]}, "did you mean 'source:user'"),
        ({"context2": ["gender"]}, "no field 'gender'; .*genre"),
        ({"context1": ["source:context"]}, "no field is of the source 'context'"),
        ({"hidden2": []}, "need a layer"),
        ({"num_heads": 9, "hidden1": [8], "hidden2": [16]}, "num_heads 9 is more than the 8 columns"),
        ({"selection": False, "context1": ["age"]}, "selection: false has none"),
    ],
)
def test_finalmlp_refuses(options, message):
    with pytest.raises(UserError, match=message):
        interactions.build({"name": "finalmlp", **options}, LAYOUT)


# Mixtures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moe", "mmoe"])
def test_one_expert_is_the_plain_model(name):
    """The first row of the ML-DCN paper's Table 5, sizes included."""
    torch.manual_seed(0)
    plain = MLDCN(LAYOUT, rank=2, num_layers=2)
    perturb_(plain)
    mixed = interactions.build({"name": name, "expert": MASKED, "num_experts": 1}, LAYOUT)
    mixed.mixture.experts[0].load_state_dict(plain.state_dict())
    assert mixed.flops() == plain.flops()
    assert sum(p.numel() for p in mixed.parameters()) == sum(p.numel() for p in plain.parameters())
    x0 = torch.randn(4, D)
    assert torch.equal(mixed(x0), plain(x0))


def test_the_experts_of_table_5_cost_their_number():
    """Up to three experts of 4 layers, rank 4,096 and mask ratio 0.5; the gates add 2 d n."""
    expert = {"name": "mldcn", "num_layers": 4, "rank": 4096, "mask_ratio": 0.5}
    with torch.device("meta"):
        sizes = [MMoE(4096, expert=expert, num_experts=n, num_tasks=1).flops() for n in (1, 2, 3)]
    assert sizes == [n * 402_653_184 + (2 * 4096 * n if n > 1 else 0) for n in (1, 2, 3)]


def test_experts_start_differently():
    torch.manual_seed(0)
    experts = MoE(D, expert="dnn").mixture.experts
    x0 = torch.randn(3, D)
    first, second, third = (expert(x0) for expert in experts)
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


def test_experts_that_start_as_the_identity_drift_apart():
    """A fresh ML-DCN is the identity, so the gates' first gradients are zero; later ones are not."""
    torch.manual_seed(0)
    module = MoE(D, expert=MASKED, num_experts=2)
    start = module.mixture.gates.linear.weight.detach().clone()
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    x0 = torch.randn(64, D)
    for _ in range(3):
        optimiser.zero_grad()
        module(x0).pow(2).sum().backward()
        optimiser.step()
    one, two = (expert(x0) for expert in module.mixture.experts)
    assert (one - two).abs().max() > 1e-3
    assert (module.mixture.gates.linear.weight != start).any()


def test_a_task_has_gates_of_its_own_and_shares_the_experts():
    torch.manual_seed(0)
    module = MMoE(D, expert="dnn", num_experts=2, num_tasks=2)
    with torch.no_grad():
        module.mixture.gates.linear.weight.copy_(torch.zeros(4, D))
        module.mixture.gates.linear.weight[0] = 1e3
        module.mixture.gates.linear.weight[3] = 1e3
    x0 = torch.rand(3, D) + 0.1
    first, second = module.mixture.experts
    torch.testing.assert_close(module(x0), torch.stack([first(x0), second(x0)], dim=1))


def test_width_turns_the_experts_own_knob():
    x0 = torch.randn(2, D)
    masked = MoE(D, expert=MASKED, width=5, num_experts=2)
    assert [expert.layers[0].down.out_features for expert in masked.mixture.experts] == [5, 5]
    deep = MoE(D, expert={"name": "dnn", "hidden": [8, 4]}, width=16)
    assert deep.mixture.experts[0].mlp.widths == (D, 16, 8)
    nested = MoE(D, expert={"name": "moe", "expert": LOW, "num_experts": 2}, width=7, num_experts=2)
    assert nested(x0).shape == (2, D)
    assert nested.mixture.experts[0].mixture.experts[0].layers[0].down.out_features == 7
    with pytest.raises(ValueError, match="lr has no width to turn"):
        MoE(D, expert="lr", width=3)


def test_experts_get_their_side_inputs():
    module = MoE(LAYOUT, expert={"name": "fm", "token_width": 2}, num_experts=2)
    assert module.sides == (FirstOrder(),)
    x0, first = inputs(module, LAYOUT, dtype=torch.float32)
    one, two = (expert(x0, first) for expert in module.mixture.experts)
    gate = module.mixture.gates(x0)[:, 0]
    torch.testing.assert_close(module(x0, first), gate[:, :1] * one + gate[:, 1:] * two)


@pytest.mark.parametrize("training", [False, True])
def test_top_k_gates_keep_k_and_sum_to_one(training):
    torch.manual_seed(0)
    gates = NoisyTopKGates(6, 2, 5, 3, 0.1).train(training)
    perturb_(gates)
    found = gates(torch.randn(40, 6))
    assert ((found > 0).sum(dim=2) == 3).all()
    torch.testing.assert_close(found.sum(dim=2), torch.ones(40, 2))
    assert (gates.auxiliary is None) is not training


def test_top_k_losses_are_those_of_the_paper(monkeypatch):
    """Importance and load, row by row and expert by expert, with known noise."""
    torch.manual_seed(0)
    gates = NoisyTopKGates(4, 1, 4, 2, 0.5).double().train()
    perturb_(gates)
    x = torch.randn(7, 4, dtype=torch.float64)
    noise = torch.randn(7, 1, 4, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    found = gates(x).detach().numpy()[:, 0]
    clean = (x @ gates.linear.weight.T).detach().numpy()
    spread = np.log1p(np.exp((x @ gates.noise.weight.T).detach().numpy()))
    scores = clean + noise.numpy()[:, 0] * spread
    load = np.zeros(4)
    for row in range(7):
        for i in range(4):
            others = np.sort(np.delete(scores[row], i))
            z = (clean[row, i] - others[-2]) / spread[row, i]
            load[i] += 0.5 * (1 + torch.erf(torch.tensor(z / np.sqrt(2.0))).item())
    importance = found.sum(axis=0)
    expected = 0.5 * sum(total.var() / total.mean() ** 2 for total in (importance, load))
    assert gates.auxiliary.item() == pytest.approx(expected, rel=1e-8)


def test_balance_makes_the_gates_even():
    torch.manual_seed(0)
    gates = NoisyTopKGates(4, 1, 6, 2, 1.0)
    torch.nn.init.normal_(gates.linear.weight)
    x = torch.randn(256, 4) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    optimiser = torch.optim.Adam(gates.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        gates(x)
        loss = auxiliary_loss(gates)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.2 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": "mldnc"}, r"moe: expert: no architecture is called 'mldnc'; did you mean 'mldcn'"),
        ({"expert": {"name": "mldcn", "rnak": 3}}, "expert.*mldcn: rnak: no such key; did you mean 'rank'"),
        ({"expert": {"rank": 3}}, "expert: .*a name is needed"),
        ({"expert": 3}, "expert: expected an architecture's name"),
        ({"expert": {"name": "mmoe", "num_tasks": 2}}, "mmoe: only the outermost .* num_tasks"),
        ({"expert": {"name": "mldcn", "norm": "post"}}, "mldcn: norm_gain 0 with norm post"),
        ({"expert": "dcnv3"}, "dcnv3: only the outermost architecture's streams"),
        ({"top_k": 3}, "top_k 3 leaves out none of 3 experts"),
        ({"top_k": 1}, "top_k: .*greater than or equal to 2"),
    ],
)
def test_mixtures_refuse(options, message):
    with pytest.raises(UserError, match=message):
        interactions.build({"name": "moe", **options}, LAYOUT)


def test_the_config_spells_out_the_experts_defaults():
    config = interactions.parse({"name": "mmoe"})
    assert config.expert == interactions.parse({"name": "mldcn"}).model_dump(mode="json")
    assert interactions.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", NESTED)
def test_every_architecture_can_be_an_expert(name):
    layout = FieldLayout.uniform(4, 4)
    torch.manual_seed(0)
    module = interactions.build({"name": "mmoe", "expert": name, "num_experts": 2, "num_tasks": 2}, layout)
    module.eval()
    given = inputs(module, layout, dtype=torch.float32)
    assert module(*given).shape == (5, 2, module.out_features)
    single = interactions.build({"name": name}, layout)
    assert module.flops() == 2 * single.flops() + 2 * 2 * 2 * 16


# DHEN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NESTED)
def test_every_architecture_can_stand_in_the_first_layer(name):
    layout = FieldLayout.uniform(4, 4)
    torch.manual_seed(0)
    module = DHEN(layout, layers=[[name, "dcnv2"], ["dnn"]]).eval()
    given = inputs(module, layout, dtype=torch.float32)
    assert module(*given).shape == (5, 16)
    assert module.flops() == module_flops(module, *given)


def test_a_layer_by_hand():
    """One token of two numbers: LN(f(x) + x) with f = 0 is LN(x), here (-1, 1)."""
    module = DHEN(2, layers=[[{"name": "dnn", "hidden": [2]}]])
    with torch.no_grad():
        module.layers[0].parts[0].mlp.net[0].weight.zero_()
    torch.testing.assert_close(module(torch.tensor([[3.0, 9.0]])), torch.tensor([[-1.0, 1.0]]))


def test_outputs_of_the_right_width_are_not_mapped():
    layers = [["dcnv2", {"name": "dnn", "hidden": [16]}, {"name": "dnn", "hidden": [15]}]]
    assert list(DHEN(FieldLayout.uniform(4, 4), layers=layers).layers[0].maps) == ["2"]


def test_width_turns_every_modules_own_knob():
    layers = [["masknet_parallel", {"name": "dnn", "hidden": [8, 4]}], ["dcnv2"]]
    module = DHEN(FieldLayout.uniform(3, 4), layers=layers, width=6)
    masks, deep = module.layers[0].parts
    assert masks.blocks[0].hidden.out_features == 6
    assert deep.mlp.widths == (12, 6, 3)
    assert module.layers[1].parts[0].out_features == 6


def test_concatenated_modules_make_more_tokens():
    module = DHEN(FieldLayout.uniform(3, 4), layers=[["dnn", "dcnv2"], ["dcnv2"]], ensemble="concat")
    assert [layer.num_tokens for layer in module.layers] == [6, 3]
    assert module.layers[1].parts[0].in_features == 24
    assert module.out_features == 12


def test_side_inputs_reach_the_modules_that_read_them():
    layers = [["dnn", {"name": "fm"}, {"name": "deepfm", "hidden": [3]}], ["dcnv2"]]
    module = DHEN(LAYOUT, layers=layers)
    assert module.sides == (FirstOrder(),)
    assert module.layers[0].reads == [[], [0], [0]]
    given = [each.requires_grad_() for each in inputs(module, dtype=torch.float32)]
    module(*given).pow(2).sum().backward()
    assert all(each.grad.any() for each in given)


def test_side_inputs_are_refused_where_they_do_not_fit():
    with pytest.raises(UserError, match=r"dhen: layers.1: a module reads FirstOrder of x0's fields"):
        interactions.build({"name": "dhen", "layers": [["dnn"], ["fm"]]}, LAYOUT)
    doubled = [
        name
        for name in interactions.names()
        if SecondEmbedding() in interactions.build({"name": name}, FieldLayout.uniform(4, 4)).sides
    ]
    for name in doubled:
        interactions.build({"name": "dhen", "layers": [[name]]}, FieldLayout.uniform(4, 4))
        with pytest.raises(UserError, match="SecondEmbedding, as wide as x0, and its tokens are projected"):
            interactions.build({"name": "dhen", "layers": [[name]]}, LAYOUT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "layers: .*at least 1 item"),
        ({"layers": [["dnn"], []]}, "layers.1: .*at least 1 item"),
        (
            {"layers": [["dnn", "dcnv22"]]},
            "layers.0.1: no architecture is called 'dcnv22'; did you mean 'dcnv2'",
        ),
        (
            {"layers": [[{"name": "dnn", "hiden": [3]}]]},
            r"layers.0.0 \(dnn\): dnn: hiden: no such key; did you mean 'hidden'",
        ),
        ({"layers": "dnn"}, "layers: "),
        ({"layers": [[{"name": "mmoe", "num_tasks": 2}]]}, "layers.0: mmoe: only the outermost"),
        ({"layers": [["dnn", "lr"]], "width": 4}, "layers.0: lr has no width to turn"),
        ({"ensemble": "mean"}, "ensemble: .*'sum', 'weighted' or 'concat'"),
    ],
)
def test_dhen_refuses(options, message):
    with pytest.raises(UserError, match=message):
        interactions.build({"name": "dhen", **options}, LAYOUT)


def test_dhen_spells_out_its_modules():
    config = interactions.parse({"name": "dhen", "layers": [["dnn"], [{"name": "dcnv2", "num_layers": 1}]]})
    assert config.layers[0][0] == interactions.parse({"name": "dnn"}).model_dump(mode="json")
    assert config.layers[1][0]["num_layers"] == 1
    assert interactions.parse(config.model_dump(mode="json")) == config


# DeepLight ---------------------------------------------------------------------------------------------------


def test_deeplight_is_its_two_parts():
    torch.manual_seed(0)
    module = DeepFwFM(LAYOUT, hidden=(4,))
    fwfm, dnn = FwFM(LAYOUT), DNN(LAYOUT, hidden=(4,))
    fwfm.load_state_dict(module.fwfm.state_dict())
    dnn.mlp.load_state_dict(module.mlp.state_dict())
    x0 = torch.randn(3, D)
    assert torch.equal(module(x0), torch.cat([fwfm(x0), dnn(x0)], dim=1))
    assert module.flops() == fwfm.flops() + dnn.flops()
