"""WuKong and RankMixer."""

from itertools import pairwise

import numpy as np
from families.attention import fields, gelu
from families.case import LAYOUT, Case, D
from families.factorisation import field_vectors, mlp
from families.maths import at, count, layer_norm, relu


def wukong(p, x0, widths, token_width=None, num_fmb=16, num_lcb=16, **_):
    """Wukong: X' = LN(concat(FMB(X), LCB(X)) + X), pair by pair."""
    x = np.stack(field_vectors(p, x0, widths, token_width))
    e = x.shape[1]
    for i in range(count(p, "layers")):
        q = at(p, f"layers.{i}")
        n, rank = q["fmb.projection"].shape
        machine = np.zeros((n, rank))
        for a in range(n):
            for k in range(rank):
                machine[a, k] = sum((x[a] @ x[b]) * q["fmb.projection"][b, k] for b in range(n))
        h = layer_norm(machine.flatten(), q["fmb.norm.weight"], q["fmb.norm.bias"])
        h = mlp(q, h, "fmb.mlp")
        new = (q["fmb.out.weight"] @ h + q["fmb.out.bias"]).reshape(num_fmb, e)
        linear = [sum(w * token for w, token in zip(row, x, strict=True)) for row in q["lcb.weight"]]
        kept = q["residual.weight"] @ x if "residual.weight" in q else x
        x = np.stack(
            [
                layer_norm(token + residual, q["norm.weight"], q["norm.bias"])
                for token, residual in zip([*new, *linear], kept, strict=True)
            ]
        )
    return x.flatten()


def _tokens(p, x0, widths, num_tokens):
    """Fields by source, cut into slices of one length, zeros at the end."""
    parts = fields(x0, widths)
    grouped = np.concatenate(
        [
            part
            for source in ("user", "item", "user_item", "context")
            for part, field in zip(parts, LAYOUT, strict=True)
            if field.source == source
        ]
    )
    each = -(-len(grouped) // num_tokens)
    grouped = np.concatenate([grouped, np.zeros(num_tokens * each - len(grouped))])
    return [
        grouped[t * each : (t + 1) * each] @ p["tokens.projection.weight"][t] + p["tokens.projection.bias"][t]
        for t in range(num_tokens)
    ]


def _rankmixer(p, x0, widths, num_tokens, ffn):
    x = _tokens(p, x0, widths, num_tokens)
    for i in range(count(p, "blocks")):
        q = at(p, f"blocks.{i}")
        heads = [np.split(token, num_tokens) for token in x]
        mixed = [np.concatenate([head[h] for head in heads]) for h in range(num_tokens)]
        s = [layer_norm(a + b, q["norms.0.weight"], q["norms.0.bias"]) for a, b in zip(mixed, x, strict=True)]
        x = [
            layer_norm(ffn(q, t, token) + token, q["norms.1.weight"], q["norms.1.bias"])
            for t, token in enumerate(s)
        ]
    return sum(x) / num_tokens


def rankmixer(p, x0, widths, num_tokens, **_):
    def ffn(q, t, s):
        inner = gelu(s @ q["ffn.up.weight"][t] + q["ffn.up.bias"][t])
        return inner @ q["ffn.down.weight"][t] + q["ffn.down.bias"][t]

    return _rankmixer(p, x0, widths, num_tokens, ffn)


def rankmixer_moe(p, x0, widths, num_tokens, num_experts, **_):
    """In inference: h_infer's gates, expert by expert."""

    def ffn(q, t, s):
        gates = relu(s @ q["ffn.infer_router.weight"][t] + q["ffn.infer_router.bias"][t])
        width = q["ffn.up.weight"].shape[2] // num_experts
        out = np.zeros_like(s)
        for j in range(num_experts):
            part = slice(j * width, (j + 1) * width)
            inner = gelu(s @ q["ffn.up.weight"][t][:, part] + q["ffn.up.bias"][t][part])
            out += gates[j] * (inner @ q["ffn.down.weight"][t][part] + q["ffn.bias"][t][j])
        return out

    return _rankmixer(p, x0, widths, num_tokens, ffn)


def _wukong(layers=2, e=None, nf=3, nl=2, k=2, hidden=None, deep=1):
    width = e or 4
    entry = sum(w * width for w in LAYOUT.widths if e or w != width)
    params, flops = entry, 2 * entry
    n, m = len(LAYOUT.widths), nf + nl
    for _ in range(layers):
        chain = [n * k, *[hidden or nf * width] * deep, nf * width]
        steps = list(pairwise(chain))
        params += n * k + 2 * n * k + sum(a * b + b for a, b in steps) + n * nl + 2 * width
        flops += 4 * n * width * k + sum(2 * a * b for a, b in steps) + 2 * n * nl * width
        if n != m:
            params, flops = params + n * m, flops + 2 * n * m * width
        n = m
    sizes = {"num_layers": layers, "num_fmb": nf, "num_lcb": nl, "rank": k}
    given = {"token_width": e, "hidden": hidden, "num_hidden": deep}
    changed = {key: value for key, value in given.items() if value not in (None, 1)}
    return Case("wukong", sizes | changed, params, flops)


def _mixer(layers=2, tokens=3, head=2, hidden=None, experts=None, **options):
    d = tokens * head
    each = -(-D // tokens)
    entry = tokens * (each * d + d)
    sizes = {"num_layers": layers, "num_tokens": tokens, "head_width": head} | options
    if hidden:
        sizes["hidden"] = hidden
    if experts is None:
        h = hidden or 3 * d
        block = tokens * (2 * d * h + h + d) + 4 * d
        flops = 4 * layers * tokens * d * h
        name = "rankmixer"
    else:
        h = hidden or round(3 * d / experts)
        block = tokens * (experts * (2 * d * h + h + d) + 2 * (d * experts + experts)) + 4 * d
        flops = layers * tokens * experts * (4 * d * h + 4 * d)
        sizes["num_experts"] = experts
        name = "rankmixer_moe"
    return Case(name, sizes, layers * block + entry, flops + 2 * tokens * each * d)


CASES = [
    _wukong(),
    _wukong(layers=1, nf=2, nl=2, hidden=5, deep=2),
    _wukong(layers=1, e=3, nf=1, nl=4, deep=0),
    _mixer(),
    _mixer(layers=1, tokens=5, head=1, hidden=4),
    _mixer(layers=1, tokens=1, head=3),
    _mixer(experts=3),
    _mixer(layers=1, tokens=2, head=2, hidden=5, experts=2, active_ratio=0.5),
]

REFERENCES = {"wukong": wukong, "rankmixer": rankmixer, "rankmixer_moe": rankmixer_moe}
