"""Rows in descending order of score, block by block, and what ties together in them.

AUC, average precision and equal-mass calibration bins all follow from one pass over this stream, whether the
rows were sorted in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mldcn.metrics.rows import Array, Rows

# Rows handled together after the sort: the temporaries of a block stay in the processor's cache.
BLOCK = 1 << 16


class SortedBlock(NamedTuple):
    """Rows sorted by key: ``(n,)`` unsigned keys, bool labels, and weights or None."""

    keys: Array
    positive: Array
    weights: Array | None


class Ties(NamedTuple):
    """Distinct scores, descending: their keys, and the mass of positives and of negatives at each."""

    keys: Array
    positive: Array
    negative: Array


def descending_keys(scores: Array) -> Array:
    """Unsigned integers that sort as the scores do, the highest score first; equal exactly where scores are.

    The bits of a float of either sign grow with its magnitude. So negative scores are already in order behind
    the others (their sign bit is the highest), and the others need all their bits but the sign turned.
    """
    unsigned, signed = (np.uint32, np.int32) if scores.dtype == np.float32 else (np.uint64, np.int64)
    bits: Array = (scores + scores.dtype.type(0)).view(signed)  # -0.0 + 0.0 is 0.0: the two zeros tie
    bits ^= (bits >= 0) * signed(np.iinfo(signed).max)
    return bits.view(unsigned)


def scores_of_keys(keys: Array) -> Array:
    """The inverse of :func:`descending_keys`, as float64."""
    floating, signed = (np.float32, np.int32) if keys.dtype == np.uint32 else (np.float64, np.int64)
    bits: Array = keys.view(signed)
    bits = bits ^ ((bits >= 0) * signed(np.iinfo(signed).max))
    return bits.view(floating).astype(np.float64)


def descending_blocks(rows: Rows) -> Iterator[SortedBlock]:
    """Sorts rows in memory. Without weights no row has to be moved: its label rides in the key's free bit."""
    keys = descending_keys(rows.scores)
    if rows.weights is not None:
        yield from _weighted_blocks(keys, rows.positive, rows.weights)
        return
    one = keys.dtype.type(1)
    sign = keys.dtype.type(1 << (keys.dtype.itemsize * 8 - 1))
    below_zero = keys >= sign
    if below_zero.any():
        parts = [(~below_zero, keys.dtype.type(0)), (below_zero, sign)]
    else:
        parts = [(slice(None), keys.dtype.type(0))]
    for part, bit in parts:
        # The sign bit, the same for the whole part, makes room for the label.
        packed = keys[part] << one
        packed |= rows.positive[part]
        packed.sort()
        for start in range(0, len(packed), BLOCK):
            block = packed[start : start + BLOCK]
            yield SortedBlock((block >> one) | bit, (block & one).astype(np.bool_), None)


def _weighted_blocks(keys: Array, positive: Array, weights: Array) -> Iterator[SortedBlock]:
    if keys.dtype == np.uint32 and weights.dtype == np.float32:
        yield from _packed_blocks(keys, positive, weights)
        return
    if keys.dtype == np.uint32 and len(keys) < 1 << 32:
        # Sorting key and row number as one integer is several times as fast as argsort.
        packed = keys.astype(np.uint64)
        packed <<= np.uint64(32)
        packed |= np.arange(len(keys), dtype=np.uint64)
        packed.sort()
        order = (packed & np.uint64(0xFFFFFFFF)).astype(np.intp)
    else:
        order = np.argsort(keys)
    for start in range(0, len(keys), BLOCK):
        rows = order[start : start + BLOCK]
        yield SortedBlock(keys[rows], positive[rows], weights[rows])


def _packed_blocks(keys: Array, positive: Array, weights: Array) -> Iterator[SortedBlock]:
    """All of a row fits into one integer: its key, its label in its weight's sign, and its weight.

    So nothing is left to be fetched from all over memory after the sort.
    """
    low, sign = np.uint64(0xFFFFFFFF), np.uint64(1 << 31)
    packed = keys.astype(np.uint64)
    packed <<= np.uint64(32)
    # A weight of -0.0 would have the sign already.
    packed |= (weights + np.float32(0)).view(np.uint32)
    packed |= positive * sign
    packed.sort()
    for start in range(0, len(packed), BLOCK):
        block = packed[start : start + BLOCK]
        weight = (block & (low ^ sign)).astype(np.uint32).view(np.float32)
        yield SortedBlock((block >> np.uint64(32)).astype(np.uint32), (block & sign) != 0, weight)


def tie_groups(blocks: Iterable[SortedBlock]) -> Iterator[Ties]:
    """Sums the rows of equal score, also where they lie in several blocks."""
    held: Ties | None = None
    for block in blocks:
        if not len(block.keys):
            continue
        ties = _collapse(block)
        if held is not None:
            if held.keys[0] == ties.keys[0]:
                ties.positive[0] += held.positive[0]
                ties.negative[0] += held.negative[0]
            else:
                yield held
        held = Ties(*(column[-1:] for column in ties))
        if len(ties.keys) > 1:
            yield Ties(*(column[:-1] for column in ties))
    if held is not None:
        yield held


def _collapse(block: SortedBlock) -> Ties:
    keys, positive, weights = block
    first = np.empty(len(keys), np.bool_)
    first[0] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    distinct = len(starts) == len(keys)
    if weights is None:
        if distinct:
            mass = positive.astype(np.float64)
            return Ties(keys, mass, 1.0 - mass)
        ends = np.append(starts[1:], len(keys))
        upto = np.cumsum(positive, dtype=np.int64)[ends - 1]
        mass = np.diff(upto, prepend=0).astype(np.float64)
        return Ties(keys[starts], mass, (ends - starts) - mass)
    mass = np.where(positive, weights, 0).astype(np.float64)
    rest = np.where(positive, 0, weights).astype(np.float64)
    if distinct:
        return Ties(keys, mass, rest)
    return Ties(keys[starts], np.add.reduceat(mass, starts), np.add.reduceat(rest, starts))
