"""DNN and the cross networks."""

import numpy as np
from families.case import Case, D
from families.maths import at, count, relu


def dnn(p, x0, widths, hidden=(), **_):
    h = x0
    linears = sorted({int(key.split(".")[2]) for key in p})
    for i in linears:
        h = relu(p[f"mlp.net.{i}.weight"] @ h + p[f"mlp.net.{i}.bias"])
    return h


def dcnv2(p, x0, widths, **_):
    """DCN V2, Eq. 1."""
    if "projection.weight" in p:
        x0 = p["projection.weight"] @ x0
    x = x0
    for i in range(count(p, "layers")):
        x = x0 * (p[f"layers.{i}.linear.weight"] @ x + p[f"layers.{i}.linear.bias"]) + x
    return x


def dcnv2_lowrank(p, x0, widths, **options):
    """DCN V2, Eq. 2: x0 * (U V^T x + b) + x."""
    x = x0
    for i in range(count(p, "layers")):
        layer = at(p, f"layers.{i}")
        low = layer["down.weight"] @ x
        if options.get("relu"):
            low = relu(low)
        x = x0 * (layer["up.weight"] @ low + layer["up.bias"]) + x
    return x


def dcn_mix(p, x0, widths, num_experts, rank, gate="softmax", activation="identity", share_gate=False, **_):
    """DCN V2, Eq. 3 and 4, expert by expert."""
    g = {
        "identity": lambda v: v,
        "relu": relu,
        "tanh": np.tanh,
        "hardtanh": lambda v: np.minimum(np.maximum(v, -1), 1),
    }[activation]
    x = x0
    for i in range(count(p, "layers")):
        layer = at(p, f"layers.{i}")
        if gate == "constant":
            gates = np.ones(num_experts)
        else:
            scores = p[f"gates.{0 if share_gate else i}.linear.weight"] @ x
            gates = np.exp(scores) / np.exp(scores).sum() if gate == "softmax" else 1 / (1 + np.exp(-scores))
        total = np.zeros_like(x)
        for k in range(num_experts):
            v_t = layer["down.weight"][k * rank : (k + 1) * rank]
            u = layer["up.weight"][:, k * rank : (k + 1) * rank]
            low = g(v_t @ x)
            if "inner" in layer:
                low = g(layer["inner"][k] @ low)
            total = total + gates[k] * (x0 * (u @ low + layer["bias"]))
        x = total + x
    return x


def _mix(experts=3, rank=2, layers=2, gates=None, c=False, **options):
    gates = layers if gates is None else gates
    params = layers * (2 * experts * D * rank + D + (experts * rank**2 if c else 0)) + gates * experts * D
    flops = layers * (4 * experts * D * rank + (2 * experts * rank**2 if c else 0))
    flops += 2 * experts * D * (layers if gates else 0)
    options = {"num_layers": layers, "num_experts": experts, "rank": rank, **options}
    return Case("dcn_mix", options | ({"with_c": True} if c else {}), params, flops)


CASES = [
    Case("dnn", {"hidden": [7, 5]}, D * 7 + 7 + 7 * 5 + 5, 2 * (D * 7 + 7 * 5)),
    Case("dnn", {"hidden": []}, 0, 0),
    Case("dnn", {"hidden": [7], "dropout": 0.5}, D * 7 + 7, 2 * D * 7),
    Case("dcnv2", {"num_layers": 2}, 2 * (D * D + D), 4 * D * D),
    Case("dcnv2", {"num_layers": 2, "projection": 5}, D * 5 + 2 * 30, 2 * D * 5 + 4 * 25),
    Case("dcnv2_lowrank", {"num_layers": 3, "rank": 2}, 3 * (4 * D + D), 3 * 8 * D),
    Case("dcnv2_lowrank", {"num_layers": 2, "rank": 3, "relu": True}, 2 * (6 * D + D), 2 * 12 * D),
    _mix(),
    _mix(gate="sigmoid", activation="relu"),
    _mix(gate="sigmoid", gates=1, share_gate=True),
    _mix(gate="constant", gates=0, activation="hardtanh", c=True),
    _mix(activation="tanh", c=True),
]

REFERENCES = {
    "dnn": dnn,
    "dcnv2": dcnv2,
    "dcnv2_lowrank": dcnv2_lowrank,
    "dcn_mix": dcn_mix,
}
