"""Levenberg-Marquardt for models small enough for a matrix of parameters by parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

CHUNK = 500  # rows whose gradients are held at a time
BLOCKS = 8  # of a symmetric product's rows; what lies left of a block's diagonal is not computed
LEAST_DAMPING = 1e-8
FLAT = 1e-5  # three steps in a row that lower the loss by less than this share of it end the fit


def fit_least_squares(
    model: nn.Module, x: Tensor, y: Tensor, iterations: int, *, damping: float = 1e-2
) -> float:
    """Fits a model to rows by Levenberg-Marquardt.

    A step solves ``(J^T J + mu I) s = J^T r`` with the residuals ``r``, their gradients ``J`` (one row each) and
    ``mu`` = damping times the mean of the diagonal. A step that lowers the mean square is taken and the damping
    falls; else the damping rises and the step is solved again. Flat directions get large steps: products of small
    weights, where a gradient step hardly moves, are found.

    Args:
        model: ``(B, d) -> (B,)``; its rows do not depend on each other. Its parameters are changed in place.
        x: ``(B, d)``.
        y: ``(B,)``, of the parameters' type.
        iterations: at most so many steps.
        damping: of the first step.

    Returns:
        The damping that a later fit may go on with.
    """
    with torch.no_grad():
        weights = nn.utils.parameters_to_vector(model.parameters())
    problem = _Problem(model, x, y)
    loss, flat = problem.loss(weights), 0
    for _ in range(iterations):
        found = problem.step(weights, loss, damping)
        if found is None or flat == 3:
            break
        weights, now, damping = found
        flat = flat + 1 if loss - now < FLAT * loss else 0
        loss = now
    with torch.no_grad():
        nn.utils.vector_to_parameters(weights, model.parameters())
    return damping


class _Problem:
    """The sum of squares as a function of all weights in one vector."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [parameter.shape for parameter in model.parameters()]
        self.gradients = vmap(grad(self._one), in_dims=(None, 0))

    def loss(self, weights: Tensor) -> float:
        with torch.no_grad():
            return (self._predict(weights, self.x) - self.y).square().mean().item()

    def step(self, weights: Tensor, loss: float, damping: float) -> tuple[Tensor, float, float] | None:
        """Weights of less loss, the loss and the next damping; None where no step lowers it."""
        gram, right = self._normal_equations(weights)
        scale = gram.diagonal().mean()
        for _ in range(12):
            damped = gram + damping * scale * torch.eye(len(gram)).to(gram)
            factor, failed = torch.linalg.cholesky_ex(damped, upper=True)
            if not failed:
                there = weights + torch.cholesky_solve(right[:, None], factor, upper=True)[:, 0]
                now = self.loss(there)
                if now < loss:
                    return there, now, max(damping / 3, LEAST_DAMPING)
            damping *= 4
        return None

    def _normal_equations(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The upper triangle of ``J^T J``, and ``J^T r``, over the rows.

        The products are in float32, which leaves the minimum where it is.
        """
        low = weights.float()
        spans = torch.arange(len(weights)).chunk(BLOCKS)
        gram = torch.zeros(len(weights), len(weights), dtype=torch.float32)
        right = torch.zeros_like(weights)
        for x, y in zip(torch.split(self.x, CHUNK), torch.split(self.y, CHUNK), strict=True):
            jacobian = self.gradients(low, x.float())  # (rows, parameters)
            for span in spans:
                first, end = int(span[0]), int(span[-1]) + 1
                gram[first:end, first:].addmm_(jacobian[:, first:end].T, jacobian[:, first:])
            with torch.no_grad():
                residual = y - self._predict(weights, x)
            right += jacobian.T @ residual.float()
        return gram.to(weights) / len(self.x), right / len(self.x)

    def _predict(self, weights: Tensor, x: Tensor) -> Tensor:
        sizes = [shape.numel() for shape in self.shapes]
        parts = torch.split(weights, sizes)
        named = {
            name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        out: Tensor = functional_call(self.model, named, (x,))
        return out

    def _one(self, weights: Tensor, row: Tensor) -> Tensor:
        return self._predict(weights, row[None])[0]
