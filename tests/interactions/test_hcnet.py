"""MemoNet's HCNet: by hand, whose combinations a field sums, weights, orders, kinds of fields."""

import math

import pytest
import torch
from families.case import perturb_

from mldcn.interactions import HCNet
from mldcn.interactions.hcnet import CrossMemory
from mldcn.layout import CrossedIds, FieldLayout

MIXED = FieldLayout.build(
    [
        ("a", "categorical", "user", 2),
        ("n", "numeric", "user", 1),
        ("b", "categorical", "item", 3),
        ("m", "multi", "item", 2),
        ("c", "categorical", "item", 2),
    ]
)


def test_a_field_sums_the_combinations_that_it_is_in():
    """Pairs ab, ac, bc of codewords 1, 10, 100 under W = 1: a, b, c get 11, 101, 110."""
    memory = CrossMemory(4, 3, 0, CrossedIds(9, 1, hashes=1), 1, "linear", "sum")
    torch.nn.init.ones_(memory.restore.weight)
    assert memory(torch.zeros(1, 4), None, torch.tensor([[1.0, 10, 100]])).tolist() == [[11, 101, 110]]


def test_triples_of_four_fields():
    """abc, abd, acd, bcd of 1, 10, 100, 1000: all but the one that leaves the field out."""
    memory = CrossMemory(4, 4, 0, CrossedIds(9, 1, hashes=1, order=3), 1, "linear", "sum")
    torch.nn.init.ones_(memory.restore.weight)
    found = memory(torch.zeros(1, 4), None, torch.tensor([[1.0, 10, 100, 1000]]))
    assert found.tolist() == [[111, 1011, 1101, 1110]]


def test_linear_restoring_maps_a_combinations_codewords_together():
    """Two hashes of two numbers: w = (first of hash 1) + 10 (second of hash 2)."""
    memory = CrossMemory(4, 2, 0, CrossedIds(9, 2, hashes=2), 1, "linear", "sum")
    memory.restore.weight.data = torch.tensor([[1.0, 0.0, 0.0, 10.0]])
    assert memory(torch.zeros(1, 4), None, torch.tensor([[1.0, 2, 3, 4]])).tolist() == [[41, 41]]


def test_global_attention_weighs_each_combination_by_the_whole_row():
    """W2 ReLU(x0): pairs ab, ac, bc weighed by -1, 0, 2 for x0 = (1, -5)."""
    memory = CrossMemory(2, 3, 0, CrossedIds(9, 1, hashes=1), 1, "linear", "attentive")
    torch.nn.init.ones_(memory.restore.weight)
    memory.attention[0].weight.data = torch.eye(2)
    memory.attention[2].weight.data = torch.tensor([[-1.0, 7.0], [0.0, 7.0], [2.0, 7.0]])
    found = memory(torch.tensor([[1.0, -5.0]]), None, torch.tensor([[1.0, 10, 100]]))
    assert found.tolist() == [[-1, 199, 200]]


def test_attentive_restoring_weighs_codewords_by_the_combinations_embeddings():
    """Weights are ReLU of the pair's two numbers: codeword 1 by the first field's, 2 by the second's."""
    memory = CrossMemory(4, 3, 1, CrossedIds(9, 1, hashes=2), 1, "attentive", "sum")
    torch.nn.init.ones_(memory.restore.weight)
    for place in (0, 2):
        memory.reweigh[place].weight.data = torch.eye(2)
    tokens = torch.tensor([[[1.0], [2.0], [-3.0]]])
    words = torch.tensor([[1.0, 1, 10, 10, 100, 100]])
    # ab: 1 * 1 + 2 * 1; ac: 1 * 10 + 0 * 10; bc: 2 * 100 + 0 * 100.
    assert memory(torch.zeros(1, 4), tokens, words).tolist() == [[13, 203, 210]]


def test_only_categorical_fields_are_crossed_and_all_are_read():
    torch.manual_seed(0)
    net = HCNet(MIXED, codeword_width=2, restoring="attentive", hidden=()).double()
    perturb_(net)
    (side,) = net.sides
    assert side.combinations(MIXED) == 3
    words = torch.randn(4, side.width(MIXED), dtype=torch.float64)
    x0 = torch.randn(4, MIXED.width, dtype=torch.float64)
    out = net(x0, words)
    assert out.shape == (4, MIXED.width + 3 * 2)
    assert torch.equal(out[:, : MIXED.width], x0)
    assert net.tokens.num_tokens == 3
    number = x0.clone()
    number[:, 2] += 1
    assert not torch.equal(net(number, words)[:, MIXED.width :], out[:, MIXED.width :])


def test_each_order_has_a_codebook_and_a_memory():
    net = HCNet(
        MIXED, num_codewords=70, codeword_width=4, num_hashes=3, orders=(2, 3), out_width=5, hidden=()
    )
    assert net.sides == (CrossedIds(70, 4, 3, 2), CrossedIds(70, 4, 3, 3))
    given = [torch.randn(2, side.width(MIXED)) for side in net.sides]
    assert [each.shape[1] for each in given] == [3 * 3 * 4, 1 * 3 * 4]
    x0 = torch.randn(2, MIXED.width)
    out = net(x0, *given)
    assert out.shape == (2, MIXED.width + 2 * 3 * 5)
    triples = net(x0, given[0], given[1] + 1)
    assert torch.equal(triples[:, : MIXED.width + 15], out[:, : MIXED.width + 15])
    assert not torch.equal(triples[:, MIXED.width + 15 :], out[:, MIXED.width + 15 :])


def test_without_enough_ids_only_the_dnn_is_left():
    net = HCNet(7, hidden=(3,))
    assert len(net.memories) == 0
    assert net(torch.randn(2, 7), torch.randn(2, 0)).shape == (2, 3)
    two = FieldLayout.uniform(2, 4)
    net = HCNet(two, orders=(3, 2), hidden=())
    given = [torch.randn(2, side.width(two)) for side in net.sides]
    assert net(torch.randn(2, 8), *given).shape == (2, 8 + 2 * 10)


@pytest.mark.parametrize("orders", [(2, 2), (1,), (1, 2)])
def test_bad_orders_are_refused(orders):
    with pytest.raises(ValueError, match="orders: each from 2 on and at most once"):
        HCNet(MIXED, orders=orders)


def test_the_authors_sizes():
    """39 fields, e = l = 10, two hashes: 741 pairs; GAS 390 -> 390 -> 741, LMR 20 -> 10, a DNN on 780."""
    layout = FieldLayout.uniform(39, 10)
    with torch.device("meta"):
        net = HCNet(layout)
    gas, lmr = 390 * 390 + 390 * 741, 20 * 10
    dnn = 780 * 400 + 400 * 400
    assert sum(p.numel() for p in net.parameters()) == gas + lmr + dnn + 800
    assert net.flops() == 2 * (gas + 741 * lmr + dnn)
    assert net.sides[0].width(layout) == 741 * 2 * 10


def test_initial_spreads():
    torch.manual_seed(0)
    memory = CrossMemory(200, 20, 100, CrossedIds(9, 50, hashes=2), 60, "attentive", "attentive")
    for weight, fans in (
        (memory.restore.weight, 100 + 60),
        (memory.attention[0].weight, 400),
        (memory.attention[2].weight, 200 + 190),
        (memory.reweigh[2].weight, 200 + 100),
    ):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fans), rel=0.03)
