"""The other cross networks: DCN, EDCN, GDCN, DCNv3 and stacks side by side."""

from itertools import pairwise

import numpy as np
from families.case import LAYOUT, Case, D
from families.cross import dcnv2
from families.maths import at, count, layer_norm, relu

# Fields ------------------------------------------------------------------------------------------------------


def projected(p, x0, widths, total):
    """Every field by a matrix of its own; neighbours of one shape share a parameter."""
    sizes = [total // len(widths) + (i < total % len(widths)) for i in range(len(widths))]
    shapes = list(zip(widths, sizes, strict=True))
    out, start, run, place = [], 0, 0, 0
    for i, (width, _) in enumerate(shapes):
        if i and shapes[i] != shapes[i - 1]:
            run, place = run + 1, 0
        out.append(x0[start : start + width] @ p[f"projections.{run}"][place])
        start, place = start + width, place + 1
    return np.concatenate(out), tuple(sizes)


# References --------------------------------------------------------------------------------------------------


def dcn(p, x0, widths, **_):
    if "projection.weight" in p:
        x0 = p["projection.weight"] @ x0
    x = x0
    for i in range(count(p, "layers")):
        layer = at(p, f"layers.{i}")
        x = x0 * sum(x * layer["linear.weight"][0]) + layer["bias"] + x
    return x


def softmax(v):
    return np.exp(v) / np.exp(v).sum()


def regulated(p, tower, x, widths, temperature, batch_norm):
    gates = softmax(p["gates"][tower] / temperature)
    y = np.concatenate([np.full(width, gate) for width, gate in zip(widths, gates, strict=True)]) * x
    if batch_norm:
        norm = at(p, f"norms.{tower}")
        y = (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]
    return y


def bridged(p, kind, x, h):
    if kind == "hadamard":
        return x * h
    if kind == "add":
        return x + h
    if kind == "concat":
        return relu(p["parts.0.0.weight"] @ np.concatenate([x, h]) + p["parts.0.0.bias"])
    scores = [
        (p[f"parts.{i}.2.weight"] @ relu(p[f"parts.{i}.0.weight"] @ z + p[f"parts.{i}.0.bias"]))[0]
        for i, z in enumerate((x, h))
    ]
    a = softmax(np.array(scores))
    return a[0] * x + a[1] * h


def edcn(p, x0, widths, bridge="hadamard", temperature=1.0, batch_norm=True, projection=None, **_):
    f = x0
    if projection:
        f, widths = projected(at(p, "projection"), x0, widths, projection)
    base = None
    for i in range(count(p, "layers")):
        layer = at(p, f"layers.{i}")
        c, s = (
            regulated(at(layer, "regulation"), tower, f, widths, temperature, batch_norm) for tower in (0, 1)
        )
        base = c if base is None else base
        x = base * (layer["cross.linear.weight"][0] @ c) + layer["cross.bias"] + c
        h = relu(layer["dense.weight"] @ s + layer["dense.bias"])
        f = bridged(at(layer, "bridge"), bridge, x, h)
    return np.concatenate([x, h, f])


def gdcn(p, x0, widths, parallel, **_):
    if "projection.weight" in p:
        x0 = p["projection.weight"] @ x0
    c = x0
    for i in range(count(p, "layers")):
        layer = at(p, f"layers.{i}")
        gate = 1 / (1 + np.exp(-(layer["gate.weight"] @ c)))
        c = x0 * (layer["cross.weight"] @ c + layer["cross.bias"]) * gate + c
    h = x0 if parallel else c
    # Hidden layers are the linear maps; norms have the running statistics.
    modules = sorted({int(key.split(".")[2]) for key in p if key.startswith("mlp")})
    for i in modules:
        module = at(p, f"mlp.net.{i}")
        if "running_mean" in module:
            scale = np.sqrt(module["running_var"] + 1e-5)
            h = (h - module["running_mean"]) / scale * module["weight"] + module["bias"]
        else:
            h = module["weight"] @ h + module["bias"]
        if f"mlp.net.{i + 1}.running_mean" not in p:
            h = relu(h)
    return np.concatenate([c, h]) if parallel else h


# The columns of each head on LAYOUT, all first halves and then all second halves; None is a column of zeros.
HEADS = {
    1: [[0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]],
    2: [[0, 1, 4, 8, 2, 5, 9], [None, 3, 6, 10, None, 7, 11]],
}
# And where its fields are 3, 3, 2 and 2 columns wide.
PROJECTED = [[0, 1, 3, 6, 8, 2, 4, 5, 7, 9]]


def dcnv3(p, x0, widths, num_heads=1, layer_norm=True, batch_norm=False, projection=None, **_):
    columns = HEADS[num_heads]
    if projection:
        x0, sizes = projected(at(p, "projection"), x0, widths, projection)
        assert sizes == (3, 3, 2, 2)
        columns = PROJECTED
    streams = []
    for network in ("deep", "shallow"):
        if count(p, network) == 0:
            continue
        heads = []
        for k, order in enumerate(columns):
            start = np.array([0.0 if i is None else x0[i] for i in order])
            x = start
            for i in range(count(p, network)):
                layer = at(p, f"{network}.{i}")
                h = layer["linear.weight"] @ x
                if batch_norm:
                    norm = at(layer, "batch_norm")
                    scale = norm["weight"][k] / np.sqrt(norm["running_var"][k] + 1e-5)
                    h = (h - norm["running_mean"][k]) * scale + norm["bias"][k]
                m = h
                if layer_norm:
                    m = _layer_norm(h, layer["layer_norm.weight"], layer["layer_norm.bias"])
                crossed = np.concatenate([h, (h * relu(m))[: len(x) - len(h)]])
                x = (x if network == "deep" else start) * (crossed + layer["bias"]) + x
            heads.append(x)
        streams.append(sum(heads) / len(heads))
    return np.concatenate(streams)


_layer_norm = layer_norm


def parallel(p, x0, widths, with_input=True, **_):
    low = p["projection.weight"] @ x0 if "projection.weight" in p else x0
    parts = [dcnv2(at(p, f"stacks.{i}"), low, widths) for i in range(count(p, "stacks"))]
    return np.concatenate([*parts, x0] if with_input else parts)


# Cases -------------------------------------------------------------------------------------------------------

F = len(LAYOUT)


def _edcn(bridge="hadamard", layers=2, d=D, norm=True, entry=0, **options):
    of_bridge = {
        "hadamard": (0, 0),
        "add": (0, 0),
        "concat": (2 * d * d + d, 4 * d * d),
        "attention": (2 * (d * d + 2 * d), 4 * (d * d + d)),
    }[bridge]
    params = layers * (d * d + 3 * d + 2 * F + (4 * d if norm else 0) + of_bridge[0]) + entry
    flops = layers * (2 * d * d + 2 * d + of_bridge[1]) + 2 * entry
    options = {"num_layers": layers, "bridge": bridge, **options}
    return Case("edcn", options if norm else options | {"batch_norm": False}, params, flops)


def _gdcn(name, hidden, layers=2, d=D, entry=0, **options):
    widths = [d, *hidden]
    dense = list(pairwise(widths))
    norm = sum(2 * b for _, b in dense) if options.get("batch_norm") else 0
    params = layers * (2 * d * d + d) + sum(a * b + b for a, b in dense) + norm + entry
    flops = layers * 4 * d * d + sum(2 * a * b for a, b in dense) + 2 * entry
    return Case(name, {"num_layers": layers, "hidden": list(hidden), **options}, params, flops)


def _dcnv3(name, deep, shallow, d=D, heads=1, entry=0, layer_norm=True, **options):
    n, layers = (d + 1) // 2, deep + shallow
    layer = d * n + d + (2 * n if layer_norm else 0) + (2 * heads if options.get("batch_norm") else 0)
    sizes = {} if name == "lcn" else {"num_deep_layers": deep}
    sizes |= {} if name == "ecn" else {"num_shallow_layers": shallow}
    options |= {"num_heads": heads} if heads > 1 else {}
    options |= {} if layer_norm else {"layer_norm": False}
    return Case(name, sizes | options, layers * layer + entry, 2 * heads * layers * d * n + 2 * entry)


def _parallel(name, stacks, layers, d=D, entry=0, **options):
    sizes = {"num_stacks": stacks, "num_layers": layers}
    params = stacks * layers * (d * d + d) + entry
    return Case(name, sizes | options, params, 2 * stacks * layers * d * d + 2 * entry)


CASES = [
    Case("dcn", {"num_layers": 3}, 3 * 2 * D, 3 * 2 * D),
    Case("dcn", {"num_layers": 2, "projection": 5}, 5 * D + 2 * 10, 10 * D + 2 * 10),
    _edcn(),
    _edcn("add", temperature=0.5),
    _edcn("concat", norm=False, temperature=3.0),
    _edcn("attention"),
    _edcn(d=10, projection=10, entry=1 * 3 + 3 * 3 + 4 * 2 + 4 * 2),
    _gdcn("gdcn_p", (7, 5)),
    _gdcn("gdcn_p", (7,), d=5, projection=5, entry=5 * D),
    _gdcn("gdcn_s", ()),
    _gdcn("gdcn_s", (7, 5), batch_norm=True, dropout=0.5),
    _dcnv3("dcnv3", 2, 1),
    _dcnv3("dcnv3", 1, 2, d=7, heads=2, batch_norm=True),
    _dcnv3("dcnv3", 1, 1, d=10, projection=10, entry=1 * 3 + 3 * 3 + 4 * 2 + 4 * 2, dropout=0.5),
    _dcnv3("sdcnv3", 2, 2, layer_norm=False),
    _dcnv3("ecn", 2, 0),
    _dcnv3("lcn", 0, 3),
    _parallel("dcnv2_parallel", 4, 2),
    _parallel("dcnv2_parallel", 2, 3, d=5, projection=5, entry=5 * D),
    _parallel("dcnv2_concat", 3, 1, with_input=False),
    _parallel("homefeed_baseline", 1, 4),
]

REFERENCES = {
    "dcn": dcn,
    "edcn": edcn,
    "gdcn_p": lambda p, x0, widths, **options: gdcn(p, x0, widths, True),
    "gdcn_s": lambda p, x0, widths, **options: gdcn(p, x0, widths, False),
    "dcnv3": dcnv3,
    "sdcnv3": dcnv3,
    "ecn": dcnv3,
    "lcn": dcnv3,
    "dcnv2_parallel": parallel,
    "dcnv2_concat": lambda p, x0, widths, **options: parallel(
        p, x0, widths, **{"with_input": False} | options
    ),
    "homefeed_baseline": parallel,
}
