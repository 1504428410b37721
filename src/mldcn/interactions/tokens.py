"""From the flat ``x0 (B, d)`` to one token a field, ``(B, F, e)``."""

from __future__ import annotations

import math
from collections import Counter
from itertools import groupby

import torch
from torch import Tensor, nn

from mldcn.layout import FieldLayout


def common_width(layout: FieldLayout) -> int:
    """The width that most fields have; the larger one where two are equally common."""
    counts = Counter(layout.widths)
    return max(counts, key=lambda width: (counts[width], width))


class FieldTokens(nn.Module):
    """Fields as tokens of one width: ``v_f = x_f P_f``, or ``x_f`` itself where it is as wide already.

    A number's token is ``x v``, as in a factorisation machine: there is no bias. Xavier-normal ``P_f``, by
    the fans of one field's matrix. With w the width of a projected field: ``sum(w e)`` parameters,
    ``sum(2 w e)`` FLOPs.

    Args:
        layout: the F fields of ``x0``.
        width: e. Every field is then projected, whatever its width. By default e is the commonest width of
            the fields, and only fields of other widths are projected.
    """

    def __init__(self, layout: FieldLayout, width: int | None = None) -> None:
        super().__init__()
        self.num_tokens = len(layout)
        self.width = width or common_width(layout)
        # Neighbours of one width are projected by one batched product.
        self.runs = [(each, len(list(run))) for each, run in groupby(layout.widths)]
        self.projections = nn.ParameterDict()
        for i, (each, count) in enumerate(self.runs):
            if width is not None or each != self.width:
                matrix = torch.empty(count, each, self.width)
                nn.init.normal_(matrix, std=math.sqrt(2 / (each + self.width)))
                self.projections[str(i)] = nn.Parameter(matrix)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, F, e)``."""
        parts = torch.split(x0, [width * count for width, count in self.runs], dim=1)
        found = []
        for i, (part, (width, count)) in enumerate(zip(parts, self.runs, strict=True)):
            tokens = part.reshape(-1, count, width)
            if str(i) in self.projections:
                tokens = torch.bmm(tokens.transpose(0, 1), self.projections[str(i)]).transpose(0, 1)
            found.append(tokens)
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

    def flops(self) -> int:
        """``sum(2 w e)`` over the projected fields."""
        projected: int = sum(projection.numel() for projection in self.projections.values())
        return 2 * projected
