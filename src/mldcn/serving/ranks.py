"""Serving cross layers at a smaller rank: their matrices become products of two thinner ones, by truncated SVD."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mldcn.errors import UserError
from mldcn.interactions.cross import CrossLayer, LowRankCrossLayer
from mldcn.interactions.mldcn import MLDCNLayer
from mldcn.model import Ranker


def cut_ranks(model: Ranker, rank: int) -> tuple[int, int]:
    """Makes a model's cross layers of DCN V2 and ML-DCN no wider inside than ``rank``, in place.

    The nearest matrix of a rank in the sum of squares is the truncated SVD (Eckart and Young). A full layer's W
    and the product ``U V^T`` of a low-rank layer become two factors of that rank. Where something stands between
    the factors, the mask of ML-DCN or a ReLU, each of them becomes a product of its own: the mask keeps its width.
    What would not become cheaper is left alone.

    Args:
        model: to be served.
        rank: the largest.

    Returns:
        GEMM FLOPs per example of these layers, before and after.

    Raises:
        UserError: no layer becomes cheaper.
    """
    before = after = 0
    for layers in [
        module for module in model.scorer.interaction.modules() if isinstance(module, nn.ModuleList)
    ]:
        for i, layer in enumerate(layers):
            if not isinstance(layer, CrossLayer | LowRankCrossLayer | MLDCNLayer):
                continue
            before += layer.flops()
            layers[i] = _cut(layer, rank)
            after += _flops(layers[i])
    if after == before:
        raise UserError(
            f"--max-rank {rank}: no layer gets cheaper by it; it is for dcnv2, dcnv2_lowrank and mldcn, and for "
            "ranks well below theirs"
        )
    return before, after


class CutMLDCNLayer(nn.Module):
    """An ML-DCN layer whose factors are products: x becomes R numbers, these r, which are masked, and so back.

    Args:
        layer: used up.
        rank: R.
    """

    def __init__(self, layer: MLDCNLayer, rank: int) -> None:
        super().__init__()
        down, up = layer.down, layer.up
        layer.down = _product(down.weight, None, rank)  # type: ignore[assignment]
        lift = _product(up.weight, up.bias, rank)
        layer.up = cast(nn.Linear, lift[1])
        self.layer = layer
        self.narrow = lift[0]

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """As :meth:`MLDCNLayer.forward`."""
        return self.layer.crossed(x0, x, self.narrow(self.layer.masked(x0, x)))


def _cut(layer: CrossLayer | LowRankCrossLayer | MLDCNLayer, rank: int) -> nn.Module:
    if isinstance(layer, CrossLayer):
        if _is_cheaper(layer.linear, rank):
            layer.linear = _product(layer.linear.weight, layer.linear.bias, rank)  # type: ignore[assignment]
    elif isinstance(layer, MLDCNLayer):
        if _is_cheaper(layer.down, rank):
            return CutMLDCNLayer(layer, rank)
    elif not layer.relu:
        if rank < layer.down.out_features:
            # Without ever making the product: its SVD is that of the factors' triangular parts.
            q, r = torch.linalg.qr(layer.up.weight.double())
            p, s = torch.linalg.qr(layer.down.weight.double().t())
            right, left = _product(r @ s.t(), None, rank)
            layer.down = _linear(right.weight.double() @ p.t())
            layer.up = _linear(q @ left.weight.double(), layer.up.bias)
    elif _is_cheaper(layer.down, rank):
        layer.down = _product(layer.down.weight, None, rank)  # type: ignore[assignment]
        layer.up = _product(layer.up.weight, layer.up.bias, rank)  # type: ignore[assignment]
    return layer


def _is_cheaper(linear: nn.Linear, rank: int) -> bool:
    return rank * (linear.in_features + linear.out_features) < linear.in_features * linear.out_features


def _product(weight: Tensor, bias: Tensor | None, rank: int) -> nn.Sequential:
    """The nearest map of a rank as two linear maps; what the singular values scale is halved between them."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = values[:rank].sqrt()
    return nn.Sequential(_linear(root[:, None] * right[:rank]), _linear(left[:, :rank] * root, bias))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _flops(layer: nn.Module) -> int:
    return sum(2 * each.weight.numel() for each in layer.modules() if isinstance(each, nn.Linear))
