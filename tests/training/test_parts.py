"""The loop's parts, each alone."""

import math
import signal

import numpy as np
import pytest
import torch
from torch import nn

from mldcn.config import OptimiserConfig
from mldcn.training.ema import WeightAverage
from mldcn.training.interrupt import stop_signals
from mldcn.training.loss import task_losses
from mldcn.training.schedule import lr_factor


def test_loss_masks_null_labels_and_weighs_rows_and_tasks():
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0], [0.0, math.nan], [1.0, 1.0]])
    weight = torch.tensor([1.0, 2.0, 0.5])
    y, w, p = labels.numpy(), weight.numpy(), 1 / (1 + np.exp(-logits.numpy()))
    bce = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    first = (bce[:, 0] * w).sum() / w.sum()
    second = (bce[0, 1] * w[0] + bce[2, 1] * w[2]) / (w[0] + w[2])
    loss = (task_losses(logits, labels, weight) * torch.tensor([1.0, 0.3])).sum()
    assert loss.item() == pytest.approx(first + 0.3 * second, rel=1e-6)


def test_a_task_without_known_labels_adds_nothing_and_no_gradient():
    logits = torch.zeros(2, 2, requires_grad=True)
    labels = torch.tensor([[1.0, math.nan], [0.0, math.nan]])
    loss = task_losses(logits, labels, torch.ones(2)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad[:, 1].tolist() == [0.0, 0.0]


def test_schedules():
    warm = OptimiserConfig(warmup_steps=3, schedule="linear", final_lr=0.1)
    assert [lr_factor(warm, s, 13) for s in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(warm, 8, 13) == pytest.approx(0.55)
    assert lr_factor(warm, 13, 13) == lr_factor(warm, 99, 13) == pytest.approx(0.1)
    cosine = OptimiserConfig(schedule="cosine")
    assert lr_factor(cosine, 5, 10) == pytest.approx(0.5)
    assert lr_factor(OptimiserConfig(), 10**9, 10) == 1.0


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(2, 1)
        self.table = nn.Embedding(6, 2)


def test_average_of_touched_rows_equals_the_dense_average():
    torch.manual_seed(0)
    model = Small()
    average = WeightAverage(model, 0.9, {"table": model.table.weight})
    expected = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    for step in range(1, 31):
        rows = torch.unique(torch.randint(6, (2,)))
        average.before_step({"table.weight": rows})
        with torch.no_grad():
            model.table.weight[rows] += torch.randn(len(rows), 2)
            model.dense.weight += torch.randn(1, 2)
        average.after_step({"table.weight": rows})
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    raw = {n: p.detach().clone() for n, p in model.named_parameters()}
    with average.applied():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, raw[name])


def test_the_first_signal_asks_and_the_second_interrupts(request):
    # A shell that starts the tests in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), stop_signals() as asked:
        assert not asked.is_set()
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
