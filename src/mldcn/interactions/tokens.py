"""From the flat ``x0 (B, d)`` to one token a field, ``(B, F, e)``, and to fields of other widths."""

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


class ResizedFields(nn.Module):
    """Fields mapped one by one to p columns in all: ``x_f P_f``, where widths differ by one at most.

    For architectures of fields that need no equal widths: p turns in finer steps than a width of all tokens.
    No bias; Xavier-normal ``P_f``, by the fans of one field's matrix. With w and e the widths of a field
    before and after: ``sum(w e)`` parameters, ``sum(2 w e)`` FLOPs.

    Args:
        layout: the F fields of ``x0``.
        width: p. The first ``p mod F`` fields are one column wider than the others.

    Raises:
        ValueError: there are fewer columns than fields.
    """

    def __init__(self, layout: FieldLayout, width: int) -> None:
        super().__init__()
        least, wider = divmod(width, len(layout))
        if least == 0:
            raise ValueError(f"projection {width} is below the number of fields, {len(layout)}")
        sizes = [least + (i < wider) for i in range(len(layout))]
        self.layout = FieldLayout.build(
            [(field.name, field.kind, field.source, size) for field, size in zip(layout, sizes, strict=True)]
        )
        # Neighbours of one shape are projected by one batched product.
        shapes = zip(layout.widths, sizes, strict=True)
        self.runs = [(before, after, len(list(run))) for (before, after), run in groupby(shapes)]
        self.projections = nn.ParameterList(
            torch.empty(count, before, after).normal_(std=math.sqrt(2 / (before + after)))
            for before, after, count in self.runs
        )

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, p)``."""
        parts = torch.split(x0, [before * count for before, _, count in self.runs], dim=1)
        found = []
        for part, projection, (before, _, count) in zip(parts, self.projections, self.runs, strict=True):
            tokens = part.reshape(-1, count, before).transpose(0, 1)
            found.append(torch.bmm(tokens, projection).transpose(0, 1).flatten(1))
        return torch.cat(found, dim=1)

    def flops(self) -> int:
        """``sum(2 w e)``."""
        return sum(2 * projection.numel() for projection in self.projections)
