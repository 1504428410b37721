"""PNN in its forms, and DLRM."""

from functools import partial

import numpy as np
from families.case import Case, D
from families.factorisation import PROJECTED, E, F, P, dnn, field_vectors, mlp
from families.maths import relu

SELF = F * (F + 1) // 2


def pairs(count, with_self):
    return [(i, j) for i in range(count) for j in range(i if with_self else i + 1, count)]


def pnn(p, x0, widths, products, kernel="mat", linear=True, self_products=False, token_width=None, **_):
    """[x0; <v_i, v_j>; <W_ij, v_i v_j^T>], the outer products made in full, with each kernel as a matrix."""
    v = field_vectors(p, x0, widths, token_width)
    e = len(v[0])
    read = list(x0) if linear else []
    if products != "outer":
        read += [float(v[i] @ v[j]) for i, j in pairs(len(v), self_products)]
    if products != "inner":
        for place, (i, j) in enumerate(pairs(len(v), self_products)):
            w = p["outer.weight"][place]
            full = {"mat": lambda w: w, "vec": lambda w: np.diag(w[:, 0]), "num": lambda w: w * np.eye(e)}[
                kernel
            ](w)
            read.append((full * np.outer(v[i], v[j])).sum())
    return mlp(p, np.array(read))


def pnn_2016(p, x0, widths, products, token_width=None, **_):
    """Qu et al. 2016: l_1 = ReLU(l_z + l_p + b)."""
    v = field_vectors(p, x0, widths, token_width)
    first = p["linear.weight"] @ x0 + p["linear.bias"]
    for node in range(len(first)):
        kernel = p["kernel.weight"][node]
        if products == "inner":
            # sum_ij theta_i theta_j <v_i, v_j>
            first[node] += sum(
                kernel[i] * kernel[j] * (v[i] @ v[j]) for i in range(len(v)) for j in range(len(v))
            )
        else:
            f = np.sum(v, axis=0)
            first[node] += (kernel.reshape(len(f), len(f)) * np.outer(f, f)).sum()
    return mlp(p, relu(first))


def dlrm(p, x0, widths, self_interaction=False, token_width=None, **_):
    """The first field of LAYOUT is a number, the others are ids."""
    z = mlp(p, x0[:1], "bottom")
    tokens = [z, *field_vectors(p, x0[1:], widths[1:], token_width)]
    dots = [tokens[i] @ tokens[j] for i, j in pairs(len(tokens), self_interaction)]
    return mlp(p, np.concatenate([z, dots]), "top")


MAT, VEC = (P * E**2, 2 * P * E**2), (P * E, 2 * P * E)
GRAM = 2 * F**2 * E


def _pnn(name, extra, inputs, hidden=(7, 5), projected=PROJECTED, **options):
    """``extra``: parameters and FLOPs of the products; ``inputs``: of the DNN."""
    params, flops = dnn(inputs, *hidden)
    options = {"hidden": list(hidden), **options}
    return Case(name, options, params + projected + extra[0], flops + 2 * projected + extra[1])


def _pnn_2016(name, kernel, hidden=(7, 5), **options):
    """``kernel``: parameters and FLOPs for each node of the first layer."""
    width, flops = hidden[0], dnn(*hidden)[1]
    params = width * D + width + width * kernel[0] + dnn(*hidden)[0] + PROJECTED
    flops += 2 * width * D + width * kernel[1] + 2 * PROJECTED
    return Case(name, {"hidden": list(hidden), **options}, params, flops)


def _dlrm(bottom, hidden, dots, width=E, projected=3 * E, **options):
    parts = [dnn(1, *bottom, width), dnn(width + dots, *hidden)]
    params = sum(part[0] for part in parts) + projected
    flops = sum(part[1] for part in parts) + 2 * projected + 2 * F**2 * width
    return Case("dlrm", {"bottom": list(bottom), "hidden": list(hidden), **options}, params, flops)


CASES = [
    _pnn("ipnn", (0, GRAM), D + P),
    _pnn("ipnn", (0, GRAM), SELF, linear=False, self_products=True),
    _pnn("opnn", MAT, D + P),
    _pnn("opnn", VEC, D + P, kernel="vec", dropout=0.2),
    _pnn("opnn", (P, GRAM), D + P, kernel="num", batch_norm=True, hidden=()),
    _pnn("opnn", (SELF * 9, 2 * SELF * 9), D + SELF, self_products=True, token_width=3, projected=3 * D),
    _pnn("pnn", (MAT[0], GRAM + MAT[1]), D + 2 * P),
    _pnn("pnn", (VEC[0], GRAM + VEC[1]), 2 * P, linear=False, kernel="vec"),
    _pnn_2016("ipnn_2016", (F, 2 * F * E)),
    _pnn_2016("opnn_2016", (E**2, 2 * E**2)),
    _pnn_2016("opnn_2016", (E**2, 2 * E**2), hidden=(6,), dropout=0.2),
    _dlrm((6, 3), (7, 5), P),
    _dlrm((6,), (7,), SELF, self_interaction=True),
    _dlrm((), (7,), P, width=3, projected=3 * 11, token_width=3),
]

REFERENCES = {
    "ipnn": partial(pnn, products="inner"),
    "opnn": partial(pnn, products="outer"),
    "pnn": partial(pnn, products="both"),
    "ipnn_2016": partial(pnn_2016, products="inner"),
    "opnn_2016": partial(pnn_2016, products="outer"),
    "dlrm": dlrm,
}
