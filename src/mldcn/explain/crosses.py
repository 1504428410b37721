"""The matrices that cross fields with fields: where a model has them, and how strong each block of one is.

A cross layer computes ``x0 * (W x)``: the block ``W_ij`` scales the products of field i's columns of ``x0``
with field j's columns of the layer's input (DCN V2, Section 7.6 and Figure 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mldcn.interactions.cross import CrossLayer, CrossNetwork, DCNMix, ExpertCrossLayer, LowRankCrossLayer
from mldcn.interactions.dcn import VectorCrossLayer
from mldcn.interactions.gdcn import GDCN, GatedCrossLayer
from mldcn.interactions.mldcn import MLDCN, MLDCNLayer
from mldcn.interactions.moe import MMoE, MoE
from mldcn.interactions.parallel import ParallelDCNV2
from mldcn.layout import FieldLayout

Floats = NDArray[np.float64]
_CHUNK = 1 << 22  # numbers of a product at a time


@dataclass(frozen=True)
class CrossSite:
    """A cross layer of a model.

    Args:
        name: such as ``layer 1``.
        layer: the module, called with ``x0`` and ``x``.
        entry: what ``x0`` goes through before the first layer.
    """

    name: str
    layer: nn.Module
    entry: nn.Module


@dataclass(frozen=True)
class CrossMatrix:
    """The ``(p, p)`` matrix W of a cross layer, as ``left @ right`` where it has factors.

    Args:
        name: of the layer.
        formula: what W is made of.
        left: ``(p, r)``, or all of W.
        right: ``(r, p)``, or None.
        entry: ``(p, d)``, the linear map from ``x0`` to what the layer reads; None where it reads ``x0``'s
            columns.
    """

    name: str
    formula: str
    left: Tensor
    right: Tensor | None = None
    entry: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of W, ``(stop - start, p)``."""
        part = self.left[start:stop]
        return part if self.right is None else part @ self.right


def cross_sites(interaction: nn.Module, prefix: str = "") -> Iterator[CrossSite]:
    """The cross layers that read ``x0`` (or what the layers before them made of it), in the model's order."""
    if isinstance(interaction, MoE | MMoE):
        experts = interaction.mixture.experts
        for i, expert in enumerate(experts):
            yield from cross_sites(expert, f"{prefix}expert {i + 1}, " if len(experts) > 1 else prefix)
    elif isinstance(interaction, ParallelDCNV2):
        for i, stack in enumerate(interaction.stacks):
            name = f"{prefix}stack {i + 1}, " if len(interaction.stacks) > 1 else prefix
            for site in cross_sites(stack, name):
                yield replace(site, entry=interaction.projection)
    elif isinstance(interaction, CrossNetwork | DCNMix | GDCN | MLDCN):
        entry = getattr(interaction, "entry" if isinstance(interaction, MLDCN) else "projection", None)
        for i, layer in enumerate(interaction.layers):
            yield CrossSite(f"{prefix}layer {i + 1}", layer, entry or nn.Identity())


@dataclass(frozen=True)
class Scaler:
    """The module whose calls tell by how much a layer scales its directions, and a call's numbers ``(B, k)``."""

    module: nn.Module
    numbers: Callable[[tuple[Any, ...], Tensor], Tensor]


def scaler(layer: nn.Module) -> Scaler | None:
    """What scales a layer's directions example by example; None where nothing does."""
    if isinstance(layer, ExpertCrossLayer):
        return Scaler(layer, lambda inputs, output: inputs[2])
    if isinstance(layer, GatedCrossLayer):
        return Scaler(layer.gate, lambda inputs, output: output.sigmoid())
    if isinstance(layer, MLDCNLayer) and layer.mask is not None:
        return Scaler(layer.mask, lambda inputs, output: output)
    if isinstance(layer, LowRankCrossLayer) and layer.relu:
        return Scaler(layer.down, lambda inputs, output: (output > 0).float())
    return None


def cross_matrix(site: CrossSite, means: Mapping[str, Tensor]) -> CrossMatrix:
    """The matrix of a cross layer, with the means over examples of what scales its directions.

    Args:
        site: the layer.
        means: by the site's name, where :func:`scaler` names something: the mean mask, gates or shares.
    """
    layer, mean = site.layer, means.get(site.name)
    entry = site.entry.weight.detach() if isinstance(site.entry, nn.Linear) else None
    right: Tensor | None = None
    if isinstance(layer, CrossLayer):
        formula, left = "W", layer.linear.weight
    elif isinstance(layer, VectorCrossLayer):
        formula, right = "1 wᵀ", layer.linear.weight
        left = torch.ones(layer.linear.in_features, 1)
    elif isinstance(layer, LowRankCrossLayer):
        formula, left, right = "U Vᵀ", layer.up.weight, layer.down.weight
        if mean is not None:
            formula, left = "U diag(share of rows above the ReLU's zero) Vᵀ", left * mean
    elif isinstance(layer, ExpertCrossLayer):
        assert mean is not None
        formula, right = "Σ mean gate · U Vᵀ", layer.down.weight
        left = layer.up.weight * mean.repeat_interleave(layer.rank)
        if layer.inner is not None:
            formula = "Σ mean gate · U C Vᵀ"
            stacked = right.view(layer.num_experts, layer.rank, -1)
            right = torch.bmm(layer.inner, stacked).flatten(0, 1)
    elif isinstance(layer, GatedCrossLayer):
        assert mean is not None
        formula, left = "diag(mean gate) W", mean.unsqueeze(1) * layer.cross.weight
    elif isinstance(layer, MLDCNLayer):
        formula, left, right = "U Vᵀ", layer.up.weight, layer.down.weight
        if mean is not None:
            formula, left = "U diag(mean mask) Vᵀ", left * mean
    else:
        raise TypeError(f"no matrix is known of a {type(layer).__name__}")
    cpu = [None if t is None else t.detach().float().cpu() for t in (left, right, entry)]
    assert cpu[0] is not None
    return CrossMatrix(site.name, formula, cpu[0], cpu[1], cpu[2])


def block_norms(matrix: CrossMatrix, layout: FieldLayout) -> Floats:
    """The Frobenius norm of each block of W, ``(F, F)``: fields of ``x0`` by fields of the layer's input.

    Behind an entry map P of width p, a product of columns a and b of ``x0`` is scaled by
    ``T_kab = P_ka (W P)_kb`` in each of the p columns k of the result. The norm is then that of the block of
    T; with P the identity it is that of ``W_ij``.
    """
    field = np.repeat(np.arange(len(layout)), layout.widths)
    squares = np.zeros((len(layout), len(layout)))
    size = len(matrix.left)
    step = max(1, _CHUNK // max(size, layout.width))
    for start in range(0, size, step):
        stop = min(start + step, size)
        rows = matrix.rows(start, stop)
        if matrix.entry is None:
            by_input = _by_field(rows, layout)
            np.add.at(squares, field[start:stop], by_input)
        else:
            by_input = _by_field(rows @ matrix.entry, layout)
            squares += _by_field(matrix.entry[start:stop], layout).T @ by_input
    return np.sqrt(squares)


def change(learned: CrossMatrix, initial: CrossMatrix) -> CrossMatrix | None:
    """What training made of a matrix, ``W - W_initial``; None behind an entry map, which is learned too."""
    if learned.entry is not None:
        return None
    if learned.right is None or initial.right is None:
        return replace(learned, left=learned.left - initial.left)
    left = torch.cat([learned.left, -initial.left], dim=1)
    return replace(learned, left=left, right=torch.cat([learned.right, initial.right]))


def _by_field(rows: Tensor, layout: FieldLayout) -> Floats:
    """Squared norms ``(n, F)`` of the fields' parts of rows ``(n, d)``."""
    offsets = [field.offset for field in layout]
    found: Floats = np.add.reduceat(rows.double().square().numpy(), offsets, axis=1)
    return found


@torch.no_grad()
def crossed_signal(site: CrossSite, matrix: CrossMatrix, x0: Tensor, layout: FieldLayout) -> Floats | None:
    """Root mean square over examples of ``||x0_i * (W_ij x0_j)||``, ``(F, F)``: what the crosses come to on
    data.

    A block's norm says nothing of how large the fields' vectors are; this does. It is that of a layer which
    reads ``x0`` itself, the first; None behind an entry map, where a block has no columns of its own.

    Args:
        site: the layer.
        matrix: its matrix.
        x0: ``(B, d)``.
        layout: its fields.
    """
    if matrix.entry is not None or not site.name.endswith("layer 1"):
        return None
    x0 = site.entry(x0).float().cpu()
    offsets = [field.offset for field in layout]
    squares = np.zeros((len(layout), len(layout)))
    for j, field in enumerate(layout):
        part = x0[:, field.columns]
        if matrix.right is None:
            crossed = part @ matrix.left[:, field.columns].T
        else:
            crossed = (part @ matrix.right[:, field.columns].T) @ matrix.left.T
        mean = (x0 * crossed).square().mean(dim=0).double().numpy()
        squares[:, j] = np.add.reduceat(mean, offsets)
    return np.sqrt(squares)


def strongest_pairs(norms: Floats, layout: FieldLayout) -> list[tuple[str, str, float]]:
    """Pairs of two fields, the strongest first: both blocks ``W_ij`` and ``W_ji`` cross them.

    Returns:
        Names and ``sqrt(||W_ij||^2 + ||W_ji||^2)``.
    """
    names = [field.name for field in layout]
    both = np.hypot(norms, norms.T)
    found = [
        (names[i], names[j], float(both[i, j])) for i in range(len(names)) for j in range(i + 1, len(names))
    ]
    return sorted(found, key=lambda pair: -pair[2])


def singular_values(matrix: CrossMatrix) -> Floats:
    """The singular values of W that need not be 0, the largest first."""
    left = matrix.left
    if matrix.right is None:
        found = torch.linalg.svdvals(left)
    elif left.shape[1] < left.shape[0]:
        # Of the factors' triangles: r x r instead of p x p.
        upper, lower = (torch.linalg.qr(factor, mode="r").R for factor in (left, matrix.right.T))
        found = torch.linalg.svdvals(upper @ lower.T)
    else:
        found = torch.linalg.svdvals(left @ matrix.right)
    return np.asarray(found.double().numpy())


def numerical_rank(values: Floats, tolerance: float) -> int:
    """How many singular values are at least ``tolerance`` times the largest one; 0 for a matrix of zeros.

    DCN V2, Section 3.5, defines R_T as the first k with ``sigma_k < T sigma_1``: one more than this count.

    Example:
        >>> numerical_rank(np.array([2.0, 1.0, 0.2, 0.01]), 0.1)
        3
    """
    largest = float(values[0]) if len(values) else 0.0
    return int(np.count_nonzero(values >= tolerance * largest)) if largest > 0 else 0
