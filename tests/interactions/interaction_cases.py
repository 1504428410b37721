"""The variants that every interaction test runs over, with each one's sizes in closed form."""

from dataclasses import dataclass, field
from typing import Any

import torch

from mldcn import interactions
from mldcn.layout import FieldLayout

LAYOUT = FieldLayout.build(
    [
        ("age", "numeric", "user", 1),
        ("user", "categorical", "user", 3),
        ("item", "categorical", "item", 4),
        ("genre", "categorical", "item", 4),
    ]
)
D = LAYOUT.width


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    params: int = 0
    flops: int = 0

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())]).replace(" ", "")

    def build(self, features=LAYOUT, perturb=True, seed=0):
        torch.manual_seed(seed)
        module = interactions.build({"name": self.name, **self.options}, features).double()
        if perturb:
            perturb_(module)
        return module


def perturb_(module):
    """Random noise on every parameter and running statistic, so that none is at its special start."""
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
        for name, tensor in module.named_buffers():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) if "var" in name else 0.3 * torch.randn_like(tensor))


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


def _mix(experts=3, rank=2, layers=2, gates=None, c=False, **options):
    gates = layers if gates is None else gates
    params = layers * (2 * experts * D * rank + D + (experts * rank**2 if c else 0)) + gates * experts * D
    flops = layers * (4 * experts * D * rank + (2 * experts * rank**2 if c else 0))
    flops += 2 * experts * D * (layers if gates else 0)
    options = {"num_layers": layers, "num_experts": experts, "rank": rank, **options}
    return Case("dcn_mix", options | ({"with_c": True} if c else {}), params, flops)


def _block(guide, n, out, ratio):
    k = round(ratio * n)
    return guide * k + k + k * n + n + n * out + 2 * out, 2 * (guide * k + k * n + n * out)


_PARALLEL = _block(D, D, 5, 0.5)
_SERIAL = [_block(D, n, 5, 2.0) for n in (D, 5, 5)]
_WIDE = [_block(n, n, 5, 0.5) for n in (D, 5)]

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
