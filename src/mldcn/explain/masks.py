"""What instance-guided masks do: how they spread, over directions and over examples, and what they do to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mldcn.interactions.homefeed import Homefeed
from mldcn.interactions.masknet import MaskBlock, MaskNet, ParallelMaskNet, SerialMaskNet
from mldcn.interactions.mldcn import MLDCN, MLDCNLayer
from mldcn.interactions.moe import MMoE, MoE
from mldcn.layout import FieldLayout

Floats = NDArray[np.float64]
NEAR_ZERO = 0.1  # a mask's number nearer to 0 takes its direction out
AMPLIFIED = 1.1  # one above lets the direction through louder than it came
Numbers = Callable[[tuple[Any, ...], Tensor], Tensor]


@dataclass(frozen=True)
class MaskSite:
    """A mask of a model.

    Args:
        name: of its layer or block.
        mask: the module that gives the mask ``(B, k)``.
        masked: the module whose input or output is masked, see ``reads``.
        reads: ``(k, d)``, how each of the k masked directions reads ``x0``'s columns; None where they are
            ``x0``'s columns themselves.
        of_fields: whether the k directions come from ``x0``'s columns, rather than from hidden units.
    """

    name: str
    mask: nn.Module
    masked: nn.Module
    reads: Tensor | None
    of_fields: bool

    def shares(self, layout: FieldLayout) -> Floats | None:
        """The share of each field in each direction, ``(k, F)``, by squared weights; None for hidden units."""
        if not self.of_fields:
            return None
        if self.reads is None:
            return np.repeat(np.eye(len(layout)), layout.widths, axis=0)
        squares = self.reads.detach().double().square().cpu().numpy()
        by_field = np.add.reduceat(squares, [field.offset for field in layout], axis=1)
        total = by_field.sum(axis=1, keepdims=True)
        return np.asarray(np.divide(by_field, total, out=np.zeros_like(by_field), where=total > 0))


def mask_sites(interaction: nn.Module, layout: FieldLayout, prefix: str = "") -> Iterator[MaskSite]:
    """The masks of ML-DCN layers and MaskNet blocks, in the model's order."""
    if isinstance(interaction, MoE | MMoE):
        experts = interaction.mixture.experts
        for i, expert in enumerate(experts):
            name = f"{prefix}expert {i + 1}, " if len(experts) > 1 else prefix
            yield from mask_sites(expert, layout, name)
    elif isinstance(interaction, Homefeed):
        yield from mask_sites(interaction.masks, layout, prefix)
    elif isinstance(interaction, MLDCN):
        for i, layer in enumerate(interaction.layers):
            if isinstance(layer, MLDCNLayer) and layer.mask is not None:
                yield MaskSite(f"{prefix}layer {i + 1}", layer.mask, layer.down, layer.down.weight, True)
    elif isinstance(interaction, MaskNet | SerialMaskNet | ParallelMaskNet):
        # The blocks of ParallelMaskNet all mask x0's columns, in series only the first one does.
        parallel = isinstance(interaction, ParallelMaskNet)
        for i, block in enumerate(interaction.blocks):
            assert isinstance(block, MaskBlock)
            yield MaskSite(f"{prefix}block {i + 1}", block.mask, block, None, parallel or i == 0)


class Moments:
    """Sums over examples of numbers ``(B, k)``, column by column."""

    def __init__(self) -> None:
        self.rows = 0
        self._sums = np.zeros((5, 0))

    def add(self, numbers: Tensor) -> None:
        """Adds examples."""
        x = numbers.detach().double().cpu()
        parts = (x, x.square(), x.abs() < NEAR_ZERO, x > AMPLIFIED, x < 0)
        sums = np.stack([part.double().sum(dim=0).numpy() for part in parts])
        self._sums = sums if not self.rows else self._sums + sums
        self.rows += len(x)

    @property
    def means(self) -> Floats:
        """Each column's mean."""
        return self._column(0)

    @property
    def variances(self) -> Floats:
        """Each column's variance over examples."""
        return np.maximum(self._column(1) - self.means**2, 0.0)

    @property
    def near_zero(self) -> Floats:
        """Share of examples by column whose number is nearer to 0 than ``NEAR_ZERO``."""
        return self._column(2)

    @property
    def amplified(self) -> Floats:
        """Share of examples by column whose number is above ``AMPLIFIED``."""
        return self._column(3)

    @property
    def negative(self) -> Floats:
        """Share of examples by column whose number is negative."""
        return self._column(4)

    def _column(self, which: int) -> Floats:
        return np.asarray(self._sums[which] / max(self.rows, 1))


@contextmanager
def listening(
    modules: Sequence[tuple[nn.Module, Numbers]], told: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within it, ``told(i, numbers)`` is called whenever the i-th module is."""

    def hook(i: int, numbers: Numbers) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, inputs, output: told(i, numbers(inputs, output))

    handles = [module.register_forward_hook(hook(i, read)) for i, (module, read) in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class MaskSummary:
    """How a mask behaves, over all its directions or those of some fields.

    spread: standard deviation over examples and directions. over_examples: of one direction's number from
    example to example, root mean square over directions: 0 where the mask is the same for all.
    over_directions: of the directions' means. near_zero, amplified, negative: shares of the numbers.
    """

    mean: float
    spread: float
    over_examples: float
    over_directions: float
    near_zero: float
    amplified: float
    negative: float


def summarise(moments: Moments, weights: Floats | None = None) -> MaskSummary | None:
    """The behaviour of a mask; with weights ``(k,)``, that of its directions weighed so. None if all are 0."""
    weights = np.ones(len(moments.means)) if weights is None else weights
    if not weights.sum() > 0:
        return None
    share = weights / weights.sum()
    mean = float(share @ moments.means)
    within = float(share @ moments.variances)
    between = float(share @ (moments.means - mean) ** 2)
    return MaskSummary(
        mean=mean,
        spread=float(np.sqrt(within + between)),
        over_examples=float(np.sqrt(within)),
        over_directions=float(np.sqrt(between)),
        near_zero=float(share @ moments.near_zero),
        amplified=float(share @ moments.amplified),
        negative=float(share @ moments.negative),
    )


@dataclass(frozen=True)
class Direction:
    """A masked direction in one example.

    mask: its number here; mean: over examples. fields: (name, share) of where its value comes from in this
    example, the largest first, by the absolute values that the fields' columns add to it.
    """

    number: int
    mask: float
    mean: float
    value: float
    fields: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class MaskedExample:
    """What a mask does to one example: its directions from the one most amplified to the one most damped.

    Amplified and damped are against the direction's own mean over examples.
    """

    name: str
    directions: tuple[Direction, ...]

    def amplified(self, count: int) -> tuple[Direction, ...]:
        """The directions whose number here is furthest above their mean."""
        return tuple(d for d in self.directions[:count] if d.mask > d.mean)

    def damped(self, count: int) -> tuple[Direction, ...]:
        """The directions whose number here is furthest below their mean."""
        return tuple(d for d in self.directions[::-1][:count] if d.mask < d.mean)


@torch.no_grad()
def masked_example(
    sites: Sequence[MaskSite], moments: Sequence[Moments], layout: FieldLayout, call: Callable[[], object]
) -> list[MaskedExample]:
    """What every mask does to the example that ``call`` sends through the model."""
    masks: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}
    listened: list[tuple[nn.Module, Numbers]] = [(site.mask, lambda given, out: out) for site in sites]
    # A block is called with the guide and what is masked, a map with what it reads alone.
    listened += [(site.masked, lambda given, out: given[-1]) for site in sites]

    def told(i: int, numbers: Tensor) -> None:
        (masks if i < len(sites) else inputs)[i % len(sites)] = numbers[0].detach().double().cpu()

    with listening(listened, told):
        call()
    return [
        _masked(site, masks[i].numpy(), inputs[i], moments[i].means, layout) for i, site in enumerate(sites)
    ]


def _masked(site: MaskSite, mask: Floats, x: Tensor, means: Floats, layout: FieldLayout) -> MaskedExample:
    offsets = [field.offset for field in layout]
    shares = np.zeros((len(mask), 0))
    if site.reads is not None:
        parts = (site.reads.detach().double().cpu() * x).numpy()
        values = parts.sum(axis=1)
        shares = np.abs(np.add.reduceat(parts, offsets, axis=1))
        total = shares.sum(axis=1, keepdims=True)
        shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    else:
        values = x.numpy()
        if site.of_fields:
            shares = np.repeat(np.eye(len(layout)), layout.widths, axis=0)
    names = [field.name for field in layout]
    found = []
    for k in np.argsort(means - mask, kind="stable"):
        order = np.argsort(-shares[k], kind="stable")
        fields = tuple((names[f], float(shares[k, f])) for f in order if shares[k, f] > 0)
        found.append(Direction(int(k), float(mask[k]), float(means[k]), float(values[k]), fields))
    return MaskedExample(site.name, tuple(found))
