import numpy as np
import torch
from torch import nn

from mldcn.study.least_squares import fit_least_squares
from mldcn.study.polynomial_models import Predictor, Rival


class Linear(nn.Linear):
    def forward(self, x):
        return super().forward(x)[:, 0]


def rows(count, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, features, generator=generator, dtype=torch.float64) * 2 - 1


def test_a_linear_model_ends_at_the_solution_of_least_squares():
    x = rows(700, 3)  # more than a chunk
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.3 + 0.1 * torch.randn(700, dtype=torch.float64)
    model = Linear(3, 1).double()
    fit_least_squares(model, x, y, 20)
    expected, *_ = np.linalg.lstsq(np.c_[x.numpy(), np.ones(700)], y.numpy(), rcond=None)
    found = np.append(model.weight.detach().numpy(), model.bias.item())
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_products_of_small_weights_are_found():
    """Near zero all weights of an order-3 term have next to no gradient."""
    x = rows(500, 4)
    y = x[:, 0] * x[:, 1] * x[:, 2]
    torch.manual_seed(0)
    model = Predictor(Rival(title="x", interaction={"name": "dcnv2"}), 4, 2).double()
    with torch.no_grad():
        for parameter in model.interaction.parameters():
            parameter.mul_(0.01)
    fit_least_squares(model, x, y, 60)
    with torch.no_grad():
        assert (model(x) - y).abs().max() < 1e-5


def test_a_model_that_cannot_be_bettered_is_left_alone():
    x = rows(50, 2)
    model = Linear(2, 1).double()
    with torch.no_grad():
        y = model(x)
    before = [parameter.clone() for parameter in model.parameters()]
    fit_least_squares(model, x, y, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
