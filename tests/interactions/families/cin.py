"""xDeepFM."""

import numpy as np
from families.case import Case, D
from families.factorisation import PROJECTED, E, F, field_vectors, linear_term, mlp
from families.maths import count, relu


def cin(p, v, split_half=False, activation="identity"):
    """X^k_h = sum_ij W_h,ij (X^{k-1}_i * X^0_j), summed over its coordinates."""
    x, pooled, layers = v, [], count(p, "cin.weights")
    for k in range(layers):
        weight = p[f"cin.weights.{k}"]
        maps = []
        for h in range(len(weight)):
            total = np.zeros_like(v[0])
            for i in range(len(x)):
                for j in range(len(v)):
                    total = total + weight[h, i * len(v) + j] * x[i] * v[j]
            maps.append(relu(total) if activation == "relu" else total)
        last = k + 1 == layers
        onward = -(-len(maps) // 2)
        pooled += [each.sum() for each in (maps[onward:] if split_half and not last else maps)]
        x = maps[:onward] if split_half else maps
    return np.array(pooled)


def xdeepfm(
    p,
    x0,
    widths,
    sides=(),
    token_width=None,
    first_order="ids",
    split_half=False,
    activation="identity",
    hidden=None,
    **_,
):
    v = field_vectors(p, x0, widths, token_width)
    deep = mlp(p, x0) if hidden else []
    maps = cin(p, v, split_half, activation)
    return np.concatenate([[linear_term(p, x0, first_order, sides)], maps, deep])


def _case(weights, hidden=(5,), e=E, projected=PROJECTED, more=(0, 0), **options):
    deep = sum(a * b for a, b in zip([D, *hidden], hidden, strict=False))
    return Case(
        "xdeepfm",
        {"hidden": list(hidden), **options},
        projected + weights + deep + sum(hidden) + more[0],
        2 * (projected + e * weights + deep) + more[1],
    )


CASES = [
    _case(F * F * 3 + F * 3 * 2, cin_layers=[3, 2]),
    _case(F * F * 3 + F * 2 * 4 + F * 2 * 1, cin_layers=[3, 4, 1], split_half=True, hidden=(5, 3)),
    _case(F * F * 3 + F * 3 * 3, cin_layers=[3, 3], activation="relu", dropout=0.5),
    _case(F * F * 2, cin_layers=[2], hidden=(), first_order="none"),
    _case(F * F * 2, cin_layers=[2], token_width=9, e=9, projected=9 * D, batch_norm=True, more=(10, 0)),
    _case(F * F * 2, cin_layers=[2], first_order="embedding", more=(D, 2 * D)),
]

REFERENCES = {"xdeepfm": xdeepfm}
