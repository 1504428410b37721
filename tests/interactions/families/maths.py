"""What the plain-NumPy references share: one row at a time, float64, nothing of PyTorch."""

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
