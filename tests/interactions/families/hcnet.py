"""MemoNet's HCNet, from the codewords on; their hashing is the embedding's."""

from itertools import combinations

import numpy as np
from families.case import LAYOUT, Case, D
from families.factorisation import field_vectors, mlp
from families.maths import at, relu

IDS = [i for i, field in enumerate(LAYOUT) if field.kind == "categorical"]


def two_layers(p, x):
    return p["2.weight"] @ relu(p["0.weight"] @ x)


def memory(p, x0, tokens, words, count, order):
    """A vector a field: the sum over the combinations that it is in."""
    crosses = list(combinations(range(count), order))
    words = words.reshape(len(crosses), -1)
    numbers = two_layers(at(p, "attention"), x0) if "attention.0.weight" in p else np.ones(len(crosses))
    fields = [0.0] * count
    for k, cross in enumerate(crosses):
        word = words[k]
        if tokens is not None:
            word = word * two_layers(at(p, "reweigh"), np.concatenate([tokens[i] for i in cross]))
        vector = numbers[k] * (p["restore.weight"] @ word)
        for i in cross:
            fields[i] = fields[i] + vector
    return np.concatenate(fields)


def hcnet(p, x0, widths, sides, ids=IDS, orders=(2,), restoring="linear", token_width=None, **_):
    """``ids``: which of the fields are categorical. Orders of which there is no combination add nothing."""
    starts = np.cumsum([0, *widths])
    orders = [(order, side) for order, side in zip(orders, sides, strict=True) if len(ids) >= order]
    tokens = None
    if restoring == "attentive" and orders:
        own = np.concatenate([x0[starts[i] : starts[i + 1]] for i in ids])
        tokens = field_vectors(p, own, [widths[i] for i in ids], token_width)
    found = [
        memory(at(p, f"memories.{n}"), x0, tokens, side, len(ids), order)
        for n, (order, side) in enumerate(orders)
    ]
    return mlp(p, np.concatenate([x0, *found]))


def _case(params, flops, hidden=(5,), out=3, norms=0, projected=0, **options):
    """``params`` and ``flops / 2`` of the memories; their output is ``out`` wide."""
    deep = sum(a * b for a, b in zip([D + out, *hidden], hidden, strict=False))
    return Case(
        "hcnet",
        {"num_codewords": 50, "codeword_width": 3, "hidden": list(hidden), **options},
        projected + params + deep + (1 + norms) * sum(hidden),
        2 * (projected + flops + deep),
    )


def _lmr(m, w):
    return m * 3 * w


def _amr(k, e, m):
    return (k * e) ** 2 + k * e * m * 3


def _gas(crosses):
    return D * D + D * crosses


# There are 3 pairs and 1 triple of categorical fields, 3, 4 and 4 wide.
PROJECTED = 3 * 4

CASES = [
    _case(_lmr(2, 3) + _gas(3), 3 * _lmr(2, 3) + _gas(3), out=9),
    _case(
        _lmr(1, 2),
        3 * _lmr(1, 2),
        out=6,
        hidden=(5, 4),
        num_hashes=1,
        out_width=2,
        shrinking="sum",
        dropout=0.5,
    ),
    _case(
        _lmr(2, 3) + _amr(2, 4, 2) + _gas(3),
        3 * (_lmr(2, 3) + _amr(2, 4, 2)) + _gas(3),
        out=9,
        projected=PROJECTED,
        restoring="attentive",
    ),
    _case(
        2 * _lmr(3, 3) + _amr(2, 2, 3) + _amr(3, 2, 3) + _gas(3) + _gas(1),
        4 * _lmr(3, 3) + 3 * _amr(2, 2, 3) + _amr(3, 2, 3) + _gas(3) + _gas(1),
        out=18,
        projected=2 * (3 + 4 + 4),
        orders=[2, 3],
        num_hashes=3,
        restoring="attentive",
        token_width=2,
        batch_norm=True,
        norms=2,
    ),
    _case(_lmr(2, 3) + _gas(1), _lmr(2, 3) + _gas(1), out=9, orders=[3], hidden=()),
]

REFERENCES = {"hcnet": hcnet}
