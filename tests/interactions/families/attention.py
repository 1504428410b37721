"""The Transformer and Hiformer."""

from math import erf, sqrt

import numpy as np
from families.case import LAYOUT, Case
from families.maths import at, count, layer_norm, relu

NUMERIC = [i for i, field in enumerate(LAYOUT) if field.kind == "numeric"]


def gelu(x):
    return np.array([v * 0.5 * (1 + erf(v / sqrt(2))) for v in x])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def fields(x0, widths):
    """The columns of each field."""
    ends = np.cumsum(widths)
    return [x0[end - width : end] for end, width in zip(ends, widths, strict=True)]


def projected(p, parts):
    """A token a field; the stacks hold neighbouring fields of one width."""
    matrices = [matrix for key in sorted(p, key=lambda key: int(key.split(".")[-1])) for matrix in p[key]]
    return [part @ matrix for part, matrix in zip(parts, matrices, strict=True)]


def one_head(queries, keys, values):
    out = []
    for query in queries:
        weights = softmax(np.array([query @ key for key in keys]) / sqrt(len(query)))
        out.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    return out


def split_tokens(x0, widths):
    """Fields with a token of their own, and all numeric columns (by the kinds of ``LAYOUT``)."""
    parts = fields(x0, widths)
    return [part for i, part in enumerate(parts) if i not in NUMERIC], np.concatenate(
        [parts[i] for i in NUMERIC]
    )


def transformer(p, x0, widths, num_heads, head_width, dense_tokens=4, **_):
    """Homefeed, Section 5.3.1; the layer as in Attention Is All You Need."""
    width = num_heads * head_width
    single, numeric = split_tokens(x0, widths)
    tokens = projected(at(p, "tokens.fields.projections"), single)
    dense = p["tokens.groups.0.weight"] @ numeric
    tokens += [dense[i * width : (i + 1) * width] for i in range(dense_tokens)]
    for i in range(count(p, "layers")):
        q = at(p, f"layers.{i}")
        maps = [q["qkv.weight"][j * width : (j + 1) * width] for j in range(3)]
        shifts = [q["qkv.bias"][j * width : (j + 1) * width] for j in range(3)]
        query, key, value = ([m @ x + b for x in tokens] for m, b in zip(maps, shifts, strict=True))
        heads = []
        for h in range(num_heads):
            part = slice(h * head_width, (h + 1) * head_width)
            heads.append(one_head(*([x[part] for x in xs] for xs in (query, key, value))))
        after = []
        for t, x in enumerate(tokens):
            mixed = np.concatenate([head[t] for head in heads])
            x = x + q["out.weight"] @ mixed + q["out.bias"]
            x = layer_norm(x, q["norms.0.weight"], q["norms.0.bias"])
            inner = relu(q["up.weight"] @ x + q["up.bias"])
            x = x + q["down.weight"] @ inner + q["down.bias"]
            after.append(layer_norm(x, q["norms.1.weight"], q["norms.1.bias"]))
        tokens = after
    return np.concatenate(tokens)


def hiformer(p, x0, widths, num_heads, projection="composite", num_tasks=None, **_):
    """Hiformer: heterogeneous attention, or composite projections; task tokens at the end."""
    single, numeric = split_tokens(x0, widths)
    tokens = projected(at(p, "tokens.fields.projections"), single)
    width = p["tokens.tasks"].shape[1]
    inner = relu(p["tokens.dense.0.weight"] @ numeric + p["tokens.dense.0.bias"])
    dense = p["tokens.dense.2.weight"] @ inner + p["tokens.dense.2.bias"]
    tokens += [dense[i : i + width] for i in range(0, len(dense), width)]
    tokens += list(p["tokens.tasks"])
    layers = count(p, "layers")
    for i in range(layers):
        q = at(p, f"layers.{i}")
        kept = len(tokens) if i < layers - 1 else len(p["tokens.tasks"])
        last = tokens[len(tokens) - kept :]

        def mapped(name, reads, to, q=q):
            if projection == "per_token":
                return [x @ m for x, m in zip(reads, q[f"{name}.weight"], strict=True)]
            low = q[f"{name}.down.weight"] @ np.concatenate(tokens)  # noqa: B023
            return np.split(q[f"{name}.up.weight"] @ low, to)

        query = mapped("query", last, kept)
        key, value = (mapped(name, tokens, len(tokens)) for name in ("key", "value"))
        heads = [
            one_head(*([np.split(x, num_heads)[h] for x in xs] for xs in (query, key, value)))
            for h in range(num_heads)
        ]
        after = []
        for t, x in enumerate(last):
            x = x + np.concatenate([head[t] for head in heads]) @ q["out.weight"][t]
            x = layer_norm(x, q["norms.0.weight"], q["norms.0.bias"])
            inner = gelu(x @ q["ffn.up.weight"][t] + q["ffn.up.bias"][t])
            x = x + inner @ q["ffn.down.weight"][t] + q["ffn.down.bias"][t]
            after.append(layer_norm(x, q["norms.1.weight"], q["norms.1.bias"]))
        tokens = after
    return tokens[0] if num_tasks is None else np.stack(tokens)


def _transformer(layers=2, heads=2, head=3, ff=None, dense=4, **options):
    width = heads * head
    inner = ff or 4 * width
    tokens = 3 + dense  # user, item, genre, and the group of one numeric column
    entry = width * (3 + 4 + 4) + width * dense * 1
    layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    flops = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * inner
    sizes = {"num_layers": layers, "num_heads": heads, "head_width": head, "dense_tokens": dense}
    if ff:
        sizes["feedforward"] = ff
    return Case("transformer", sizes | options, layers * layer + entry, layers * flops + 2 * entry)


def _hiformer(layers=2, d=6, h=2, a=3, c=2, rk=4, rv=5, ff=7, dense=2, tasks=None, per_token=False):
    total, t = 3 + dense + (tasks or 1), tasks or 1
    entry = d * (3 + 4 + 4) + (1 * d + d) + dense * (d * d + d) + t * d
    params, flops = entry, 2 * d * (3 + 4 + 4 + 1 + dense * d)
    for to in [total] * (layers - 1) + [t]:
        if per_token:
            maps = to * d * h * a + total * d * h * a + total * d * h * c
        else:
            maps = rk * (2 * total * d + to * h * a + total * h * a) + rv * (total * d + total * h * c)
        maps += to * h * c * d
        params += maps + to * (2 * d * ff + ff + d) + 4 * d
        flops += 2 * maps + 2 * to * total * h * (a + c) + 4 * to * d * ff
    sizes = {
        "num_layers": layers,
        "token_width": d,
        "num_heads": h,
        "key_width": a,
        "value_width": c,
        "key_rank": rk,
        "value_rank": rv,
        "feedforward": ff,
        "dense_tokens": dense,
    }
    changed = ({"projection": "per_token"} if per_token else {}) | ({"num_tasks": tasks} if tasks else {})
    return Case("hiformer", sizes | changed, params, flops)


CASES = [
    _transformer(),
    _transformer(layers=1, heads=1, head=4, ff=5, dense=1, dropout=0.1),
    _hiformer(),
    _hiformer(layers=1, dense=1, tasks=1),
    _hiformer(tasks=2, per_token=True),
]

REFERENCES = {"transformer": transformer, "hiformer": hiformer}
