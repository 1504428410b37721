"""Our modules beside independent public implementations: weights copied over, outputs compared.

Run in the peers' own environment: ``make parity``. Where a peer computes something else than the paper, the test
says what, and compares the rest.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable

import fuxictr.pytorch.layers as fuxictr
import pytest
import torch
import torch_rechub.basic.layers as rechub
import torchrec.modules.crossnet as torchrec
from torch import Tensor, nn

from mldcn import interactions
from mldcn.interactions.autoint import InteractingLayer
from mldcn.interactions.cin import CIN
from mldcn.interactions.fibinet import BilinearInteraction, SqueezeExcitation
from mldcn.interactions.fm import bi_interaction
from mldcn.interactions.pairs import InnerProducts, KernelProducts
from mldcn.layout import FieldLayout

FIELDS, WIDTH = 5, 6
D = FIELDS * WIDTH


def _layers_of_deepctr() -> types.ModuleType:
    """DeepCTR-Torch imports TensorFlow for its callbacks; no layer uses it, so that a stand-in will do."""
    names = [
        "tensorflow",
        "tensorflow.python",
        "tensorflow.python.keras",
        "tensorflow.python.keras.callbacks",
    ]
    stand_in = types.ModuleType(names[-1])
    for wanted in ("CallbackList", "EarlyStopping", "ModelCheckpoint", "History"):
        setattr(stand_in, wanted, type(wanted, (), {}))
    sys.modules |= {name: types.ModuleType(name) for name in names[:-1]} | {names[-1]: stand_in}
    try:
        return importlib.import_module("deepctr_torch.layers.interaction")
    finally:
        for name in names:
            del sys.modules[name]


deepctr = _layers_of_deepctr()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def shaken(module: nn.Module) -> nn.Module:
    """The module in double precision, no parameter at its special start."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            if parameter.is_floating_point():
                parameter.copy_(0.4 * torch.randn_like(parameter))
    return module.eval()


def same(
    ours: nn.Module, theirs: nn.Module | Callable[[Tensor], Tensor], weights: dict[str, Tensor], *shape: int
):
    """Our module, given their weights, computes what theirs does."""
    ours.double().eval().load_state_dict(weights)
    x = torch.randn(7, *shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).reshape(ours(x).shape), rtol=1e-10, atol=1e-10)


def flat(name: str, **options):
    return interactions.build({"name": name, **options}, D)


def layers(**columns) -> dict[str, Tensor]:
    """``{"layers.<l>.<name>": value of layer l}``."""
    return {
        f"layers.{i}.{name.replace('__', '.')}": value.detach()
        for name, values in columns.items()
        for i, value in enumerate(values)
    }


# torchrec ---------------------------------------------------------------------------------------------------


def test_dcnv2_beside_torchrec():
    net = shaken(torchrec.CrossNet(D, 3))
    weights = layers(linear__weight=net.kernels, linear__bias=[b.flatten() for b in net.bias])
    same(flat("dcnv2", num_layers=3), net, weights, D)


def test_dcnv2_low_rank_beside_torchrec():
    net = shaken(torchrec.LowRankCrossNet(D, 3, low_rank=4))
    weights = layers(down__weight=net.V_kernels, up__weight=net.W_kernels, up__bias=net.bias)
    same(flat("dcnv2_lowrank", num_layers=3, rank=4), net, weights, D)
    # Without its mask and its norm ML-DCN is that network.
    same(flat("mldcn", num_layers=3, rank=4, mask="none", norm="none"), net, weights, D)


def test_dcn_beside_torchrec():
    """Its docstring has the bias inside the product with x0; its code, as the paper, outside."""
    net = shaken(torchrec.VectorCrossNet(D, 3))
    weights = layers(linear__weight=[k.T for k in net.kernels], bias=[b.flatten() for b in net.bias])
    same(flat("dcn", num_layers=3), net, weights, D)


def mixture(u, v, c, bias, gate) -> dict[str, Tensor]:
    """Weights of dcn_mix from theirs by layer: u (K, d, r), v (K, r, d), c (K, r, r), bias (d, 1), gate (K, d)."""
    rows = layers(
        down__weight=[each.flatten(0, 1) for each in v],
        up__weight=[each.permute(1, 0, 2).flatten(1) for each in u],
        inner=c,
        bias=[each.flatten() for each in bias],
    )
    return rows | {"gates.0.linear.weight": gate.detach()}


MIX = {"num_layers": 3, "num_experts": 4, "rank": 2, "with_c": True, "share_gate": True}


def test_dcn_mix_beside_torchrec():
    """Eq. 4 with one gate for all layers is all that it can do."""
    net = shaken(torchrec.LowRankMixtureCrossNet(D, 3, num_experts=4, low_rank=2))
    gate = torch.cat([each.weight for each in net.gates])
    weights = mixture(net.U_kernels, net.V_kernels, net.C_kernels, net.bias, gate)
    same(flat("dcn_mix", **MIX, activation="relu"), net, weights, D)


def test_peers_start_experts_with_the_fans_of_the_whole_stack():
    """Theirs: 1 / sqrt((d + K) r / 2), by torch's reading of a 3-D tensor. Ours: the fans of one expert."""
    net = torchrec.LowRankMixtureCrossNet(1000, 1, num_experts=4, low_rank=64)
    ours = interactions.build({"name": "dcn_mix", "num_layers": 1, "num_experts": 4, "rank": 64}, 1000)
    wanted = math.sqrt(2 / (1000 + 64))
    assert ours.layers[0].up.weight.std().item() == pytest.approx(wanted, rel=0.02)
    assert net.U_kernels[0].std().item() < wanted / 5


# FuxiCTR ----------------------------------------------------------------------------------------------------


def test_cross_networks_beside_fuxictr():
    net = shaken(fuxictr.CrossNet(D, 3))
    weights = layers(
        linear__weight=[each.weight.weight for each in net.cross_net],
        bias=[each.bias for each in net.cross_net],
    )
    same(flat("dcn", num_layers=3), net, weights, D)
    net = shaken(fuxictr.CrossNetV2(D, 3))
    weights = layers(
        linear__weight=[each.weight for each in net.cross_layers],
        linear__bias=[each.bias for each in net.cross_layers],
    )
    same(flat("dcnv2", num_layers=3), net, weights, D)


def test_dcn_mix_beside_fuxictr_and_a_batch_of_one():
    net = shaken(fuxictr.CrossNetMix(D, layer_num=3, low_rank=2, num_experts=4))
    gate = torch.cat([each.weight for each in net.gating])
    weights = mixture(net.U_list, [v.mT for v in net.V_list], net.C_list, net.bias, gate)
    ours = flat("dcn_mix", **MIX, activation="tanh")
    same(ours, net, weights, D)
    one = torch.randn(1, D, dtype=torch.float64)
    assert net(one).shape == (D,)  # a bare squeeze() at its end
    assert ours(one).shape == (1, D)


def test_products_beside_fuxictr():
    tokens = torch.randn(7, FIELDS, WIDTH, dtype=torch.float64)
    for kind, ours in (
        ("bi_interaction", bi_interaction),
        ("inner_product", InnerProducts(FIELDS, WIDTH)),
        ("product_sum", lambda x: bi_interaction(x).sum(dim=1, keepdim=True)),
    ):
        # Factorisation machines are computed in single precision here on purpose.
        theirs = fuxictr.InnerProductInteraction(FIELDS, output=kind)(tokens)
        torch.testing.assert_close(ours(tokens).double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["all", "each", "interaction"])
@pytest.mark.parametrize("version", ["BilinearInteraction", "BilinearInteractionV2"])
def test_bilinear_interaction_beside_fuxictr(kind, version):
    net = shaken(getattr(fuxictr, version)(FIELDS, WIDTH, f"field_{kind}"))
    ours = BilinearInteraction(FIELDS, WIDTH, kind)
    weight = net.bilinear_W.detach()
    if kind == "each":
        weight = weight[:-1]  # the last field is never on the left
    same(ours, net, {"weight": weight.reshape(ours.weight.shape)}, FIELDS, WIDTH)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_squeeze_excitation_beside_fuxictr(activation):
    net = shaken(fuxictr.SqueezeExcitation(FIELDS, 2, activation))
    weights = {
        "squeeze.weight": net.excitation[0].weight.detach(),
        "excite.weight": net.excitation[2].weight.detach(),
    }
    same(SqueezeExcitation(FIELDS, 2, activation), net, weights, FIELDS, WIDTH)


def test_cin_beside_fuxictr():
    """Its linear map on the pooled maps is the head's here, and its biases are none of the paper's."""
    net = shaken(fuxictr.CompressedInteractionNet(FIELDS, [4, 3]))
    convolutions = list(net.cin_layer.values())
    for each in convolutions:
        nn.init.zeros_(each.bias)
    net.fc = nn.Identity()
    same(
        CIN(FIELDS, WIDTH, (4, 3), False, "identity"),
        net,
        cin_weights(convolutions, by_x0=True),
        FIELDS,
        WIDTH,
    )


def cin_weights(convolutions, *, by_x0: bool) -> dict[str, Tensor]:
    """Ours have the previous map outside, the field of x0 inside; a peer may have them the other way."""
    found = {}
    for i, each in enumerate(convolutions):
        maps = each.weight.detach().squeeze(2)
        if by_x0:
            maps = maps.unflatten(1, (FIELDS, -1)).transpose(1, 2).flatten(1)
        found[f"weights.{i}"] = maps
    return found


# DeepCTR-Torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_cross_networks_beside_deepctr(kind):
    net = shaken(deepctr.CrossNet(D, 3, kind))
    biases = [b.flatten() for b in net.bias]
    if kind == "vector":
        same(
            flat("dcn", num_layers=3), net, layers(linear__weight=[k.T for k in net.kernels], bias=biases), D
        )
    else:
        same(flat("dcnv2", num_layers=3), net, layers(linear__weight=net.kernels, linear__bias=biases), D)


@pytest.mark.parametrize("split_half", [False, True])
def test_cin_beside_deepctr(split_half):
    net = shaken(deepctr.CIN(FIELDS, (4, 3), "relu", split_half))
    for each in net.conv1ds:
        nn.init.zeros_(each.bias)
    same(
        CIN(FIELDS, WIDTH, (4, 3), split_half, "relu"),
        net,
        cin_weights(net.conv1ds, by_x0=False),
        FIELDS,
        WIDTH,
    )


@pytest.mark.parametrize("kernel", ["mat", "vec", "num"])
def test_outer_products_beside_deepctr(kernel):
    net = shaken(deepctr.OutterProductLayer(FIELDS, WIDTH, kernel))
    ours = KernelProducts(FIELDS, WIDTH, kernel)
    weight = net.kernel.detach()
    if kernel == "mat":
        weight = weight.permute(1, 2, 0)  # theirs is (e out, pair, e in)
    x = torch.randn(7, FIELDS, WIDTH, dtype=torch.float64)
    ours.double().load_state_dict({"weight": weight.reshape(ours.weight.shape)})
    with torch.no_grad():
        theirs = net([x[:, i : i + 1].clone() for i in range(FIELDS)])
        torch.testing.assert_close(ours(x), theirs)


def test_attention_beside_deepctr():
    """Its heads share the embedding's width among them."""
    net = shaken(deepctr.InteractingLayer(WIDTH, head_num=2))
    weights = {
        "query.weight": net.W_Query.T,
        "key.weight": net.W_key.T,
        "value.weight": net.W_Value.T,
        "residual.weight": net.W_Res.T,
    }
    weights = {name: value.detach() for name, value in weights.items()}
    same(InteractingLayer(FIELDS, WIDTH, 2, WIDTH // 2, True), net, weights, FIELDS, WIDTH)


def test_factorisation_beside_deepctr():
    tokens = torch.randn(7, FIELDS, WIDTH)
    torch.testing.assert_close(bi_interaction(tokens).sum(dim=1, keepdim=True), deepctr.FM()(tokens))
    torch.testing.assert_close(bi_interaction(tokens).unsqueeze(1), deepctr.BiInteractionPooling()(tokens))


# torch-rechub -----------------------------------------------------------------------------------------------


def test_dcn_beside_torch_rechub():
    net = shaken(rechub.CrossNetwork(D, 3))
    same(flat("dcn", num_layers=3), net, layers(linear__weight=[w.weight for w in net.w], bias=net.b), D)


def test_dcnv2_beside_torch_rechub():
    """Its bias stands outside the product with x0, which is DCN V2's Eq. 1 only where the bias is zero."""
    net = shaken(rechub.CrossNetV2(D, 3))
    ours = flat("dcnv2", num_layers=3)
    weights = layers(linear__weight=[w.weight for w in net.w], linear__bias=net.b)
    ours.double().load_state_dict(weights)
    x = torch.randn(7, D, dtype=torch.float64)
    assert not torch.allclose(ours(x), net(x))
    for bias in net.b:
        nn.init.zeros_(bias)
    same(ours, net, layers(linear__weight=[w.weight for w in net.w], linear__bias=net.b), D)


def test_attention_beside_torch_rechub():
    """It divides scores by the root of a head's width; the paper does not."""
    net = shaken(rechub.InteractingLayer(WIDTH, num_heads=2))
    weights = {
        "query.weight": net.W_Q.weight * net.scale,
        "key.weight": net.W_K.weight,
        "value.weight": net.W_V.weight,
        "residual.weight": net.W_Res.weight,
    }
    weights = {name: value.detach() for name, value in weights.items()}
    same(InteractingLayer(FIELDS, WIDTH, 2, WIDTH // 2, True), net, weights, FIELDS, WIDTH)


def test_squeeze_excitation_and_bilinear_beside_torch_rechub():
    net = shaken(rechub.SENETLayer(FIELDS, 2))
    weights = {"squeeze.weight": net.mlp[0].weight.detach(), "excite.weight": net.mlp[2].weight.detach()}
    same(SqueezeExcitation(FIELDS, 2, "relu"), net, weights, FIELDS, WIDTH)
    net = shaken(rechub.BiLinearInteractionLayer(WIDTH, FIELDS, "field_interaction"))
    ours = BilinearInteraction(FIELDS, WIDTH, "interaction")
    weight = torch.stack([each.weight.detach().T for each in net.bilinear_layer])
    same(ours, net, {"weight": weight}, FIELDS, WIDTH)


def test_a_layout_of_equal_fields_needs_no_projection():
    """So that the comparisons above hold for whole architectures, too."""
    assert (
        interactions.build({"name": "deepfm", "hidden": []}, FieldLayout.uniform(FIELDS, WIDTH)).flops() == 0
    )
