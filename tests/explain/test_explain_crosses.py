"""Block norms, spectra and pairs against what is computed densely."""

import numpy as np
import pytest
import torch

from mldcn import interactions
from mldcn.explain.crosses import (
    CrossMatrix,
    block_norms,
    change,
    cross_matrix,
    cross_sites,
    crossed_signal,
    numerical_rank,
    singular_values,
    strongest_pairs,
)
from mldcn.layout import FieldLayout

WIDTHS = (3, 1, 4, 2)
LAYOUT = FieldLayout.build([(f"f{i}", "categorical", "user", width) for i, width in enumerate(WIDTHS)])
D = LAYOUT.width
BLOCKS = [field.columns for field in LAYOUT]


def model(name, **options):
    torch.manual_seed(0)
    return interactions.build({"name": name, **options}, LAYOUT).eval()


def matrix_of(name, layer=0, means=None, **options):
    site = list(cross_sites(model(name, **options)))[layer]
    return site, cross_matrix(site, {site.name: means} if means is not None else {})


def dense_norms(weight):
    return np.array([[np.linalg.norm(weight[rows, columns]) for columns in BLOCKS] for rows in BLOCKS])


def by_hand(name, site, means):
    layer = site.layer
    if name == "dcnv2":
        return layer.linear.weight
    if name == "dcn":
        return torch.ones(D, 1) @ layer.linear.weight
    if name == "gdcn_p":
        return torch.diag(means) @ layer.cross.weight
    if name == "dcn_mix":
        r = layer.rank
        return sum(
            means[i]
            * layer.up.weight[:, i * r : (i + 1) * r]
            @ layer.inner[i]
            @ layer.down.weight[i * r : (i + 1) * r]
            for i in range(layer.num_experts)
        )
    scale = torch.diag(means) if means is not None else torch.eye(4)
    return layer.up.weight @ scale @ layer.down.weight


CASES = {
    "dcnv2": ({}, None),
    "dcn": ({}, None),
    "dcnv2_lowrank": ({"rank": 4}, None),
    "dcn_mix": ({"rank": 2, "num_experts": 3, "with_c": True}, torch.tensor([0.5, 0.2, 0.3])),
    "mldcn": ({"rank": 4}, torch.tensor([1.0, 0.0, -2.0, 0.5])),
    "gdcn_p": ({"hidden": (4,)}, torch.linspace(0.1, 0.9, D)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_blocks_norm_and_the_spectrum_are_those_of_the_dense_matrix(name):
    options, means = CASES[name]
    site, matrix = matrix_of(name, layer=1, means=means, **options)
    weight = by_hand(name, site, means).detach().double().numpy()
    np.testing.assert_allclose(block_norms(matrix, LAYOUT), dense_norms(weight), rtol=1e-5, atol=1e-7)
    values = singular_values(matrix)
    expected = np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-4, atol=1e-5 * expected[0])
    np.testing.assert_allclose(expected[len(values) :], 0, atol=1e-5 * expected[0])


def test_a_layer_of_low_rank_with_relu_counts_a_direction_by_the_share_of_rows_that_pass():
    site, matrix = matrix_of("dcnv2_lowrank", rank=2, relu=True, means=torch.tensor([1.0, 0.0]))
    alone = torch.outer(site.layer.up.weight[:, 0], site.layer.down.weight[0]).detach().numpy()
    np.testing.assert_allclose(block_norms(matrix, LAYOUT), dense_norms(alone), rtol=1e-5)


def test_hand_set_blocks():
    weight = torch.zeros(D, D)
    weight[BLOCKS[0], BLOCKS[2]] = 2.0  # 3 x 4 numbers
    weight[BLOCKS[2], BLOCKS[0]] = -1.0
    weight[BLOCKS[1], BLOCKS[1]] = 5.0
    norms = block_norms(CrossMatrix("layer 1", "W", weight), LAYOUT)
    assert norms[0, 2] == pytest.approx(2 * np.sqrt(12))
    assert norms[2, 0] == pytest.approx(np.sqrt(12))
    assert norms[1, 1] == 5.0
    assert np.count_nonzero(norms) == 3
    first, *rest = strongest_pairs(norms, LAYOUT)
    assert first == ("f0", "f2", pytest.approx(np.sqrt(60)))
    assert len(rest) == 5
    assert all(norm == 0 for *_, norm in rest)  # a field with itself is no pair


def test_behind_a_projection_a_blocks_norm_is_that_of_the_tensor_of_products():
    site, matrix = matrix_of("dcnv2", projection=6)
    entry, weight = (t.detach().double().numpy() for t in (matrix.entry, matrix.left))
    tensor = np.einsum("ka,kb->kab", entry, weight @ entry)
    expected = [[np.linalg.norm(tensor[:, rows, columns]) for columns in BLOCKS] for rows in BLOCKS]
    np.testing.assert_allclose(block_norms(matrix, LAYOUT), expected, rtol=1e-5)
    assert crossed_signal(site, matrix, torch.randn(5, D), LAYOUT) is None
    assert change(matrix, matrix) is None


def test_a_large_matrix_is_taken_in_chunks(monkeypatch):
    _, matrix = matrix_of("dcnv2")
    whole = block_norms(matrix, LAYOUT)
    monkeypatch.setattr("mldcn.explain.crosses._CHUNK", 3 * D)
    np.testing.assert_allclose(block_norms(matrix, LAYOUT), whole)


@pytest.mark.parametrize(("name", "options"), [("dcnv2", {}), ("mldcn", {"rank": 4, "mask": "none"})])
def test_the_signal_is_the_size_of_the_crosses_on_rows(name, options):
    site, matrix = matrix_of(name, **options)
    weight = matrix.rows(0, D)
    x0 = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    signal = crossed_signal(site, matrix, x0, LAYOUT)
    for i, rows in enumerate(BLOCKS):
        for j, columns in enumerate(BLOCKS):
            crosses = x0[:, rows] * (x0[:, columns] @ weight[rows, columns].T)
            assert signal[i, j] == pytest.approx(float(crosses.square().sum(1).mean().sqrt()), rel=1e-4)
    later, second = matrix_of(name, layer=1, **options)
    assert crossed_signal(later, second, x0, LAYOUT) is None


@pytest.mark.parametrize(("name", "options"), [("dcnv2", {}), ("dcnv2_lowrank", {"rank": 4})])
def test_the_change_is_the_difference_of_two_matrices(name, options):
    (_, a), (_, b) = (matrix_of(name, layer=i, **options) for i in (0, 1))
    difference = (a.rows(0, D) - b.rows(0, D)).detach().numpy()
    np.testing.assert_allclose(block_norms(change(a, b), LAYOUT), dense_norms(difference), rtol=1e-4)
    assert block_norms(change(a, a), LAYOUT).max() < 1e-6


@pytest.mark.parametrize(
    ("values", "tolerance", "rank"),
    [
        ([4.0, 2.0, 0.4, 0.39], 0.1, 3),
        ([4.0, 2.0, 0.4, 0.39], 0.01, 4),
        ([4.0, 2.0, 0.4, 0.39], 0.6, 1),
        ([0.0, 0.0], 0.1, 0),
        ([], 0.1, 0),
    ],
)
def test_numerical_rank(values, tolerance, rank):
    assert numerical_rank(np.array(values), tolerance) == rank


def test_a_matrix_of_known_rank_has_that_numerical_rank():
    rng = np.random.default_rng(0)
    q, p = (np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in range(2))
    spectrum = np.array([3.0, 2.0, 1.0, 0.25, 0.02, *[1e-4] * (D - 5)])
    weight = torch.from_numpy(q @ np.diag(spectrum) @ p).float()
    values = singular_values(CrossMatrix("layer 1", "W", weight))
    np.testing.assert_allclose(values, spectrum, atol=1e-5)
    assert [numerical_rank(values, t) for t in (0.5, 0.1, 0.01, 0.001)] == [2, 3, 4, 5]


def test_layers_are_found_in_stacks_and_experts_and_not_where_x0_is_not_read():
    names = {
        "dcnv2_parallel": [f"stack {s}, layer {i}" for s in range(1, 5) for i in (1, 2)],
        "homefeed_baseline": [f"layer {i}" for i in range(1, 5)],
        "moe": [f"expert {e}, layer {i}" for e in (1, 2) for i in (1, 2)],
    }
    expert = {"name": "mldcn", "rank": 4, "num_layers": 2}
    options = {"moe": {"expert": expert, "num_experts": 2}}
    for name, expected in names.items():
        assert [site.name for site in cross_sites(model(name, **options.get(name, {})))] == expected
    for name in ("dnn", "homefeed", "masknet", "wukong"):
        assert list(cross_sites(model(name))) == []
