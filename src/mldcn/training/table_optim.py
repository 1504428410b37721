"""Optimisers for embedding tables whose step costs what the touched rows cost, however tall the table is.

They read row-sparse gradients, such as those of ``mldcn.embedding``. The gradients of a row that occurs
several times in a batch are summed first: both methods square the gradient, so that the order matters.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class _TableOptimiser(torch.optim.Optimizer):
    """What both optimisers share: arguments, the gradient's rows, and L2 on them."""

    def _check(self, lr: float, eps: float, l2: float) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("l2", l2)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, found {value}")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the rows that the gradients touch, and nothing else.

        Raises:
            TypeError: a parameter's gradient is dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                if not table.grad.is_sparse:
                    raise TypeError(
                        f"{type(self).__name__} reads row-sparse gradients; a table of shape "
                        f"{tuple(table.shape)} has a dense one. Give dense parameters another optimiser"
                    )
                grad = coalesced(table.grad)
                rows, values = grad._indices()[0], grad._values()
                if rows.numel():
                    weights = table.index_select(0, rows)
                    if group["l2"]:
                        values = torch.add(values, weights, alpha=group["l2"])
                    self._update(table, self.state[table], group, rows, weights, values)
                    table.index_copy_(0, rows, weights)
        return loss

    def _update(
        self,
        table: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rows: Tensor,
        weights: Tensor,
        g: Tensor,
    ) -> None:
        """Moves ``weights (U, e)``, the table's distinct ``rows (U,)``, in place by their gradient ``g``."""
        raise NotImplementedError


class RowWiseAdagrad(_TableOptimiser):
    r"""Adagrad with one accumulator a row.

    For each touched row ``i`` with summed gradient ``g_i`` of width ``e`` (plus ``l2 * w_i``)::

        G_i <- G_i + mean_d g_id ** 2
        w_i <- w_i - lr * g_i / (sqrt(G_i) + eps)

    It takes the mean over the width, not the sum, as FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` does. The state is
    one float a row.

    Args:
        params: tables ``(N, e)``.
        lr: learning rate.
        eps: added to the root.
        l2: strength of the penalty ``l2 / 2 * |w_i| ** 2`` on touched rows.
    """

    def __init__(self, params: Any, lr: float = 1e-2, eps: float = 1e-8, l2: float = 0.0) -> None:
        self._check(lr, eps, l2)
        super().__init__(params, {"lr": lr, "eps": eps, "l2": l2})

    def _update(
        self,
        table: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rows: Tensor,
        weights: Tensor,
        g: Tensor,
    ) -> None:
        if not state:
            state["sum"] = lazy_zeros((table.shape[0],), table)
        total = state["sum"].index_select(0, rows).add_(g.square().mean(1))
        state["sum"].index_copy_(0, rows, total)
        weights.addcdiv_(g, total.sqrt().add_(group["eps"]).unsqueeze(1), value=-group["lr"])


class LazyAdam(_TableOptimiser):
    r"""Adam that lets untouched rows rest: their weights and moments stay as they are.

    For each touched row with summed gradient ``g`` (plus ``l2 * w``), at the table's ``t``-th step::

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g ** 2
        w <- w - lr * (m / (1 - b1 ** t)) / (sqrt(v / (1 - b2 ** t)) + eps)

    ``t`` counts the table's steps, not the row's, as in ``torch.optim.SparseAdam``: a row first seen late
    moves by ``lr (1 - b1) / sqrt(1 - b2)``, some 3 lr, where Adam on dense gradients moves it by some 32 lr
    in all over the steps that follow. Unlike ``SparseAdam`` this adds ``eps`` to the bias-corrected root, as
    ``torch.optim.Adam`` does, and has ``l2``. Unlike here, ``Adam`` on dense gradients goes on moving rows
    that no longer occur, and lets their moments decay at every step.

    The state is two floats a weight. Both moments of a row lie side by side (``moments (N, 2, e)``), so that
    a step reaches for one place in memory and not two.

    Args:
        params: tables ``(N, e)``.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root.
        l2: strength of the penalty ``l2 / 2 * |w| ** 2`` on touched rows.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2: float = 0.0,
    ) -> None:
        self._check(lr, eps, l2)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), found {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "l2": l2})

    def _update(
        self,
        table: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        rows: Tensor,
        weights: Tensor,
        g: Tensor,
    ) -> None:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["moments"] = lazy_zeros((table.shape[0], 2, table.shape[1]), table)
        state["step"] += 1
        step = int(state["step"])
        b1, b2 = group["betas"]
        moments = state["moments"].index_select(0, rows)
        first, second = moments.unbind(1)
        first.lerp_(g, 1 - b1)
        second.mul_(b2).addcmul_(g, g, value=1 - b2)
        state["moments"].index_copy_(0, rows, moments)
        root = (second / (1 - b2**step)).sqrt_().add_(group["eps"])
        weights.addcdiv_(first, root, value=-group["lr"] / (1 - b1**step))


def coalesced(grad: Tensor) -> Tensor:
    """A sparse gradient with each row once, in rising order.

    Autograd drops the mark that a gradient is coalesced, and to coalesce it again would cost more than the
    optimiser's step; so the rows are looked at, which is cheap.
    """
    if grad.is_coalesced():
        return grad
    rows = grad._indices()[0]
    if bool((rows[1:] > rows[:-1]).all()):
        return torch.sparse_coo_tensor(
            grad._indices(), grad._values(), grad.shape, check_invariants=False, is_coalesced=True
        )
    return grad.coalesce()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales all gradients together so that their L2 norm is at most ``max_norm``.

    Sparse gradients are coalesced first (and stay so), so that the norm is that of the summed rows.

    Args:
        parameters: dense and row-sparse ones; those without a gradient are passed over.
        max_norm: the highest norm; None only measures.

    Returns:
        The norm before scaling, a scalar. Where it is not finite no gradient is changed on a CPU; on another
        device, which is not waited for, they are spoilt.
    """
    values = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            parameter.grad = grad = coalesced(grad)
            grad = grad._values()
        values.append(grad)
    if not values:
        return torch.zeros(())
    total = torch.nn.utils.get_total_norm(values)
    if max_norm is None:
        return total
    if total.device.type != "cpu":
        scale = (max_norm / total).clamp(max=1.0)
        torch._foreach_mul_(values, scale)
    elif math.isfinite(float(total)) and float(total) > max_norm:
        for value in values:
            value.mul_(max_norm / float(total))
    return total


def lazy_zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of another tensor's dtype, on its device; a CPU's memory is taken only as rows are touched.

    ``torch.zeros`` writes its zeros, so that the state of 5e7 rows would cost all its memory at once.
    """
    size = torch.Size(shape).numel() * like.element_size()
    # Fake tensors have no memory to spare, and live in a world of their own.
    plain = like.device.type == "cpu" and not isinstance(like, FakeTensor)
    if sys.platform == "win32" or not plain or size < mmap.PAGESIZE:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
