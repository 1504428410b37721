"""xDeepFM's CIN: by hand, its kinship with DCN-V2, what it keeps for the backward pass, the papers' sizes."""

import math

import pytest
import torch

from mldcn.interactions import DCNV2, DNN, XDeepFM
from mldcn.interactions.cin import CIN
from mldcn.layout import FieldLayout

TOKENS = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])


def test_two_layers_by_hand():
    """Ones: X^1 = (1 + 3)^2, (2 + 4)^2 and X^2 = X^1 * (4, 6), summed over the coordinates."""
    cin = CIN(2, 2, [1, 1])
    for weight in cin.weights:
        torch.nn.init.ones_(weight)
    assert cin(TOKENS).tolist() == [[16 + 36, 64 + 216]]


def test_a_weight_a_pair_in_its_place():
    """One map for each pair (i of the layer before, j of x0)."""
    cin = CIN(2, 2, [4])
    cin.weights[0].data = torch.eye(4)
    assert cin(TOKENS).tolist() == [[1 + 4, 3 + 8, 3 + 8, 9 + 16]]


def test_halves_go_on_or_out():
    """Of four maps two go on and two out; of three, two go on and one out."""
    cin = CIN(2, 2, [4, 3, 2], split_half=True)
    assert [tuple(weight.shape) for weight in cin.weights] == [(4, 4), (3, 4), (2, 4)]
    assert cin.out_features == 2 + 1 + 2
    cin.weights[0].data = torch.eye(4)
    before = cin(TOKENS)
    assert before[0, :2].tolist() == [11, 25]
    cin.weights[0].data[2:] = 0  # the half that goes out
    assert torch.equal(cin(TOKENS)[:, 2:], before[:, 2:])
    cin.weights[0].data[:2] = 0  # and the one that goes on
    assert cin(TOKENS)[:, 2:].eq(0).all()


def test_halves_of_one_map():
    cin = CIN(2, 2, [1, 1], split_half=True)
    assert cin.out_features == 1
    assert cin(TOKENS).shape == (1, 1)


def test_the_last_layer_is_not_split():
    torch.manual_seed(0)
    whole, halves = CIN(3, 4, [5]), CIN(3, 4, [5], split_half=True)
    halves.load_state_dict(whole.state_dict())
    tokens = torch.randn(6, 3, 4)
    assert torch.equal(whole(tokens), halves(tokens))


def test_a_first_layers_map_is_a_dcnv2_layer_with_a_number_a_block():
    """DCN V2, Section 4.2: W_ij = w_ij I, without the residual, summed over the fields."""
    torch.manual_seed(0)
    cin = CIN(4, 3, [1]).double()
    cross = DCNV2(12, num_layers=1).double()
    cross.layers[0].linear.weight.data = torch.kron(
        cin.weights[0].data.view(4, 4), torch.eye(3, dtype=torch.float64)
    )
    x0 = torch.randn(5, 12, dtype=torch.float64)
    expected = (cross(x0) - x0).sum(dim=1, keepdim=True)
    torch.testing.assert_close(cin(x0.view(5, 4, 3)), expected)


def test_activation():
    cin = CIN(2, 2, [1], activation="relu")
    torch.nn.init.constant_(cin.weights[0], -1.0)
    assert cin(TOKENS).tolist() == [[0]]


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_training_recomputes_to_the_same_gradients(activation):
    torch.manual_seed(0)
    cin = CIN(5, 13, [6, 4], activation=activation).double()
    found = []
    for training in (True, False):
        tokens = torch.randn(7, 5, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        tokens.requires_grad_()
        cin.train(training).zero_grad()
        cin(tokens).square().sum().backward()
        found.append([tokens.grad, *(weight.grad.clone() for weight in cin.weights)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_no_products_are_kept_for_the_backward_pass():
    """Of a layer's (B, e, H F) products nothing is kept in training; x0, the maps and the weights are."""
    fields, width, maps, rows = 10, 16, 20, 64
    cin = CIN(fields, width, [maps, maps])
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = cin(torch.randn(rows, fields, width, requires_grad=True))
    products = rows * width * fields * (fields + maps)
    assert sum(kept.values()) < products / 5
    out.sum().backward()
    assert all(weight.grad.any() for weight in cin.weights)


def test_initial_spreads():
    torch.manual_seed(0)
    cin = CIN(26, 4, [100, 100])
    assert cin.weights[0].std().item() == pytest.approx(math.sqrt(2 / (26 * 26 + 100)), rel=0.02)
    assert cin.weights[1].std().item() == pytest.approx(math.sqrt(2 / (100 * 26 + 100)), rel=0.02)


def test_without_a_dnn_only_the_cin_and_the_first_order_are_left():
    net = XDeepFM(FieldLayout.uniform(2, 2), cin_layers=(4,), hidden=())
    net.cin.weights[0].data = torch.eye(4)
    assert net(TOKENS.flatten(1), torch.tensor([[0.5, 2.0]])).tolist() == [[2.5, 5, 11, 11, 25]]


def test_sizes_in_dcnv2_table_6():
    """Criteo, l = 2, n = 100, a DNN of (3, 1024): printed 3.7M parameters and 32M FLOPs.

    The FLOPs come out with a CIN on the 26 categorical features, computed directly, and a DNN on all 1,027
    inputs. No reading gives both figures: so read there are 3.48M parameters, and the 3.70M of a CIN on 39
    features come with 48.6M FLOPs.
    """
    with torch.device("meta"):
        dnn = DNN(1027, hidden=(1024,) * 3)
        some, every = CIN(26, 39, [100, 100]), CIN(39, 39, [100, 100])
    sizes = []
    for cin in (some, every):
        head = cin.out_features + dnn.out_features
        parameters = sum(p.numel() for part in (cin, dnn) for p in part.parameters()) + head + 1
        sizes.append((parameters / 1e6, (cin.flops() + dnn.flops() + 2 * head) / 1e6))
    assert sizes[0] == pytest.approx((3.481, 31.85), rel=1e-3)
    assert sizes[1] == pytest.approx((3.695, 48.58), rel=1e-3)
    assert sizes[0][1] == pytest.approx(32, rel=0.01)
    assert sizes[1][0] == pytest.approx(3.7, rel=0.01)
