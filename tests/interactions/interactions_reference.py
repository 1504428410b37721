"""The architectures in plain NumPy, one row at a time, written from the papers' equations.

Each takes a mapping of float64 arrays under the module's parameter names, and one row ``x0``.
"""

import numpy as np


def relu(x):
    return np.where(x > 0, x, 0.0)


def layer_norm(x, weight=1.0, bias=0.0, eps=1e-5):
    centred = x - x.sum() / x.size
    return centred / np.sqrt((centred**2).sum() / x.size + eps) * weight + bias


def at(p, prefix):
    """The parameters under a prefix."""
    return {key[len(prefix) + 1 :]: value for key, value in p.items() if key.startswith(prefix + ".")}


def count(p, prefix):
    """How many numbered children a prefix has."""
    return len({key[len(prefix) + 1 :].split(".")[0] for key in p if key.startswith(prefix + ".")})


def per_field_layer_norm(x0, widths, weight, bias):
    out, start = [], 0
    for width in widths:
        field = x0[start : start + width]
        out.append(field if width == 1 else layer_norm(field))
        start += width
    return np.concatenate(out) * weight + bias


def per_field_l2(x0, widths):
    out, start = [], 0
    for width in widths:
        field = x0[start : start + width]
        out.append(field if width == 1 else field / np.sqrt((field**2).sum()))
        start += width
    return np.concatenate(out)


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


def mask_block(p, guide, x):
    mask = p["mask.2.weight"] @ relu(p["mask.0.weight"] @ guide + p["mask.0.bias"]) + p["mask.2.bias"]
    return relu(layer_norm(p["hidden.weight"] @ (mask * x), p["norm.weight"], p["norm.bias"]))


def masknet(p, x0, widths, **_):
    """ML-DCN paper, Eq. 5 to 7."""
    x = x0
    for i in range(count(p, "blocks")):
        norm = at(p, f"norms.{i}")
        x = mask_block(at(p, f"blocks.{i}"), x, layer_norm(x, norm["weight"], norm["bias"]))
    return x


def masknet_serial(p, x0, widths, **_):
    x = per_field_layer_norm(x0, widths, p["field_norm.weight"], p["field_norm.bias"])
    for i in range(count(p, "blocks")):
        x = mask_block(at(p, f"blocks.{i}"), x0, x)
    return x


def masknet_parallel(p, x0, widths, **_):
    x = per_field_layer_norm(x0, widths, p["field_norm.weight"], p["field_norm.bias"])
    return np.concatenate([mask_block(at(p, f"blocks.{i}"), x0, x) for i in range(count(p, "blocks"))])


def homefeed(p, x0, widths, **_):
    return dcnv2(at(p, "crosses"), masknet_parallel(at(p, "masks"), x0, widths), widths)


def mldcn(
    p,
    x0,
    widths,
    mask="full",
    mask_input="x",
    norm="branch",
    bias="inside",
    activation="relu",
    norm_eps=1e-5,
    input_norm="none",
    **_,
):
    """ML-DCN, Eq. 8 with Eq. 5's mask, dropout off."""
    phi = relu if activation == "relu" else (lambda v: v)
    if input_norm == "layer":
        x0 = layer_norm(x0, p["entry.0.weight"], p["entry.0.bias"])
    elif input_norm == "field_l2":
        x0 = per_field_l2(x0, widths)
    x = x0
    for i in range(count(p, "layers")):
        q = at(p, f"layers.{i}")
        low = q["down.weight"] @ x
        if mask != "none":
            reads = {"x": x, "x0": x0, "projected": low}[mask_input]
            m = q["mask.net.0.weight"] @ reads + q["mask.net.0.bias"]
            if mask != "linear":
                m = phi(m)
            if mask == "full":
                m = q["mask.net.2.weight"] @ m + q["mask.net.2.bias"]
            low = low * m
        z = q["up.weight"] @ low
        branch = x0 * (z + q["up.bias"]) if bias == "inside" else x0 * z + q["up.bias"]
        if norm == "branch":
            x = layer_norm(branch, q["norm.weight"], q["norm.bias"], norm_eps) + x
        elif norm == "post":
            x = layer_norm(branch + x, q["norm.weight"], q["norm.bias"], norm_eps)
        elif norm == "batch":
            scale = np.sqrt(q["norm.running_var"] + norm_eps)
            x = (branch - q["norm.running_mean"]) / scale * q["norm.weight"] + q["norm.bias"] + x
        else:
            x = branch + x
    return x


REFERENCES = {
    "dnn": dnn,
    "dcnv2": dcnv2,
    "dcnv2_lowrank": dcnv2_lowrank,
    "dcn_mix": dcn_mix,
    "masknet": masknet,
    "masknet_serial": masknet_serial,
    "masknet_parallel": masknet_parallel,
    "homefeed": homefeed,
    "mldcn": mldcn,
    "mldcn_plain": mldcn,
}
