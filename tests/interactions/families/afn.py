"""AFN and AFN+."""

import numpy as np
from families.case import Case, D
from families.factorisation import PROJECTED, E, F, batch_norm, field_vectors, mlp
from families.maths import at


def afn(p, x0, widths, sides=(), token_width=None, min_value=1e-5, deep_hidden=None, **_):
    """y_j = exp(sum_f w_jf ln|v_f|), with BatchNorm (by running statistics) of logarithms and products."""
    v = field_vectors(p, x0, widths, token_width)
    log_norm, exp_norm = at(p, "logarithmic.log_norm"), at(p, "logarithmic.exp_norm")
    weight = p["logarithmic.weight"]
    y = np.empty((len(weight), len(v[0])))
    for k in range(len(v[0])):
        logs = batch_norm(log_norm, np.array([np.log(max(abs(each[k]), min_value)) for each in v]))
        y[:, k] = batch_norm(exp_norm, np.exp(weight @ logs))
    out = mlp(p, y.reshape(-1))
    return np.concatenate([out, mlp(p, sides[0], "deep")]) if sides else out


def _case(name, n, hidden=(5,), deep=(), e=E, projected=PROJECTED, norms=2, **options):
    macs = sum(a * b for a, b in zip([n * e, *hidden], hidden, strict=False))
    macs += sum(a * b for a, b in zip([D, *deep], deep, strict=False))
    return Case(
        name,
        {
            "num_neurons": n,
            "hidden": list(hidden),
            **({"deep_hidden": list(deep)} if deep else {}),
            **options,
        },
        projected + n * F + 2 * F + 2 * n + macs + (1 + norms) * (sum(hidden) + sum(deep)),
        2 * (projected + e * F * n + macs),
    )


CASES = [
    _case("afn", 6),
    _case("afn", 3, hidden=(5, 4), batch_norm=False, norms=0, min_value=0.5),
    _case("afn", 3, hidden=()),
    _case("afn", 3, token_width=2, e=2, projected=2 * D, dropout=0.5),
    _case("afn_plus", 3, deep=(4, 3)),
    _case("afn_plus", 3, hidden=(), deep=(4,), batch_norm=False, norms=0),
]

REFERENCES = {"afn": afn, "afn_plus": afn}
