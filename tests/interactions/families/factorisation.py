"""Linear models and factorisation machines, alone and with a DNN."""

from itertools import pairwise

import numpy as np
from families.case import LAYOUT, Case, D
from families.maths import relu

F, E = len(LAYOUT), 4  # fields, and their commonest width
P = F * (F - 1) // 2
PROJECTED = 1 * E + 3 * E  # the fields that are not E wide


def field_vectors(p, x0, widths, token_width=None, prefix="tokens"):
    """Each field's vector of the common width; neighbours of one width share a stack of projections."""
    width = token_width or max(widths, key=lambda each: (list(widths).count(each), each))
    vectors, start, run, within = [], 0, -1, 0
    for i, each in enumerate(widths):
        new = i == 0 or each != widths[i - 1]
        run, within = (run + 1, 0) if new else (run, within + 1)
        field = x0[start : start + each]
        name = f"{prefix}.projections.{run}"
        assert (name in p) == (token_width is not None or each != width)
        vectors.append(field @ p[name][within] if name in p else field)
        start += each
    return vectors


def mlp(p, h, prefix="mlp"):
    """Hidden layers: linear map, BatchNorm by its running statistics where there is one, ReLU."""
    places = sorted(
        {int(key[len(prefix) + 5 :].split(".")[0]) for key in p if key.startswith(f"{prefix}.net.")}
    )
    for place in places:
        part = {key.split(".")[-1]: value for key, value in p.items() if f"{prefix}.net.{place}." in key}
        h = batch_norm(part, h) if "running_mean" in part else part["weight"] @ h + part["bias"]
        if f"{prefix}.net.{place + 1}.running_mean" not in p:
            h = relu(h)
    return h


def batch_norm(part, h):
    return (h - part["running_mean"]) / np.sqrt(part["running_var"] + 1e-5) * part["weight"] + part["bias"]


def linear_term(p, x0, kind, sides, prefix="linear"):
    if kind == "ids":
        return sum(sides[0])
    return float(p[f"{prefix}.linear.weight"][0] @ x0) if kind == "embedding" else 0.0


def pair_sum(vectors):
    total = np.zeros_like(vectors[0])
    for j in range(len(vectors)):
        for i in range(j):
            total = total + vectors[i] * vectors[j]
    return total


def lr(p, x0, widths, sides=(), first_order="ids"):
    return np.array([linear_term(p, x0, first_order, sides)])


def fm(p, x0, widths, sides=(), first_order="ids", token_width=None):
    """Rendle 2010, without the bias."""
    v = field_vectors(p, x0, widths, token_width)
    return np.array([linear_term(p, x0, first_order, sides) + pair_sum(v).sum()])


def fwfm(p, x0, widths, sides=(), first_order="embedding", token_width=None):
    """DeepLight: sum <v_i, w_i> + sum <v_i, v_j> R_ij."""
    v = field_vectors(p, x0, widths, token_width)
    total, place = linear_term(p, x0, first_order, sides), 0
    for i in range(len(v)):
        for j in range(i + 1, len(v)):
            total = total + p["weight"][place] * (v[i] @ v[j])
            place += 1
    return np.array([total])


def wide_deep(p, x0, widths, sides=(), first_order="ids", **_):
    return np.concatenate([[linear_term(p, x0, first_order, sides, "wide")], mlp(p, x0)])


def deepfm(p, x0, widths, sides=(), first_order="ids", token_width=None, **_):
    inner = {key.removeprefix("fm."): value for key, value in p.items() if key.startswith("fm.")}
    return np.concatenate([fm(inner, x0, widths, sides, first_order, token_width), mlp(p, x0)])


def nfm(p, x0, widths, sides=(), first_order="ids", token_width=None, **_):
    pooled = pair_sum(field_vectors(p, x0, widths, token_width))
    if "pooled.0.running_mean" in p:
        pooled = batch_norm({key.split(".")[-1]: p[key] for key in p if key.startswith("pooled.")}, pooled)
    return np.concatenate([[linear_term(p, x0, first_order, sides)], mlp(p, pooled)])


def dnn(*widths):
    """Parameters and FLOPs of a DNN."""
    pairs = list(pairwise(widths))
    return sum(a * b + b for a, b in pairs), sum(2 * a * b for a, b in pairs)


def _case(name, params, flops, **options):
    return Case(name, options, params, flops)


CASES = [
    Case("lr", reads_x0=False),
    _case("lr", D, 2 * D, first_order="embedding"),
    _case("fm", PROJECTED, 2 * PROJECTED),
    _case("fm", D + PROJECTED, 2 * (D + PROJECTED), first_order="embedding"),
    _case("fm", D * 3, 2 * D * 3, first_order="none", token_width=3),
    _case("fwfm", P + D + PROJECTED, 2 * F**2 * E + 2 * (D + PROJECTED)),
    _case("fwfm", P + D * 5, 2 * F**2 * 5 + 2 * D * 5, first_order="ids", token_width=5),
    _case("wide_deep", *dnn(D, 7, 5), hidden=[7, 5]),
    _case(
        "wide_deep", D + dnn(D, 7)[0], 2 * D + dnn(D, 7)[1], first_order="embedding", hidden=[7], dropout=0.2
    ),
    _case("deepfm", PROJECTED + dnn(D, 7, 5)[0], 2 * PROJECTED + dnn(D, 7, 5)[1], hidden=[7, 5]),
    _case(
        "deepfm",
        2 * D + dnn(D, 6)[0] + 2 * 6,
        2 * 2 * D + dnn(D, 6)[1],
        first_order="none",
        token_width=2,
        hidden=[6],
        batch_norm=True,
    ),
    _case("deepfm", PROJECTED, 2 * PROJECTED, hidden=[]),
    _case("nfm", PROJECTED + dnn(E, 7, 5)[0], 2 * PROJECTED + dnn(E, 7, 5)[1], hidden=[7, 5]),
    _case(
        "nfm",
        D + 3 * D + 2 * 3 + dnn(3, 6)[0] + 2 * 6,
        2 * (D + 3 * D) + dnn(3, 6)[1],
        first_order="embedding",
        token_width=3,
        hidden=[6],
        dropout=0.3,
        batch_norm=True,
    ),
    _case("nfm", PROJECTED, 2 * PROJECTED, hidden=[]),
]

REFERENCES = {"lr": lr, "fm": fm, "fwfm": fwfm, "wide_deep": wide_deep, "deepfm": deepfm, "nfm": nfm}
