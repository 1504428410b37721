"""LR, FM, FwFM, Wide & Deep, DeepFM, NFM: by hand, in special cases, in low precision, and the papers' sizes."""

import math

import numpy as np
import pytest
import torch
from families.case import inputs, perturb_
from interaction_cases import REFERENCES

from mldcn import interactions
from mldcn.interactions import FM, LR, NFM, DeepFM, FwFM, WideDeep
from mldcn.interactions.fm import bi_interaction
from mldcn.layout import FieldLayout, FirstOrder

NAMES = ["lr", "fm", "fwfm", "wide_deep", "deepfm", "nfm"]
X0 = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
FIRST = torch.tensor([[0.5, -1.0, 2.0]])
THREE = FieldLayout.uniform(3, 2)


def random_layout(seed):
    draw = np.random.default_rng(seed)
    widths = draw.choice([1, 2, 5, 5, 7], size=draw.integers(1, 9))
    return FieldLayout.build([(f"f{i}", "categorical", "context", int(w)) for i, w in enumerate(widths)])


# By hand ----------------------------------------------------------------------------------------------------


def test_fm_by_hand():
    """(1 2)(3 4) = 11, (1 2)(5 6) = 17, (3 4)(5 6) = 39."""
    assert FM(THREE)(X0, FIRST).tolist() == [[67 + 1.5]]
    assert FM(THREE, first_order="none")(X0).tolist() == [[67.0]]
    assert LR(THREE)(X0, FIRST).tolist() == [[1.5]]


def test_fwfm_by_hand():
    fwfm = FwFM(THREE)
    with torch.no_grad():
        fwfm.weight.copy_(torch.tensor([1.0, 10.0, 100.0]))
        fwfm.linear.linear.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 2]]))
    assert fwfm(X0).tolist() == [[11 + 170 + 3900 + 1 + 12]]


def test_the_pooled_pairs_by_hand():
    assert bi_interaction(X0.reshape(1, 3, 2)).tolist() == [[3 + 5 + 15, 8 + 12 + 24]]


def test_deep_models_put_their_scalar_before_the_dnns_output():
    for module, scalar in ((DeepFM(THREE, hidden=()), 68.5), (WideDeep(THREE, hidden=()), 1.5)):
        assert module(X0, FIRST).tolist() == [[scalar, 1, 2, 3, 4, 5, 6]]
    assert NFM(THREE, hidden=())(X0, FIRST).tolist() == [[1.5, 23, 44]]


# Special cases and layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_equations_on_random_layouts(name, seed):
    layout = random_layout(seed)
    torch.manual_seed(seed)
    options = {} if name in ("lr", "fm", "fwfm") else {"hidden": (4,)}
    module = interactions.build({"name": name, **options}, layout).double()
    perturb_(module)
    given = inputs(module, layout)
    parameters = {key: value.numpy() for key, value in module.state_dict().items()}
    expected = []
    for x0, *sides in zip(*(each.numpy() for each in given), strict=True):
        beside = {"sides": sides} if sides else {}
        expected.append(REFERENCES[name](parameters, x0, layout.widths, **beside, **options))
    np.testing.assert_allclose(module(*given).detach().numpy(), np.stack(expected), rtol=1e-10, atol=1e-10)


def test_fwfm_with_equal_weights_is_fm_and_so_is_nfm_without_layers():
    layout = FieldLayout.uniform(6, 4)
    x0, first = torch.randn(8, 24).double(), torch.randn(8, 6).double()
    fm = FM(layout)(x0, first)
    fwfm = FwFM(layout, first_order="ids").double()
    torch.nn.init.ones_(fwfm.weight)
    torch.testing.assert_close(fwfm(x0, first), fm)
    torch.testing.assert_close(NFM(layout, hidden=())(x0, first).sum(1, keepdim=True), fm)
    torch.testing.assert_close(DeepFM(layout).double()(x0, first)[:, :1], fm)


def test_one_field_has_no_pairs():
    x0, first = torch.randn(4, 5), torch.randn(4, 1)
    assert torch.equal(FM(5)(x0, first), first)
    assert torch.equal(FwFM(5, first_order="ids")(x0, first), first)
    assert FM(5, first_order="none")(x0).eq(0).all()
    assert NFM(5, hidden=())(x0, first)[:, 1:].eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_first_order_term_is_the_ids_or_the_embeddings(name):
    layout = FieldLayout.uniform(3, 2)
    ids = interactions.build({"name": name, "first_order": "ids"}, layout)
    assert ids.sides == (FirstOrder(),)
    x0, first = torch.randn(4, 6), torch.randn(4, 3)
    moved = ids(x0, first + torch.tensor([1.0, 0, 2])) - ids(x0, first)
    torch.testing.assert_close(moved[:, 0], torch.full((4,), 3.0))
    with pytest.raises(ValueError, match="expected 1 side inputs beside x0, found 0"):
        ids(x0)
    own = interactions.build({"name": name, "first_order": "embedding"}, layout)
    assert own.sides == ()
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in ids.parameters()) + 6
    with pytest.raises(ValueError, match="found 1"):
        own(x0, first)


def test_dropout_and_batch_norm_of_nfm_fall_on_the_pooled_pairs():
    torch.manual_seed(0)
    layout = FieldLayout.uniform(3, 400)
    x0, first = torch.ones(20, 1200), torch.zeros(20, 3)
    dropped = NFM(layout, hidden=(), dropout=0.25)
    assert dropped(x0, first)[:, 1:].unique().tolist() == [0.0, 4.0]
    assert dropped.eval()(x0, first)[:, 1:].unique().tolist() == [3.0]
    pooled = NFM(layout, hidden=(), batch_norm=True)(torch.randn(500, 1200), torch.zeros(500, 3))[:, 1:]
    torch.testing.assert_close(pooled.mean(0), torch.zeros(400), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled.std(0, unbiased=False), torch.ones(400), atol=1e-3, rtol=0)


# Precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_difference_of_squares_keeps_float32s_precision(dtype):
    """39 fields whose pairs nearly cancel: in bfloat16 itself nothing of the sum would be right."""
    torch.manual_seed(0)
    tokens = torch.randn(64, 39, 16).to(dtype)
    exact = bi_interaction(tokens.double())
    got = bi_interaction(tokens)
    assert got.dtype == torch.float32
    scale = tokens.double().square().sum(1)
    assert ((got - exact).abs() / scale).max() < 2e-6


def test_bi_interaction_keeps_double_precision():
    tokens = torch.randn(4, 5, 3, dtype=torch.float64)
    assert bi_interaction(tokens).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name):
    """The FM's own arithmetic is untouched by it; matrix products have bfloat16's precision."""
    torch.manual_seed(0)
    layout = FieldLayout.uniform(20, 8)
    module = interactions.build({"name": name}, layout).eval()
    given = inputs(module, layout, n=32, dtype=torch.float32)
    with torch.no_grad():
        exact = module.double()(*(each.double() for each in given))
        module.float()
        with torch.autocast("cpu", torch.bfloat16):
            got = module(*given)
    if name in ("lr", "fm"):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
    else:
        torch.testing.assert_close(got.double(), exact, rtol=0.05, atol=0.05 * exact.std().item())


# Starts and sizes -------------------------------------------------------------------------------------------


def test_initial_spreads():
    torch.manual_seed(0)
    fwfm = FwFM(FieldLayout.uniform(100, 4))
    assert fwfm.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert fwfm.linear.linear.weight.std().item() == pytest.approx(math.sqrt(2 / 401), rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_flops_grow_with_every_knob(name):
    known = interactions.info(name)
    for knob in filter(None, (known.knob, known.secondary)):
        sizes = []
        for width in (1, 2, 3, 8, 9, 64):
            value = (width,) if knob == "hidden" else width
            with torch.device("meta"):
                built = interactions.build({"name": name, knob: value}, random_layout(3))
            sizes.append(built.flops())
        assert sizes == sorted(set(sizes))


CRITEO = FieldLayout.build(
    [(f"n{i}", "numeric", "context", 1) for i in range(13)]
    + [(f"c{i}", "categorical", "context", 39) for i in range(26)]
)
MOVIELENS = FieldLayout.uniform(6, 30)


@pytest.mark.parametrize(
    ("make", "computed", "printed"),
    [
        (lambda: DeepFM(FieldLayout.flat(1027), hidden=(768,) * 2), (1.3815, 2.760), (1.4, 2.8)),
        (lambda: DeepFM(CRITEO, hidden=(768,) * 2), (1.3820, 2.761), (1.4, 2.8)),
        (lambda: DeepFM(MOVIELENS, hidden=(256,)), (0.04659, 0.09267), (0.046, 0.093)),
    ],
    ids=["Criteo", "Criteo with its numbers projected", "ML-1M"],
)
def test_sizes_of_deepfm_in_dcnv2_table_6(make, computed, printed):
    """Millions of parameters and of FLOPs, with a logit behind, embeddings and first-order weights left out."""
    with torch.device("meta"):
        module = make()
    parameters = sum(p.numel() for p in module.parameters()) + module.out_features + 1
    got = parameters / 1e6, (module.flops() + 2 * module.out_features) / 1e6
    assert got == pytest.approx(computed, rel=1e-3)
    assert got == pytest.approx(printed, rel=0.02)
