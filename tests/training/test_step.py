"""A batch computed in parts of rows gives what it gives as a whole."""

import pytest
import torch

from mldcn import model as model_module
from mldcn.config import ModelConfig
from mldcn.data.batch import Batch, EncodedLayout, IdSlot
from mldcn.model import Ranker
from mldcn.schema import Categorical, Label, Schema
from mldcn.training.loss import task_losses
from mldcn.training.step import backpropagate

ROWS, WIDTH = 50, 8
TASK_WEIGHTS = torch.tensor([1.0, 0.5])


def ranker(**options):
    torch.manual_seed(0)
    slots = tuple(IdSlot(name, name, "item", i, 1) for i, name in enumerate(("ad", "user")))
    layout = EncodedLayout(slots, (), {"ad": 9, "user": 30}, ("click", "save"), 4)
    schema = Schema(
        features=tuple(Categorical(name=name, kind="categorical") for name in ("ad", "user")),
        labels=(Label(name="click"), Label(name="save")),
    )
    raw = {"embedding": {"dim": WIDTH // 2}, "interaction": {"name": "dcnv2"}, **options}
    return Ranker(ModelConfig.model_validate(raw), schema, layout)


def batch():
    draw = torch.Generator().manual_seed(1)
    labels = (torch.rand(ROWS, 2, generator=draw) < 0.3).float()
    labels[::3, 1] = torch.nan  # the second task is unknown in a third of the rows
    ids = torch.stack([torch.randint(0, n, (ROWS,), generator=draw) for n in (9, 30)], dim=1).int()
    weight = torch.rand(ROWS, generator=draw)
    return Batch(ids, torch.zeros(ROWS, 0), labels, weight, torch.randint(0, 5, (ROWS,), generator=draw))


def gradients(model, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(model_module, "PART_NUMBERS", rows_at_a_time * WIDTH)
    model.zero_grad()
    loss = backpropagate(model, batch(), TASK_WEIGHTS)
    found = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
    return loss, found


@pytest.mark.parametrize("rows_at_a_time", [1, 16, 64])
def test_parts_sum_to_the_batch(rows_at_a_time, monkeypatch):
    model, whole = ranker(), batch()
    losses = task_losses(model(whole.ids, whole.dense, whole.position), whole.labels, whole.weight)
    loss = (losses * TASK_WEIGHTS).sum()
    loss.backward()
    expected = {name: p.grad.to_dense() for name, p in model.named_parameters()}
    found_loss, found = gradients(model, rows_at_a_time, monkeypatch)
    torch.testing.assert_close(found_loss, loss.detach())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient)


def test_the_parts_are_those_of_rows(monkeypatch):
    monkeypatch.setattr(model_module, "PART_NUMBERS", 16 * WIDTH)
    parts = ranker().parts(ROWS, torch.device("cpu"))
    assert [range(ROWS)[part] for part in parts] == [
        range(16),
        range(16, 32),
        range(32, 48),
        range(48, 50),
    ]
    assert ranker().parts(ROWS, torch.device("cuda")) == [slice(0, ROWS)]
    assert ranker().parts(0, torch.device("cpu")) == [slice(0, 0)]


def test_batch_norm_sees_the_whole_batch(monkeypatch):
    options = {"deep": {"hidden": (8,), "batch_norm": True}}
    loss, found = gradients(ranker(**options), 16, monkeypatch)
    expected_loss, expected = gradients(ranker(**options), 1000, monkeypatch)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_relevance_in_parts_is_the_model_without_the_position(monkeypatch):
    monkeypatch.setattr(model_module, "PART_NUMBERS", 16 * WIDTH)
    model, rows = ranker().eval(), batch()
    found = model.relevance(rows.ids, rows.dense)
    assert found.shape == (ROWS, 2)
    torch.testing.assert_close(found + model.position_logit(None), model(rows.ids, rows.dense))
    assert model.relevance(rows.ids[:0], rows.dense[:0]).shape == (0, 2)
