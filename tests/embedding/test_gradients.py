"""Gradients of tables: equal to autograd's dense ones, sparse, each row once, and none for padding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mldcn.config import EmbeddingConfig, parse
from mldcn.data.batch import MISSING, DenseSlot, EncodedLayout, IdSlot
from mldcn.embedding import Embedder
from mldcn.embedding.tables import gather_rows
from mldcn.schema import Schema


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("masked", [True, False])
def test_the_sparse_gradient_is_the_dense_one(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    ours = torch.randn(30, 4, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    rows = torch.randint(0, 10, (8, 5), dtype=dtype)
    keep = torch.rand(8, 5) < 0.5 if masked else None
    factor = torch.randn(8, 5, 4)
    out = gather_rows(ours, rows, keep)
    (out * factor).sum().backward()
    if keep is not None:
        factor = factor * keep.unsqueeze(2)
    (functional.embedding(rows, theirs) * factor).sum().backward()
    torch.testing.assert_close(out, functional.embedding(rows, theirs))
    assert ours.grad is not None
    assert ours.grad.is_sparse
    touched = rows[keep] if keep is not None else rows
    assert ours.grad._indices()[0].tolist() == sorted(set(touched.flatten().tolist()))
    torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)


def test_nothing_kept_gives_an_empty_gradient() -> None:
    weight = torch.randn(5, 2, requires_grad=True)
    rows = torch.zeros(3, 4, dtype=torch.int32)
    gather_rows(weight, rows, torch.zeros(3, 4, dtype=torch.bool)).sum().backward()
    assert weight.grad is not None
    assert weight.grad._nnz() == 0


def test_gradients_of_two_backward_passes_add_up() -> None:
    weight = torch.zeros(5, 2, requires_grad=True)
    for row in (1, 1, 3):
        gather_rows(weight, torch.tensor([[row]])).sum().backward()
    assert weight.grad is not None
    assert weight.grad.to_dense()[:, 0].tolist() == [0, 2, 0, 1, 0]


def test_the_sum_does_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 8, requires_grad=True)
    rows, factor = torch.randint(0, 50, (500, 20)), torch.randn(500, 20, 8)
    grads, threads = [], torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            weight.grad = None
            (gather_rows(weight, rows) * factor).sum().backward()
            assert weight.grad is not None
            grads.append(weight.grad.to_dense())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*grads)


FEATURES = [
    {"name": "item", "kind": "categorical"},
    {"name": "m", "kind": "multi", "max_length": 3, "encoding": {"kind": "hash", "rows": 10, "hashes": 2}},
    {"name": "mx", "kind": "multi", "max_length": 2, "pooling": "max"},
    {
        "name": "h",
        "kind": "sequence",
        "share": "item",
        "max_length": 3,
        "pooling": "attention",
        "target": "item",
        "times": "when",
        "actions": "acts",
    },
    {"name": "v", "kind": "embedding", "width": 3, "project_to": 2},
]
SCHEMA = parse(Schema, {"features": FEATURES, "labels": [{"name": "y"}], "time": "ts"}, "test")
LAYOUT = EncodedLayout(
    (
        IdSlot("item", "item", "item", 0, 1),
        IdSlot("m", "m", "user", 1, 3, 2, "multi"),
        IdSlot("mx", "mx", "user", 7, 2, 1, "multi"),
        IdSlot("h", "item", "user", 9, 3, 1, "sequence"),
        IdSlot("h", "h.actions", "user", 12, 3, 1, "sequence", "actions"),
    ),
    (DenseSlot("h", "user", 0, 3, "sequence"), DenseSlot("v", "item", 3, 3, "embedding")),
    {"item": 8, "m": 10, "mx": 6, "h.actions": 4},
    ("y",),
)


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    model = Embedder(LAYOUT, SCHEMA, EmbeddingConfig(dim=3, normalise="l2", init_std=1.0)).double()
    ids = torch.tensor(
        [
            [2, 3, 4, 0, 5, 9, 0, 2, 3, 4, 2, 0, 1, 0, 0],
            [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [5, 2, 2, 8, 2, 3, 4, 4, 0, 5, 5, 7, 3, 2, 1],
        ],
        dtype=torch.int32,
    )
    dense = torch.rand(3, 6, dtype=torch.float64)
    factor = torch.randn(3, model.layout.width, dtype=torch.float64)
    (model(ids, dense) * factor).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad.to_dense().reshape(-1)
        flat = parameter.detach().reshape(-1)
        for i in torch.randperm(len(flat))[:25].tolist():
            ends = []
            for change in (1e-6, -2e-6):
                flat[i] += change
                with torch.no_grad():
                    ends.append(float((model(ids, dense) * factor).sum()))
            flat[i] += 1e-6
            assert float(grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6), name


def test_padding_touches_no_row() -> None:
    model = Embedder(LAYOUT, SCHEMA, EmbeddingConfig(dim=3))
    ids = torch.zeros(4, 15, dtype=torch.int32)
    ids[:, 0] = 3
    ids[0, 9], ids[0, 12] = 5, MISSING  # one real item, whose action is not known
    model(ids, torch.zeros(4, 6)).sum().backward()
    (weight,) = model.tables().values()
    assert weight.grad is not None
    (stack,) = model.stacks.values()
    touched = {
        table: [int(r) - span.start for r in weight.grad._indices()[0] if span.start <= r < span.stop]
        for table, span in stack.spans.items()
    }
    assert touched == {"item": [3, 5], "m": [], "mx": [], "h.actions": [0]}


def test_only_tables_have_sparse_gradients() -> None:
    model = Embedder(LAYOUT, SCHEMA, EmbeddingConfig(dim=3, dims={"m": 2}, normalise="layer"))
    model(torch.ones(2, 15, dtype=torch.int32), torch.rand(2, 6)).square().sum().backward()
    sparse = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse}
    assert sparse == set(model.tables()) == {"stacks.width_2.weight", "stacks.width_3.weight"}
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_and_training_agree() -> None:
    model = Embedder(LAYOUT, SCHEMA, EmbeddingConfig(dim=3))
    ids, dense = torch.randint(0, 4, (6, 15), dtype=torch.int32), torch.rand(6, 6)
    with torch.no_grad():
        still = model(ids, dense)
    assert torch.equal(still, model(ids, dense))
