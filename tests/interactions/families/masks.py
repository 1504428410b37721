"""MaskNet, the Homefeed stack and ML-DCN."""

import numpy as np
from families.case import Case, D
from families.cross import dcnv2
from families.maths import at, count, layer_norm, per_field_l2, per_field_layer_norm, relu


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


def _mldcn(name="mldcn", *, mask="full", norm="branch", reads=D, entry=0, **options):
    layers, rank, k = 2, 3, 2
    of_mask = {
        "full": (reads * k + k + k * rank + rank, reads * k + k * rank),
        "linear": (reads * rank + rank, reads * rank),
        "relu": (reads * rank + rank, reads * rank),
        "none": (0, 0),
    }[mask]
    of_norm = 0 if norm == "none" else 2 * D
    sizes = {"num_layers": layers, "rank": rank, "mask_ratio": k / rank}
    changed = ({"mask": mask} if mask != "full" else {}) | ({"norm": norm} if norm != "branch" else {})
    return Case(
        name,
        sizes | changed | options,
        layers * (2 * D * rank + D + of_mask[0] + of_norm) + entry,
        layers * 2 * (2 * D * rank + of_mask[1]),
    )


def _block(guide, n, out, ratio):
    k = round(ratio * n)
    return guide * k + k + k * n + n + n * out + 2 * out, 2 * (guide * k + k * n + n * out)


_PARALLEL = _block(D, D, 5, 0.5)
_SERIAL = [_block(D, n, 5, 2.0) for n in (D, 5, 5)]
_WIDE = [_block(n, n, 5, 0.5) for n in (D, 5)]

CASES = [
    Case("masknet", {"num_layers": 2, "mask_ratio": 0.5}, 2 * (2 * D**2 + 1.5 * D + 4 * D), 2 * 4 * D**2),
    Case(
        "masknet",
        {"num_layers": 2, "mask_ratio": 0.5, "width": 5},
        sum(p for p, _ in _WIDE) + 2 * D + 10,
        sum(f for _, f in _WIDE),
    ),
    Case("masknet_serial", {"width": 5}, sum(p for p, _ in _SERIAL) + 2 * D, sum(f for _, f in _SERIAL)),
    Case(
        "masknet_parallel",
        {"num_blocks": 2, "width": 5, "reduction_ratio": 0.5},
        2 * _PARALLEL[0] + 2 * D,
        2 * _PARALLEL[1],
    ),
    Case(
        "homefeed",
        {"width": 5, "aggregation_ratio": 0.5},
        3 * _PARALLEL[0] + 2 * D + 4 * (15 * 15 + 15),
        3 * _PARALLEL[1] + 4 * 2 * 15 * 15,
    ),
    _mldcn(),
    _mldcn(name="mldcn_plain"),
    _mldcn(mask="none"),
    _mldcn(mask="linear"),
    _mldcn(mask="relu"),
    _mldcn(mask_input="projected", reads=3),
    _mldcn(mask_input="x0"),
    _mldcn(norm="post", norm_gain=1.0),
    _mldcn(norm="batch"),
    _mldcn(norm="none"),
    _mldcn(norm_eps=1.0, bias="outside", activation="identity"),
    _mldcn(input_norm="layer", entry=2 * D),
    _mldcn(input_norm="field_l2", dropout=0.0),
]

REFERENCES = {
    "masknet": masknet,
    "masknet_serial": masknet_serial,
    "masknet_parallel": masknet_parallel,
    "homefeed": homefeed,
    "mldcn": mldcn,
    "mldcn_plain": mldcn,
}
