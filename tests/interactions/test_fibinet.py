"""FiBiNET: by hand, what each kind of bilinear product shares, fields lost under ReLU."""

import math

import pytest
import torch

from mldcn.interactions import FM, FiBiNET
from mldcn.interactions.fibinet import BilinearInteraction, SqueezeExcitation
from mldcn.layout import FieldLayout

TOKENS = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
SWAP = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
EYE = torch.eye(2)


def test_squeeze_and_excitation_by_hand():
    """Means 1.5, 3.5, 5.5; W1 sums them to 10.5; W2 gives each field a multiple of that."""
    senet = SqueezeExcitation(3, 3, "relu")
    senet.squeeze.weight.data = torch.ones(1, 3)
    senet.excite.weight.data = torch.tensor([[1.0], [-1.0], [2.0]])
    assert senet(TOKENS).tolist() == [[[10.5, 21], [0, 0], [105, 126]]]


def test_sigmoid_weights_are_between_0_and_1():
    senet = SqueezeExcitation(3, 3, "sigmoid")
    senet.excite.weight.data.zero_()
    assert torch.equal(senet(TOKENS), TOKENS / 2)


@pytest.mark.parametrize(
    ("fields", "ratio", "width"), [(39, 3, 13), (4, 3, 1), (2, 3, 1), (1, 3, 1), (5, 2, 2)]
)
def test_width_of_the_squeezed_layer(fields, ratio, width):
    assert SqueezeExcitation(fields, ratio, "relu").squeeze.out_features == width


@pytest.mark.parametrize(
    ("kind", "matrices", "expected"),
    [
        # Pairs (0, 1), (0, 2), (1, 2): (2 1)*(3 4), (2 1)*(5 6), (4 3)*(5 6) under SWAP.
        ("all", [SWAP], [6, 4, 10, 6, 20, 18]),
        ("each", [EYE, SWAP], [3, 8, 5, 12, 20, 18]),
        ("interaction", [EYE, SWAP, EYE], [3, 8, 10, 6, 15, 24]),
    ],
)
def test_bilinear_products_by_hand(kind, matrices, expected):
    products = BilinearInteraction(3, 2, kind)
    assert len(products.weight) == len(matrices)
    products.weight.data = torch.stack(matrices)
    assert products(TOKENS).tolist() == [expected]


@pytest.mark.parametrize("kind", ["all", "each", "interaction"])
def test_with_matrices_of_one_the_products_sum_to_fm(kind):
    tokens = torch.randn(6, 5, 3, dtype=torch.float64)
    products = BilinearInteraction(5, 3, kind).double()
    products.weight.data = torch.eye(3).double().expand(products.weight.shape)
    expected = FM(FieldLayout.uniform(5, 3), first_order="none")(tokens.flatten(1))
    torch.testing.assert_close(products(tokens).sum(dim=1, keepdim=True), expected)


def test_a_lone_field_is_paired_with_itself():
    products = BilinearInteraction(1, 2, "each")
    products.weight.data = SWAP.unsqueeze(0)
    assert products(TOKENS[:, :1]).tolist() == [[2, 2]]


def test_plain_and_weighed_fields_have_matrices_of_their_own():
    net = FiBiNET(FieldLayout.uniform(3, 2), bilinear="all", excitation="sigmoid", hidden=())
    net.bilinear.weight.data = EYE.unsqueeze(0)
    net.bilinear_senet.weight.data = SWAP.unsqueeze(0)
    net.senet.excite.weight.data.zero_()
    expected = [1.5, 3, 8, 5, 12, 15, 24, *(each / 4 for each in (6, 4, 10, 6, 20, 18))]
    assert net(TOKENS.flatten(1), torch.tensor([[1.0, 0.5, 0.0]])).tolist() == [expected]


def test_the_dnn_reads_f_f_minus_1_e_numbers():
    with torch.device("meta"):
        assert FiBiNET(FieldLayout.uniform(39, 16)).mlp.widths[0] == 39 * 38 * 16 == 23_712


def test_under_relu_a_field_can_be_lost_and_sigmoid_keeps_it():
    for excitation, kept in (("relu", False), ("sigmoid", True)):
        senet = SqueezeExcitation(3, 3, excitation)
        senet.squeeze.weight.data.fill_(1.0)
        senet.excite.weight.data.fill_(-1.0)
        senet(TOKENS).sum().backward()
        assert bool(senet.excite.weight.grad.any()) == kept


@pytest.mark.parametrize("kind", ["all", "each", "interaction"])
def test_matrices_start_with_the_fans_of_one(kind):
    torch.manual_seed(0)
    weight = BilinearInteraction(20, 32, kind).weight
    assert weight.std().item() == pytest.approx(math.sqrt(1 / 32), rel=0.05)


def test_weights_of_senet_start_as_xavier():
    torch.manual_seed(0)
    senet = SqueezeExcitation(300, 3, "relu")
    for linear in (senet.squeeze, senet.excite):
        assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
