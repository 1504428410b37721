"""FinalMLP, DHEN, mixtures of experts and DeepLight's model."""

from itertools import combinations, pairwise

import numpy as np
from families.case import LAYOUT, Case, D
from families.cross import dcnv2, dcnv2_lowrank, dnn
from families.masks import masknet_parallel, mldcn
from families.maths import at, layer_norm, relu

EXPERTS = {"dnn": dnn, "dcnv2": dcnv2, "dcnv2_lowrank": dcnv2_lowrank, "mldcn": mldcn}
EXPERTS["masknet_parallel"] = masknet_parallel


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def cut(width, parts):
    """Slices as wide as each other, the first ones wider by one where that does not come out."""
    sizes = [width // parts + (1 if i < width % parts else 0) for i in range(parts)]
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def mlp(p, x):
    for i in sorted({int(key.split(".")[1]) for key in p}):
        x = relu(p[f"net.{i}.weight"] @ x + p[f"net.{i}.bias"])
    return x


def finalmlp(
    p, x0, widths, hidden1, hidden2, num_heads=1, width=1, selection=True, context1=(), context2=(), **_
):
    columns = {field.name: field.columns for field in LAYOUT}
    columns["source:item"] = slice(4, 12)
    streams = []
    for i, context in enumerate((context1, context2)):
        x = x0
        if selection and context:
            c = np.concatenate([x0[columns[name]] for name in context])
            gate = at(p, f"gates.{i}")
            x = x0 * 2 * sigmoid(gate["out.weight"] @ mlp(at(gate, "mlp"), c) + gate["out.bias"])
        elif selection:
            x = x0 * 2 * sigmoid(p[f"gates.{i}.bias"])
        streams.append(mlp(at(p, f"mlps.{i}"), x))
    one, two = streams
    y = p["fusion.linear1.weight"] @ one + p["fusion.linear2.weight"] @ two + p["fusion.linear1.bias"]
    heads = [head for i in range(len(p)) if f"fusion.weights.{i}" in p for head in p[f"fusion.weights.{i}"]]
    for a, b, head in zip(cut(len(one), num_heads), cut(len(two), num_heads), heads, strict=True):
        matrices = head.reshape(len(one[a]), width, len(two[b]))
        for q in range(width):
            y[q] += one[a] @ matrices[:, q, :] @ two[b]
    return y


def mixture(p, x0, expert, num_experts, num_gates, top_k=None):
    experts = [
        EXPERTS[expert["name"]](at(p, f"mixture.experts.{i}"), x0, (1, 3, 4, 4), **expert)
        for i in range(num_experts)
    ]
    if num_experts == 1:
        return np.stack(experts * num_gates)
    scores = (p["mixture.gates.linear.weight"] @ x0).reshape(num_gates, num_experts)
    out = []
    for row in scores:
        if top_k is not None:
            row = np.where(row >= np.sort(row)[-top_k], row, -np.inf)
        out.append(sum(g * f for g, f in zip(softmax(row), experts, strict=True)))
    return np.stack(out)


def moe(p, x0, widths, expert, num_experts=3, top_k=None, width=None, **_):
    return mixture(p, x0, expert, num_experts, 1, top_k)[0]


def mmoe(p, x0, widths, expert, num_experts=3, top_k=None, num_tasks=None, **_):
    out = mixture(p, x0, expert, num_experts, num_tasks or 1, top_k)
    return out if num_tasks else out[0]


def field_tokens(p, x0, widths, token_width):
    """(m, e): fields of another width than the commonest (4), or all with a token width, times a matrix."""
    matrices = [matrix for run in sorted(p, key=lambda key: int(key.split(".")[1])) for matrix in p[run]]
    tokens, start = [], 0
    for width in widths:
        field = x0[start : start + width]
        tokens.append(field if width == 4 and token_width is None else field @ matrices.pop(0))
        start += width
    return np.stack(tokens)


def dhen(p, x0, widths, layers, ensemble="sum", num_tokens=None, token_width=None, **_):
    """X' = LN(ensemble(modules) + shortcut), tokens one by one."""
    e = token_width or 4
    tokens = field_tokens(at(p, "tokens"), x0, widths, token_width)
    out_tokens = num_tokens or len(widths)
    for n, modules in enumerate(layers):
        q = at(p, f"layers.{n}")
        found = []
        for i, module in enumerate(modules):
            options = module if isinstance(module, dict) else {"name": module}
            flat = EXPERTS[options["name"]](
                at(q, f"parts.{i}"), tokens.reshape(-1), (e,) * len(tokens), **options
            )
            if f"maps.{i}.weight" in q:
                flat = q[f"maps.{i}.weight"] @ flat
            if ensemble == "weighted":
                flat = q["weights"][i] * flat
            found.append(flat.reshape(out_tokens, e))
        whole = np.concatenate(found) if ensemble == "concat" else sum(found)
        short = q["shortcut.weight"] @ tokens if "shortcut.weight" in q else tokens
        tokens = np.stack(
            [layer_norm(row, q["norm.weight"], q["norm.bias"]) for row in whole + short],
        )
    return tokens.reshape(-1)


def deeplight(p, x0, widths, first_order="embedding", token_width=None, sides=(), **_):
    """DeepFwFM: the field-weighted pairs of tokens, and the DNN's output beside them."""
    tokens = field_tokens(at(p, "fwfm.tokens"), x0, widths, token_width)
    pairs = list(combinations(range(len(tokens)), 2))
    y = sum(r * (tokens[i] @ tokens[j]) for r, (i, j) in zip(p["fwfm.weight"], pairs, strict=True))
    if first_order == "embedding":
        y = y + (p["fwfm.linear.linear.weight"] @ x0)[0]
    elif first_order == "ids":
        y = y + sides[0].sum()
    return np.append(y, mlp(at(p, "mlp"), x0))


def _chain(*widths):
    pairs = list(pairwise(widths))
    return sum(a * b + b for a, b in pairs), sum(2 * a * b for a, b in pairs)


def _fusion(n1, n2, q, k):
    products = sum((n1 // k + (i < n1 % k)) * (n2 // k + (i < n2 % k)) for i in range(k))
    return q * (products + n1 + n2 + 1), 2 * q * (products + n1 + n2)


def _finalmlp(contexts=(0, 0), q=1, k=1, selection=True, **options):
    """contexts: the widths that the gates read, 0 where a gate is a constant."""
    parts = [_chain(D, 7, 6), _chain(D, 5), _fusion(6, 5, q, k)]
    parts += [_chain(width, 3, D) if width else (D, 0) for width in contexts if selection]
    given = {"hidden1": [7, 6], "hidden2": [5], "gate_hidden": [3]}
    given |= ({"width": q} if q > 1 else {}) | ({"num_heads": k} if k > 1 else {})
    given |= {} if selection else {"selection": False}
    return Case("finalmlp", given | options, sum(p for p, _ in parts), sum(f for _, f in parts))


_RANK = 2
_LOW = (2 * (2 * D * _RANK + D), 2 * 4 * D * _RANK)
_K = 1
_ML = (
    2 * (2 * D * _RANK + D * _K + _K * _RANK + _K + _RANK + 3 * D),
    2 * 2 * (2 * D * _RANK + D * _K + _K * _RANK),
)
LOW = {"name": "dcnv2_lowrank", "num_layers": 2, "rank": _RANK}
MASKED = {"name": "mldcn", "num_layers": 2, "rank": _RANK}


def _mixture(name, expert, sizes, n, tasks=None, **options):
    gates = (tasks or 1) * D * n if n > 1 else 0
    noise = gates if "top_k" in options else 0
    given = {"expert": expert, "num_experts": n} | ({"num_tasks": tasks} if tasks else {})
    return Case(name, given | options, n * sizes[0] + gates + noise, n * sizes[1] + 2 * gates)


_NET = {"name": "dnn", "hidden": [7]}
_CROSS = {"name": "dcnv2", "num_layers": 1}


def _dhen(layers, *, e=4, tokens=4, ensemble="sum", **options):
    """Sizes by hand: layers of (kind, output width) in the order of the options' modules."""
    params = flops = 0
    widths = [1, 3, 4, 4]
    projected = [w for w in widths if w != 4 or "token_width" in options]
    params += sum(w * e for w in projected)
    flops += 2 * sum(w * e for w in projected)
    m = 4
    for modules in layers:
        d = m * e
        for module in modules:
            if module["name"] == "dnn":
                params, flops, out = params + d * 7 + 7, flops + 2 * d * 7, 7
            else:
                params, flops, out = params + d * d + d, flops + 2 * d * d, d
            if out != tokens * e:
                params, flops = params + out * tokens * e, flops + 2 * out * tokens * e
        after = tokens * len(modules) if ensemble == "concat" else tokens
        params += 2 * e + (len(modules) if ensemble == "weighted" else 0)
        if after != m:
            params, flops = params + m * after, flops + 2 * m * after * e
        m = after
    given = {"layers": layers} | ({"ensemble": ensemble} if ensemble != "sum" else {})
    return Case("dhen", given | ({"num_tokens": tokens} if tokens != 4 else {}) | options, params, flops)


def _deeplight(linear, **options):
    """4 fields, 6 pairs; linear: weights of the first-order term."""
    e = options.get("token_width", 4)
    projected = sum(w * e for w in (1, 3, 4, 4) if w != 4 or "token_width" in options)
    dnn_sizes = _chain(D, 7, 5)
    params = dnn_sizes[0] + 6 + linear + projected
    return Case(
        "deeplight", {"hidden": [7, 5]} | options, params, dnn_sizes[1] + 2 * (16 * e + linear + projected)
    )


CASES = [
    _finalmlp(),
    _finalmlp(k=2, q=3),
    _finalmlp(k=5),
    _finalmlp(selection=False, dropout=0.5),
    _mixture("moe", LOW, _LOW, 1),
    _mixture("moe", MASKED, _ML, 3),
    _mixture("moe", LOW | {"rank": 9}, _LOW, 2, width=_RANK),
    _mixture("moe", LOW, _LOW, 4, top_k=2),
    _mixture("mmoe", MASKED, _ML, 2),
    _mixture("mmoe", MASKED, _ML, 3, tasks=2),
    _mixture("mmoe", LOW, _LOW, 1, tasks=3),
    _mixture("mmoe", LOW, _LOW, 3, tasks=2, top_k=2),
    _dhen([[_NET, _CROSS], [_CROSS]]),
    _dhen([[_NET, _CROSS], [_CROSS]], ensemble="weighted", tokens=3),
    _dhen([[_CROSS, _NET], [_NET]], ensemble="concat", tokens=2),
    _dhen([[_CROSS]], e=3, token_width=3),
    _dhen([[{"name": "dnn", "hidden": [9]}]], width=7),
    _deeplight(D),
    _deeplight(0, first_order="ids"),
    _deeplight(0, token_width=3, first_order="none", dropout=0.5),
]

# These name fields, which other layouts do not have.
CONTEXTS = [
    _finalmlp(contexts=(3, 8), q=2, context1=["user"], context2=["source:item"]),
    _finalmlp(contexts=(0, 5), context2=["age", "item"], k=3),
]

REFERENCES = {"finalmlp": finalmlp, "moe": moe, "mmoe": mmoe, "dhen": dhen, "deeplight": deeplight}
