"""Table optimisers against plain NumPy, torch's own where they agree, and the promise on untouched rows."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from mldcn.embedding.tables import gather_rows
from mldcn.training.table_optim import LazyAdam, RowWiseAdagrad, clip_grad_norm, coalesced, lazy_zeros

ROWS, WIDTH = 50, 3


def table(seed: int = 0, rows: int = ROWS, width: int = WIDTH) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def sparse_grad(weight: torch.Tensor, ids: list[int], values: np.ndarray) -> torch.Tensor:
    return torch.sparse_coo_tensor([ids], torch.from_numpy(values), weight.shape, check_invariants=True)


def steps(seed: int, count: int = 6) -> list[tuple[list[int], np.ndarray]]:
    """Batches of ids with duplicates, and a gradient for each id."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 20, 12).tolist(), rng.normal(size=(12, WIDTH)).astype(np.float32))
        for _ in range(count)
    ]


def summed(ids: list[int], values: np.ndarray) -> dict[int, np.ndarray]:
    total: dict[int, np.ndarray] = {}
    for row, value in zip(ids, values.astype(np.float64), strict=True):
        total[row] = total.get(row, 0.0) + value
    return total


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_rowwise_adagrad_is_its_equation(l2: float) -> None:
    weight = table()
    expected, accumulated = weight.detach().double().numpy().copy(), np.zeros(ROWS)
    optimiser = RowWiseAdagrad([weight], lr=0.05, eps=1e-6, l2=l2)
    for ids, values in steps(1):
        weight.grad = sparse_grad(weight, ids, values)
        optimiser.step()
        for row, g in summed(ids, values).items():
            g = g + l2 * expected[row]
            accumulated[row] += np.mean(g**2)
            expected[row] -= 0.05 * g / (np.sqrt(accumulated[row]) + 1e-6)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_lazy_adam_is_its_equation(l2: float) -> None:
    weight = table()
    expected = weight.detach().double().numpy().copy()
    m, v = np.zeros((ROWS, WIDTH)), np.zeros((ROWS, WIDTH))
    optimiser = LazyAdam([weight], lr=0.05, betas=(0.8, 0.95), eps=1e-3, l2=l2)
    for t, (ids, values) in enumerate(steps(2), start=1):
        weight.grad = sparse_grad(weight, ids, values)
        optimiser.step()
        for row, g in summed(ids, values).items():
            g = g + l2 * expected[row]
            m[row] = 0.8 * m[row] + 0.2 * g
            v[row] = 0.95 * v[row] + 0.05 * g**2
            corrected = np.sqrt(v[row] / (1 - 0.95**t)) + 1e-3
            expected[row] -= 0.05 * (m[row] / (1 - 0.8**t)) / corrected
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_duplicate_is_summed_before_it_is_squared() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 1))
    weight.grad = sparse_grad(weight, [1, 1], np.array([[1.0], [1.0]], dtype=np.float32))
    optimiser = RowWiseAdagrad([weight], lr=1.0, eps=0.0)
    optimiser.step()
    # (1 + 1)^2 = 4, where squaring first would give 1 + 1 = 2.
    assert optimiser.state[weight]["sum"].tolist() == [0.0, 4.0]
    assert weight.tolist() == [[0.0], [-1.0]]


def test_lazy_adam_without_eps_is_sparse_adam() -> None:
    ours, theirs = table(), table()
    mine = LazyAdam([ours], lr=0.01, eps=1e-30)
    reference = torch.optim.SparseAdam([theirs], lr=0.01, eps=1e-30)
    for ids, values in steps(3, count=20):
        ours.grad, theirs.grad = sparse_grad(ours, ids, values), sparse_grad(theirs, ids, values)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_lazy_adam_is_adam_while_every_row_is_touched() -> None:
    ours, theirs = table(rows=4), table(rows=4)
    mine, reference = LazyAdam([ours], lr=0.01), torch.optim.Adam([theirs], lr=0.01)
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(size=(4, WIDTH)).astype(np.float32)
        ours.grad = sparse_grad(ours, [3, 0, 2, 1], values)
        theirs.grad = ours.grad.to_dense()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [RowWiseAdagrad, LazyAdam])
def test_untouched_rows_keep_every_bit(kind: type[RowWiseAdagrad] | type[LazyAdam]) -> None:
    weight = table()
    before = weight.detach().clone()
    optimiser = kind([weight], lr=0.1, l2=0.5)
    for ids, values in steps(4):  # ids stay below 20
        weight.grad = sparse_grad(weight, ids, values)
        optimiser.step()
    state = {name: value for name, value in optimiser.state[weight].items() if value.dim()}
    assert torch.equal(weight[20:], before[20:])
    assert not torch.equal(weight[:20], before[:20])
    assert all(not value[20:].any() for value in state.values())


@pytest.mark.parametrize("kind", [RowWiseAdagrad, LazyAdam])
def test_a_resumed_optimiser_goes_on_bit_for_bit(kind: type[RowWiseAdagrad] | type[LazyAdam]) -> None:
    straight, resumed = table(), table()
    one, two = kind([straight], lr=0.1), kind([resumed], lr=0.1)
    for i, (ids, values) in enumerate(steps(5)):
        straight.grad, resumed.grad = (sparse_grad(straight, ids, values) for _ in range(2))
        one.step()
        if i == 3:
            state = two.state_dict()
            two = kind([resumed], lr=9.0)
            two.load_state_dict(state)
        two.step()
    assert torch.equal(straight, resumed)


@pytest.mark.parametrize("kind", [RowWiseAdagrad, LazyAdam])
def test_a_gradient_without_rows_changes_nothing(kind: type[RowWiseAdagrad] | type[LazyAdam]) -> None:
    weight = table()
    before = weight.detach().clone()
    weight.grad = sparse_grad(weight, [], np.zeros((0, WIDTH), dtype=np.float32))
    optimiser = kind([weight])
    assert clip_grad_norm([weight], 1.0) == 0
    optimiser.step()
    assert torch.equal(weight, before)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # inside torch.optim.Adagrad
def test_rowwise_adagrad_of_width_one_is_adagrad() -> None:
    ours, theirs = table(width=1), table(width=1)
    mine = RowWiseAdagrad([ours], lr=0.1, eps=1e-10)
    reference = torch.optim.Adagrad([theirs], lr=0.1, eps=1e-10)
    for ids, values in steps(6):
        ours.grad, theirs.grad = (sparse_grad(ours, ids, values[:, :1].copy()) for _ in range(2))
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_dense_gradients_and_bad_arguments_are_refused() -> None:
    weight = table()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match=r"\(50, 3\) has a dense one"):
        LazyAdam([weight]).step()
    with pytest.raises(ValueError, match="lr must be at least 0"):
        RowWiseAdagrad([weight], lr=-1.0)
    with pytest.raises(ValueError, match="betas"):
        LazyAdam([weight], betas=(0.9, 1.0))


def test_clipping_takes_the_norm_of_summed_rows_and_dense_parameters_together() -> None:
    weight, dense = table(), torch.nn.Parameter(torch.zeros(4))
    unused = torch.nn.Parameter(torch.zeros(2))
    ids, values = steps(7)[0]
    weight.grad = sparse_grad(weight, ids, values)
    dense.grad = torch.tensor([1.0, -2.0, 3.0, 4.0])
    full = np.concatenate([weight.grad.to_dense().numpy().ravel(), dense.grad.numpy()])
    norm = np.linalg.norm(full.astype(np.float64))
    assert float(clip_grad_norm([weight, dense, unused], 0.5)) == pytest.approx(norm, rel=1e-6)
    clipped = np.concatenate([weight.grad.to_dense().numpy().ravel(), dense.grad.numpy()])
    np.testing.assert_allclose(clipped, full * 0.5 / norm, rtol=1e-5)
    assert weight.grad.is_coalesced()
    # Below the limit, and without one, nothing changes.
    for limit in (0.6, None):
        clip_grad_norm([weight, dense], limit)
        assert torch.equal(dense.grad, torch.from_numpy(clipped[-4:]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_given_and_clips_nothing(bad: float) -> None:
    dense = torch.nn.Parameter(torch.zeros(3))
    dense.grad = torch.tensor([1.0, bad, 2.0])
    assert not torch.isfinite(clip_grad_norm([dense], 1.0))
    assert dense.grad[0] == 1.0


def test_coalesced_sums_duplicates_and_recognises_rows_that_are_in_order() -> None:
    weight = table()
    ids, values = steps(8)[0]
    grad = sparse_grad(weight, ids, values)
    torch.testing.assert_close(coalesced(grad).to_dense(), grad.to_dense())
    ordered = torch.sparse_coo_tensor([[1, 4, 7]], torch.randn(3, WIDTH), weight.shape)
    assert not ordered.is_coalesced()
    assert coalesced(ordered)._values().data_ptr() == ordered._values().data_ptr()
    repeated = torch.sparse_coo_tensor([[1, 1, 7]], torch.ones(3, WIDTH), weight.shape)
    assert coalesced(repeated)._indices().tolist() == [[1, 7]]


def test_the_gradient_of_a_look_up_reaches_the_optimiser_without_another_sort() -> None:
    weight = table()
    gather_rows(weight, torch.tensor([[3, 1], [3, 9]], dtype=torch.int32)).sum().backward()
    assert weight.grad is not None
    assert coalesced(weight.grad)._values().data_ptr() == weight.grad._values().data_ptr()


def test_lazy_zeros_are_zeros_that_can_be_written() -> None:
    zeros = lazy_zeros((5000, 4), torch.zeros(1))
    assert zeros.shape == (5000, 4)
    assert not zeros.any()
    zeros[17] = 1.0
    assert zeros.sum() == 4
    assert lazy_zeros((2, 2), torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_state_takes_memory_only_for_touched_rows() -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("this system does not say how much memory a process has")
    before = int(statm.read_text().split()[1])
    state = lazy_zeros((4_000_000, 16), torch.zeros(1))  # 256 MB
    state[:1000] = 1.0
    assert (int(statm.read_text().split()[1]) - before) * mmap.PAGESIZE < 50e6
