"""PNN and DLRM: by hand, in special cases, without large temporaries, and the papers' sizes."""

import math

import numpy as np
import pytest
import torch
from families.case import inputs, perturb_
from families.products import pairs
from interaction_cases import REFERENCES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mldcn import interactions
from mldcn.errors import UserError
from mldcn.interactions import DLRM, PNN, PNN2016
from mldcn.interactions.pairs import InnerProducts, KernelProducts
from mldcn.layout import FieldLayout

NAMES = ["ipnn", "opnn", "pnn", "ipnn_2016", "opnn_2016", "dlrm"]
TOKENS = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])


def numbers_and_ids(kinds, width=4):
    """A layout of numbers (``n``) and ids (``c``)."""
    fields = {"n": ("numeric", 1), "c": ("categorical", width)}
    return FieldLayout.build([(f"f{i}", fields[k][0], "context", fields[k][1]) for i, k in enumerate(kinds)])


# By hand ----------------------------------------------------------------------------------------------------


def test_inner_products_by_hand():
    assert InnerProducts(3, 2)(TOKENS).tolist() == [[11, 17, 39]]
    assert InnerProducts(3, 2, with_self=True)(TOKENS).tolist() == [[5, 11, 17, 25, 39, 61]]


def test_kernels_by_hand():
    kernels = {
        "mat": [[[0.0, 1], [0, 0]], [[0, 0], [1, 0]], [[1, 0], [0, 1]]],
        "vec": [[[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [-1.0]]],
        "num": [1.0, 2.0, -1.0],
    }
    # Matrices: 1 * 4, 2 * 5 and all of 39.
    expected = {"mat": [4, 10, 39], "vec": [3, 12, -9], "num": [11, 34, -39]}
    for kernel, weight in kernels.items():
        products = KernelProducts(3, 2, kernel)
        with torch.no_grad():
            products.weight.copy_(torch.tensor(weight))
        assert products(TOKENS).tolist() == [expected[kernel]]


@pytest.mark.parametrize("with_self", [False, True])
@pytest.mark.parametrize("kernel", ["mat", "vec", "num"])
def test_kernels_of_one_are_inner_products(kernel, with_self):
    tokens = torch.randn(7, 6, 5, dtype=torch.float64)
    outer = KernelProducts(6, 5, kernel, with_self).double()
    one = torch.eye(5) if kernel == "mat" else torch.ones(())
    outer.weight.data = one.double().expand(outer.weight.shape)
    torch.testing.assert_close(outer(tokens), InnerProducts(6, 5, with_self)(tokens))


def test_the_original_forms_with_kernels_of_one_square_the_sum():
    """|sum v|^2 = 9^2 + 12^2, beside x0's own part."""
    for products, kernel in (("inner", [[1.0, 1, 1]]), ("outer", [[1.0, 0, 0, 1]])):
        net = PNN2016(FieldLayout.uniform(3, 2), products=products, hidden=(1,))
        with torch.no_grad():
            net.kernel.weight.copy_(torch.tensor(kernel))
            net.linear.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 0]]))
        assert net(TOKENS.flatten(1)).tolist() == [[225 + 1]]


def test_dlrm_by_hand():
    """z = ReLU(2 n) in both columns; the top reads z and z . v, v . w, z . w, but no embedding."""
    layout = FieldLayout.build(
        [("v", "categorical", "user", 2), ("n", "numeric", "user", 1), ("w", "categorical", "item", 2)]
    )
    net = DLRM(layout, bottom=(), hidden=())
    with torch.no_grad():
        net.bottom.net[0].weight.fill_(2.0)
    assert net(torch.tensor([[1.0, 2, 3, 4, 5]])).tolist() == [[6, 6, 18, 54, 14]]
    itself = DLRM(layout, bottom=(), hidden=(), self_interaction=True)
    itself.load_state_dict(net.state_dict())
    assert itself(torch.tensor([[1.0, 2, 3, 4, 5]])).tolist() == [[6, 6, 72, 18, 54, 5, 14, 41]]


# Special cases and layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_equations_on_random_layouts(name, seed):
    draw = np.random.default_rng(seed)
    widths = [1, *draw.choice([1, 2, 5, 5, 7], size=draw.integers(1, 8))]
    layout = FieldLayout.build(
        [
            (f"f{i}", "categorical" if i else "numeric", "context", int(width))
            for i, width in enumerate(widths)
        ]
    )
    torch.manual_seed(seed)
    module = interactions.build({"name": name, "hidden": (6,)}, layout).double()
    perturb_(module)
    x0 = torch.randn(3, layout.width, dtype=torch.float64)
    parameters = {key: value.numpy() for key, value in module.state_dict().items()}
    expected = [REFERENCES[name](parameters, row, layout.widths, hidden=(6,)) for row in x0.numpy()]
    np.testing.assert_allclose(module(x0).detach().numpy(), np.stack(expected), rtol=1e-10, atol=1e-10)


def test_dlrm_finds_its_numbers_wherever_they_lie():
    mixed, sorted_ = numbers_and_ids("cncnnc"), numbers_and_ids("nnnccc")
    order = [4, 9, 10, 0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 14]
    torch.manual_seed(0)
    one, other = DLRM(mixed, bottom=(8,), hidden=(8,)), DLRM(sorted_, bottom=(8,), hidden=(8,))
    other.load_state_dict(one.state_dict())
    x0 = torch.randn(6, 15)
    torch.testing.assert_close(one(x0), other(x0[:, order]))


@pytest.mark.parametrize(
    ("kinds", "width", "read"),
    [
        ("ccc", 4, 3),  # three products
        ("c", 4, 1),  # a lone field's with itself
        ("nc", 4, 4 + 1),  # z and one product
        ("nnn", None, 64 + 1),  # z as wide as the bottom's last layer, and its product with itself
    ],
)
def test_what_dlrms_top_reads(kinds, width, read):
    layout = numbers_and_ids(kinds)
    net = DLRM(layout)
    assert net.top.widths[0] == read
    assert (net.bottom is None) == ("n" not in kinds)
    assert width is None or net.products.width == width
    assert net(torch.randn(2, layout.width)).shape == (2, 256)


def test_a_lone_field_in_pnn():
    """No pairs beside x0; without x0 its product with itself, so that there is something to read."""
    x0 = torch.randn(3, 5)
    for products in ("inner", "outer", "both"):
        assert torch.equal(PNN(5, products=products, hidden=())(x0), x0)
    alone = PNN(5, products="inner", linear=False, hidden=())(x0)
    torch.testing.assert_close(alone, x0.square().sum(1, keepdim=True))


@pytest.mark.parametrize("kernel", ["mat", "vec", "num"])
@pytest.mark.parametrize("products", ["inner", "outer", "both"])
def test_pnn_reads_x0_then_inner_then_outer_products(products, kernel):
    layout = FieldLayout.uniform(4, 3)
    net = PNN(layout, products=products, kernel=kernel, hidden=()).double()
    x0 = torch.randn(5, 12, dtype=torch.float64)
    tokens = x0.reshape(5, 4, 3)
    expected = [x0]
    if products != "outer":
        inner = [(tokens[:, i] * tokens[:, j]).sum(1) for i, j in pairs(4, False)]
        expected.append(torch.stack(inner, 1))
    if products != "inner":
        expected.append(net.outer(tokens))
    torch.testing.assert_close(net(x0), torch.cat(expected, 1))


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation gave."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.most = max(self.most, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("kernel", ["mat", "vec", "num"])
def test_outer_products_are_never_made(kernel):
    """At most one vector a pair: DeepCTR's (B, e, P, e) would be 24 times as large here."""
    module = KernelProducts(10, 24, kernel)
    tokens = torch.randn(64, 10, 24, requires_grad=True)
    with Largest() as largest:
        module(tokens).sum().backward()
    assert largest.most <= 64 * module.num_pairs * 24


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name):
    torch.manual_seed(0)
    layout = numbers_and_ids("nnccc")
    module = interactions.build({"name": name}, layout)
    (x0,) = inputs(module, layout, n=32, dtype=torch.float32)
    with torch.no_grad():
        exact = module(x0)
        with torch.autocast("cpu", torch.bfloat16):
            got = module(x0)
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05 * exact.std().item())


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="kernel: .*'mat', 'vec' or 'num'"):
        PNN(8, kernel="matrix")
    with pytest.raises(ValueError, match="products"):
        PNN2016(8, products="both")
    with pytest.raises(UserError, match="interaction ipnn_2016: hidden is empty"):
        interactions.build({"name": "ipnn_2016", "hidden": []}, 8)
    with pytest.raises(UserError, match="bottom.0"):
        interactions.build({"name": "dlrm", "bottom": [0]}, 8)


# Starts and sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "spread"),
    [("mat", 1 / 4), ("vec", math.sqrt(2 / 17)), ("num", 1.0)],
    ids=["mat", "vec", "num"],
)
def test_kernels_start_with_the_fans_of_one_pair(kernel, spread):
    """Xavier on the stack would read the pairs as fans."""
    torch.manual_seed(0)
    assert KernelProducts(40, 16, kernel).weight.std().item() == pytest.approx(spread, rel=0.06)


def test_the_product_layers_start():
    torch.manual_seed(0)
    net = PNN2016(FieldLayout.uniform(30, 16), hidden=(200,))
    assert net.linear.weight.std().item() == pytest.approx(math.sqrt(2 / 480), rel=0.03)
    assert net.kernel.weight.std().item() == pytest.approx(math.sqrt(2 / 456), rel=0.03)
    assert net.linear.bias.eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_flops_grow_with_every_knob(name):
    known = interactions.info(name)
    assert (known.knob, known.secondary) == ("hidden", "token_width")
    for knob in ("hidden", "token_width"):
        sizes = []
        for width in (1, 2, 3, 8, 9, 64):
            value = (width,) if knob == "hidden" else width
            with torch.device("meta"):
                built = interactions.build({"name": name, knob: value}, numbers_and_ids("nccnc"))
            sizes.append(built.flops())
        assert sizes == sorted(set(sizes))


def criteo(one_token):
    """13 numbers, as they are or as one vector, and 26 ids 39 wide."""
    numbers = [("numbers", "embedding", "context", 13)]
    if not one_token:
        numbers = [(f"n{i}", "numeric", "context", 1) for i in range(13)]
    return FieldLayout.build(numbers + [(f"c{i}", "categorical", "context", 39) for i in range(26)])


# Module; the sizes that it has and those that the paper prints. The paper does not say which products; these
# are the ones that give its sizes at its layers. ML-1M's layers are not printed.
TABLE_6 = {
    "Criteo DLRM": (
        lambda: DLRM(criteo(False), bottom=(512, 256, 64), hidden=(768,) * 2, self_interaction=True),
        (1.0699, 2.1918),
        (1.1, 2.2),
    ),
    "Criteo OPNN": (
        lambda: PNN(
            criteo(True),
            products="outer",
            kernel="mat",
            linear=False,
            self_products=True,
            hidden=(1024,) * 3,
        ),
        (3.0638, 6.1214),
        (3.1, 6.1),
    ),
    "ML-1M PNN*": (
        lambda: PNN(FieldLayout.uniform(6, 30), products="both", kernel="num", hidden=(256,)),
        (0.05429, 0.1124),
        (0.054, 0.110),
    ),
}


@pytest.mark.parametrize(("make", "computed", "printed"), TABLE_6.values(), ids=TABLE_6)
def test_sizes_of_dcnv2_table_6(make, computed, printed):
    """Millions of parameters and of FLOPs, with a logit behind, embeddings left out."""
    with torch.device("meta"):
        module = make()
    parameters = sum(p.numel() for p in module.parameters()) + module.out_features + 1
    got = parameters / 1e6, (module.flops() + 2 * module.out_features) / 1e6
    assert got == pytest.approx(computed, rel=1e-3)
    assert [float(f"{each:.2g}") for each in got] == list(printed)
