"""What masks do, on weights set by hand."""

import numpy as np
import pytest
import torch

from mldcn import interactions
from mldcn.explain.masks import AMPLIFIED, NEAR_ZERO, Moments, mask_sites, masked_example, summarise
from mldcn.layout import FieldLayout

LAYOUT = FieldLayout.build(
    [("a", "categorical", "user", 2), ("b", "numeric", "item", 1), ("c", "categorical", "item", 2)]
)


def build(name, **options):
    torch.manual_seed(0)
    return interactions.build({"name": name, **options}, LAYOUT).eval()


def heard(site, model, x0):
    moments = Moments()
    handle = site.mask.register_forward_hook(lambda module, given, out: moments.add(out))
    with torch.no_grad():
        for part in x0.split(3):
            model(part)
    handle.remove()
    return moments


def hand_set():
    """A mask that reads b alone: direction 1 is 1 + 2 relu(b), direction 2 always 0.05, direction 3 always 1."""
    model = build("mldcn", num_layers=1, rank=3, mask_ratio=1 / 3)
    layer = model.layers[0]
    with torch.no_grad():
        first, _, last = layer.mask.net
        first.weight.copy_(torch.tensor([[0.0, 0, 1, 0, 0]]))
        last.weight.copy_(torch.tensor([[2.0], [0.0], [0.0]]))
        last.bias.copy_(torch.tensor([1.0, 0.05, 1.0]))
        layer.down.weight.copy_(torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 3, 4], [1, 1, 0, 1, 1]]))
    return model


def test_behaviour_of_a_hand_set_mask():
    model = hand_set()
    (site,) = mask_sites(model, LAYOUT)
    assert (site.name, site.of_fields) == ("layer 1", True)
    x0 = torch.zeros(4, 5)
    x0[:, 2] = torch.tensor([-1.0, 0.0, 1.0, 2.0])  # direction 1: 1, 1, 3, 5
    moments = heard(site, model, x0)
    np.testing.assert_allclose(moments.means, [2.5, 0.05, 1.0], rtol=1e-6)
    whole = summarise(moments)
    numbers = np.array([[1, 0.05, 1], [1, 0.05, 1], [3, 0.05, 1], [5, 0.05, 1]])
    assert whole.mean == pytest.approx(numbers.mean())
    assert whole.spread == pytest.approx(numbers.std())
    assert whole.over_examples == pytest.approx(np.sqrt(numbers.var(axis=0).mean()))
    assert whole.over_directions == pytest.approx(numbers.mean(axis=0).std())
    assert whole.near_zero == pytest.approx((np.abs(numbers) < NEAR_ZERO).mean())
    assert whole.amplified == pytest.approx((numbers > AMPLIFIED).mean())
    assert whole.negative == 0
    shares = site.shares(LAYOUT)
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0], [0, 0, 1], [0.5, 0, 0.5]], rtol=1e-6)
    of_b = summarise(moments, shares[:, 1])  # reads direction 1 alone
    assert of_b.mean == pytest.approx(2.5)
    assert of_b.over_directions == pytest.approx(0)
    of_a = summarise(moments, shares[:, 0])  # directions 1 and 3, half each
    assert of_a.mean == pytest.approx(1.75)
    assert summarise(moments, np.zeros(3)) is None


def test_one_examples_directions_and_the_fields_that_they_come_from():
    model = hand_set()
    sites = list(mask_sites(model, LAYOUT))
    x0 = torch.zeros(4, 5)
    x0[:, 2] = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    moments = [heard(sites[0], model, x0)]
    row = torch.tensor([[-3.0, 0, 1, 0.5, 0]])
    (found,) = masked_example(sites, moments, LAYOUT, lambda: model(row))
    first, *_ = found.directions
    assert (first.number, first.mask, first.mean) == (0, pytest.approx(3.0), pytest.approx(2.5))
    assert first.value == pytest.approx(-2.0)  # -3 + 1
    assert first.fields == (("a", pytest.approx(0.75)), ("b", pytest.approx(0.25)))
    assert [d.number for d in found.amplified(3)] == [0]
    assert found.damped(3) == ()
    row[0, 2] = -1.0
    (found,) = masked_example(sites, moments, LAYOUT, lambda: model(row))
    assert [d.number for d in found.damped(3)] == [0]
    assert found.directions[-1].fields == (("a", pytest.approx(0.75)), ("b", pytest.approx(0.25)))


def test_a_fresh_mask_is_one_everywhere():
    model = build("mldcn", num_layers=2, rank=4)
    for site in mask_sites(model, LAYOUT):
        whole = summarise(heard(site, model, torch.randn(6, 5)))
        assert (whole.mean, whole.spread, whole.near_zero, whole.amplified) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "options", "of_fields"),
    [
        ("masknet_parallel", {"width": 4, "num_blocks": 2}, [True, True]),
        ("masknet_serial", {"width": 4, "num_blocks": 2}, [True, False]),
        ("masknet", {"num_layers": 2}, [True, False]),
        ("homefeed", {"width": 4, "num_blocks": 2, "num_layers": 1}, [True, True]),
        ("moe", {"expert": {"name": "mldcn", "rank": 2, "num_layers": 1}, "num_experts": 2}, [True, True]),
        ("dcnv2", {}, []),
        ("mldcn", {"mask": "none"}, []),
    ],
)
def test_masks_are_found_and_know_whether_they_mask_fields(name, options, of_fields):
    assert [site.of_fields for site in mask_sites(build(name, **options), LAYOUT)] == of_fields


def test_a_mask_block_masks_columns_of_fields():
    model = build("masknet_parallel", width=4, num_blocks=1)
    (site,) = sites = list(mask_sites(model, LAYOUT))
    np.testing.assert_array_equal(site.shares(LAYOUT).argmax(axis=1), [0, 0, 1, 2, 2])
    with torch.no_grad():
        site.mask[2].weight.zero_()
        site.mask[2].bias.copy_(torch.tensor([2.0, 1.0, -1.0, 0.0, 1.0]))
    moments = heard(site, model, torch.randn(6, 5))
    assert [summarise(moments, share).mean for share in site.shares(LAYOUT).T] == [1.5, -1.0, 0.5]
    (found,) = masked_example(sites, [moments], LAYOUT, lambda: model(torch.ones(1, 5)))
    assert [d.fields for d in found.directions] == [((name, 1.0),) for name in ("a", "a", "b", "c", "c")]
    assert found.amplified(5) == found.damped(5) == ()  # the same for all rows
