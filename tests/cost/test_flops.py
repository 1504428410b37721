"""What is counted: products of matrices and vectors, element-wise arithmetic, rows looked up."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mldcn import interactions
from mldcn.cost import Work, WorkCounter, interaction_work, module_flops, total
from mldcn.cost.flops import REST, meta, per_example
from mldcn.layout import FieldLayout

LAYOUT = FieldLayout.build(
    [
        ("age", "numeric", "user", 1),
        *((name, "categorical", "user", 8) for name in "abcd"),
        ("title", "embedding", "item", 5),
    ]
)


def work(run):
    counter = WorkCounter()
    with torch.no_grad(), counter.watching():
        run()
    return counter.work[REST]


def test_flops_are_two_a_multiply_add_and_example():
    assert module_flops(nn.Linear(3, 5), torch.zeros(7, 3)) == 2 * 3 * 5
    assert module_flops(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LayerNorm(5)), torch.zeros(2, 3)) == 30


class Cross(nn.Module):
    """Cross layers whose weights are plain parameters, as the field's libraries write them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.vector = nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.stack = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        return {
            "vector": lambda: x * (x @ self.vector).unsqueeze(1),
            "matrix": lambda: x * (x @ self.matrix),
            "einsum": lambda: x * torch.einsum("bi,ij->bj", x, self.matrix),
            "functional": lambda: x * functional.linear(x, self.matrix, self.vector),
            "stack": lambda: torch.einsum("bi,kij->bkj", x, self.stack),
            "convolution": lambda: functional.conv1d(x.unsqueeze(1), self.vector.view(1, 1, 6)),
        }[self.kind]()


@pytest.mark.parametrize(
    ("kind", "macs"),
    [("vector", 6), ("matrix", 36), ("einsum", 36), ("functional", 36), ("stack", 108), ("convolution", 6)],
)
def test_every_kind_of_parameter_is_counted(kind, macs):
    module, x = Cross(kind), torch.randn(4, 6)
    assert module_flops(module, x) == 2 * macs
    assert work(lambda: module(x)).gemm == 4 * 2 * macs
    with FlopCounterMode(display=False) as counter:
        module(x)
    # PyTorch itself leaves out the product with a vector.
    assert counter.get_total_flops() == (0 if kind == "vector" else 4 * 2 * macs)


@pytest.mark.parametrize(
    ("run", "elementwise"),
    [
        (lambda x: x + x, 12),
        (lambda x: (x * x).relu(), 24),
        (lambda x: x.sum(dim=1), 12),
        (lambda x: x.softmax(dim=1), 48),
        (lambda x: functional.layer_norm(x, (4,), torch.ones(4), torch.ones(4)), 96),
        (lambda x: functional.batch_norm(x, torch.zeros(4), torch.ones(4)), 24),
        (lambda x: functional.linear(x, torch.ones(5, 4), torch.ones(5)), 15),
        (lambda x: functional.linear(x, torch.ones(5, 4)), 0),
        (lambda x: torch.cat([x, x.clone()]).t().reshape(-1).double(), 0),
        (lambda x: (torch.arange(9) + 1) * 2, 0),
        (lambda x: x > 0, 0),
    ],
)
def test_element_wise_work_by_hand(run, elementwise):
    x = torch.rand(3, 4)
    assert work(lambda: run(x)).elementwise == elementwise
    with torch.inference_mode():
        assert work(lambda: run(x)).elementwise == elementwise


def test_rows_looked_up_are_counted_in_bytes():
    table = torch.zeros(10, 6)
    assert (
        work(lambda: functional.embedding(torch.zeros(3, 2, dtype=torch.int64), table)).row_bytes
        == 3 * 2 * 24
    )


@pytest.mark.parametrize("rank", [8, 12])
def test_element_wise_work_of_mldcn_is_its_closed_form(rank):
    """A layer's bias and ReLU of the mask (2k), its bias and product (2r); bias, x0, residual (3d), norm (8d)."""
    d, layers, k = 40, 3, rank // 2
    with meta():
        module = interactions.build({"name": "mldcn", "num_layers": layers, "rank": rank}, d).eval()
    example, call = interaction_work(module, d)
    assert example.elementwise == layers * (2 * k + 2 * rank + 11 * d)
    assert call == Work()


@pytest.mark.parametrize("name", interactions.names())
def test_counts_on_meta_are_the_closed_formula(name):
    with meta():
        module = interactions.build({"name": name}, LAYOUT).eval()
    assert all(parameter.is_meta for parameter in module.parameters())
    example, call = interaction_work(module, LAYOUT)
    assert (example.gemm, call.gemm) == (module.flops(), 0)
    real = interactions.build({"name": name}, LAYOUT).eval()
    widths = [LAYOUT.width, *(side.width(LAYOUT) for side in real.sides)]
    assert module_flops(real, *(torch.randn(3, width) for width in widths)) == example.gemm


def test_work_of_weights_alone_is_once_a_pass():
    left, right = torch.zeros(6, 2), torch.zeros(2, 5)
    example, call = per_example(lambda rows: torch.zeros(rows, 6) @ (left @ right))
    assert total(example) == Work(gemm=2 * 6 * 5)
    assert total(call) == Work(gemm=2 * 6 * 2 * 5)


def test_parts_are_told_apart_and_left_as_they_were():
    first, second = nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 7), nn.ReLU())
    example, _ = per_example(
        lambda rows: second(first(torch.zeros(rows, 3))) * 2, {"one": [first], "two": [second]}
    )
    assert example == {
        "one": Work(2 * 3 * 5, 5),
        "two": Work(2 * 5 * 7, 7 + 7),
        REST: Work(0, 7),
    }
    assert not first._forward_hooks
    assert not first._forward_pre_hooks
