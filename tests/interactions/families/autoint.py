"""AutoInt and AutoInt+."""

import numpy as np
from families.case import Case, D
from families.factorisation import PROJECTED, E, F, field_vectors, mlp
from families.maths import at, count, relu


def autoint(p, x0, widths, num_heads=2, token_width=None, residual=True, **_):
    v = field_vectors(p, x0, widths, token_width)
    for i in range(count(p, "layers")):
        layer = at(p, f"layers.{i}")
        size = len(layer["query.weight"]) // num_heads
        out = []
        for m in range(len(v)):
            heads = []
            for h in range(num_heads):
                w_q, w_k, w_v = (
                    layer[f"{each}.weight"][h * size : (h + 1) * size] for each in ("query", "key", "value")
                )
                scores = np.array([(w_q @ v[m]) @ (w_k @ other) for other in v])
                alpha = np.exp(scores - scores.max())
                alpha = alpha / alpha.sum()
                heads.append(sum(alpha[k] * (w_v @ v[k]) for k in range(len(v))))
            heads = np.concatenate(heads)
            out.append(relu(heads + layer["residual.weight"] @ v[m] if residual else heads))
        v = out
    attended = np.concatenate(v)
    return np.concatenate([attended, mlp(p, x0)]) if any(key.startswith("mlp") for key in p) else attended


def _case(
    name, layers=2, heads=2, size=3, hidden=(), e=E, projected=PROJECTED, projections=4, norms=0, **options
):
    wide = heads * size
    weights = [i * wide * projections for i in [e] + [wide] * (layers - 1)]
    deep = sum(a * b for a, b in zip([D, *hidden], hidden, strict=False))
    given = {"num_layers": layers, "num_heads": heads, "attention_width": size}
    return Case(
        name,
        given | ({"hidden": list(hidden)} if hidden else {}) | options,
        projected + sum(weights) + deep + (1 + norms) * sum(hidden),
        2 * (projected + F * sum(weights) + deep) + layers * 4 * F**2 * wide,
    )


CASES = [
    _case("autoint"),
    _case("autoint", layers=3, heads=1, size=5),
    _case("autoint", layers=1, heads=3, size=2, residual=False, projections=3),
    _case("autoint", token_width=2, e=2, projected=2 * D),
    _case("autoint_plus", hidden=(5, 3), dropout=0.5),
    _case("autoint_plus", hidden=(5,), batch_norm=True, norms=2),
]

REFERENCES = {"autoint": autoint, "autoint_plus": autoint}
