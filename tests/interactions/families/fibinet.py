"""FiBiNET."""

import numpy as np
from families.case import Case, D
from families.factorisation import PROJECTED, E, F, P, field_vectors, linear_term, mlp
from families.maths import relu


def bilinear(weight, v, kind):
    """(v_i W) * v_j; a lone field is paired with itself."""
    found, pair = [], 0
    for i in range(max(1, len(v) - 1)):
        for j in range(i + 1, len(v)) if len(v) > 1 else [0]:
            found.append((v[i] @ weight[{"all": 0, "each": i, "interaction": pair}[kind]]) * v[j])
            pair += 1
    return found


def fibinet(
    p,
    x0,
    widths,
    sides=(),
    token_width=None,
    first_order="ids",
    bilinear_type="interaction",
    excitation="relu",
    **_,
):
    v = field_vectors(p, x0, widths, token_width)
    means = np.array([each.sum() / each.size for each in v])
    a = p["senet.excite.weight"] @ relu(p["senet.squeeze.weight"] @ means)
    a = relu(a) if excitation == "relu" else 1 / (1 + np.exp(-a))
    weighed = [a[f] * v[f] for f in range(len(v))]
    products = bilinear(p["bilinear.weight"], v, bilinear_type)
    products += bilinear(p["bilinear_senet.weight"], weighed, bilinear_type)
    deep = mlp(p, np.concatenate(products))
    return np.concatenate([[linear_term(p, x0, first_order, sides)], deep])


def _reference(p, x0, widths, bilinear="interaction", **options):
    return fibinet(p, x0, widths, bilinear_type=bilinear, **options)


def _case(
    matrices, lefts, hidden=(5,), reduced=1, e=E, projected=PROJECTED, more=(0, 0), name="fibinet", **options
):
    inner = [2 * P * e, *hidden]
    deep = sum(a * b for a, b in zip(inner, hidden, strict=False))
    return Case(
        name,
        {"hidden": list(hidden), **options},
        projected + 2 * F * reduced + 2 * matrices * e**2 + deep + sum(hidden) + more[0],
        2 * projected + 4 * F * reduced + 4 * lefts * e**2 + 2 * deep + more[1],
    )


CASES = [
    _case(P, P, reduction_ratio=1, reduced=4),
    _case(F - 1, F - 1, bilinear="each", hidden=(5, 3), excitation="sigmoid"),
    _case(1, F - 1, bilinear="all", reduction_ratio=2, reduced=2, first_order="none"),
    _case(P, P, first_order="embedding", excitation="sigmoid", dropout=0.5, more=(D, 2 * D)),
    _case(P, P, token_width=3, e=3, projected=3 * D, batch_norm=True, excitation="sigmoid", more=(10, 0)),
    _case(P, P, hidden=()),
]

REFERENCES = {"fibinet": _reference}
