"""All of a model in one module, from encoded rows to served probabilities: what an ONNX file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mldcn.embedding.sides import hashed_crosses
from mldcn.metrics import Isotonic, Platt
from mldcn.serving.program import Body, LookUp
from mldcn.serving.store import Kind, packed, parts, unpacked

_EDGE = torch.finfo(torch.float32).eps  # where Platt's logit of a float32 probability is cut


class Whole(nn.Module):
    """``(ids, dense) -> (probabilities, logits)``, each ``(B, T)`` float32.

    Args:
        body: the model without its tables.
        plan: the look-ups.
        weights: the tables, in the same order.
        tasks: the tasks' names.
        calibrators: of the tasks that have one.
        rates: for each task the share of negatives that the log kept.
    """

    def __init__(
        self,
        body: Body,
        plan: Sequence[LookUp],
        weights: Sequence[Tensor],
        tasks: Sequence[str],
        calibrators: Mapping[str, Platt | Isotonic],
        rates: Sequence[float],
    ) -> None:
        super().__init__()
        self.body = body
        self.tables = nn.ModuleList(_Table(each, weight) for each, weight in zip(plan, weights, strict=True))
        self.finish = nn.ModuleList(
            _Served(calibrators.get(task), rate) for task, rate in zip(tasks, rates, strict=True)
        )

    def forward(self, ids: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities as served, and the logits before calibration; both ``(B, T)``.

        Args:
            ids: ``(B, C)`` int32.
            dense: ``(B, D)`` float32.
        """
        logits = self.body(ids, dense, [table(ids) for table in self.tables])
        scores = torch.sigmoid(logits)
        served = [part(scores[:, i : i + 1]) for i, part in enumerate(self.finish)]
        return torch.cat(served, dim=1), logits


class _Table(nn.Module):
    """The rows that a batch's ids ask for, ``(B, n, e)``."""

    columns: Tensor
    shift: Tensor
    members: Tensor
    salts: Tensor
    table: Tensor
    head: Tensor

    def __init__(self, plan: LookUp, weight: Tensor) -> None:
        super().__init__()
        self.kind: Kind = plan.kind
        self.rows = plan.rows
        self.crossed = bool(plan.members)
        for name in ("columns", "shift", "members", "salts"):
            self.register_buffer(name, torch.tensor(getattr(plan, name)))
        self.width = plan.width
        if plan.kind in ("int8", "int4"):
            codes, scale, offset = parts(packed(weight, plan.kind), plan.kind)
            self.register_buffer("table", codes.contiguous())
            self.register_buffer("head", torch.cat([scale, offset], 1))
        else:
            self.register_buffer("table", unpacked(packed(weight, plan.kind), plan.kind, plan.width))

    def forward(self, ids: Tensor) -> Tensor:
        if self.crossed:
            rows = hashed_crosses(ids, self.columns, self.members, self.salts, self.rows)
        else:
            rows = ids.index_select(1, self.columns) + self.shift
        if self.kind in ("fp32", "bf16"):
            return functional.embedding(rows, self.table)
        head, codes = self.head[rows], self.table[rows].float()
        if self.kind == "int4":
            high = (codes / 16).floor()  # ONNX has no shifts of bytes
            codes = torch.stack([codes - 16 * high, high], -1).flatten(-2)[..., : self.width]
        return head[..., 1:] + codes * head[..., :1]


class _Served(nn.Module):
    """One task's probabilities ``(B, 1)``, calibrated and corrected for sampled negatives."""

    knots: Tensor
    widths: Tensor
    steps: Tensor

    def __init__(self, calibrator: Platt | Isotonic | None, rate: float) -> None:
        super().__init__()
        self.calibrator = calibrator
        self.rate = rate
        if isinstance(calibrator, Isotonic):
            knots, values = torch.from_numpy(calibrator.scores), torch.from_numpy(calibrator.values)
            self.first = float(values[0])
            self.register_buffer("knots", knots[:-1].clone())
            self.register_buffer("widths", knots.diff())
            self.register_buffer("steps", values.diff())

    def forward(self, scores: Tensor) -> Tensor:
        if isinstance(self.calibrator, Platt):
            inside = scores.double().clamp(_EDGE, 1 - _EDGE)
            logits = torch.log(inside) - torch.log1p(-inside)
            scores = torch.sigmoid(self.calibrator.slope * logits + self.calibrator.intercept).float()
        elif self.calibrator is not None:
            # Linear between the knots and constant beyond: a sum of ramps, one from each knot to the next.
            ramps = ((scores.double() - self.knots) / self.widths).clamp(0.0, 1.0)
            scores = (self.first + (ramps * self.steps).sum(dim=1, keepdim=True)).float()
        return scores if self.rate == 1.0 else scores / (scores + (1.0 - scores) / self.rate)
