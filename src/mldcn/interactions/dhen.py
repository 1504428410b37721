"""DHEN: layers that are ensembles of architectures, over tokens of one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from mldcn.interactions.base import Count, Interaction, register
from mldcn.interactions.nested import Spec, build_nested, turned
from mldcn.interactions.tokens import FieldTokens
from mldcn.layout import FieldLayout, Side, as_layout

Ensemble = Literal["sum", "weighted", "concat"]
Layers = Annotated[
    tuple[Annotated[tuple[Spec, ...], pydantic.Field(min_length=1)], ...],
    pydantic.Field(min_length=1, validate_default=True),
]


class EnsembleLayer(nn.Module):
    """``X_{n+1} = LN(ensemble_i(f_i(X_n)) + shortcut(X_n))`` on m tokens of width e.

    Every module reads the tokens side by side and gives l tokens; an output of another width than ``l e`` is
    mapped there linearly. The shortcut is the identity, or a linear map over tokens where their number
    changes. The LayerNorm is over each token; tokens of one number are left as they are. Xavier-normal maps
    without biases. With an output of width h: ``h l e`` parameters and ``2 h l e`` FLOPs a map; ``m m'`` and
    ``2 m m' e`` the shortcut.

    Args:
        layout: the m tokens as fields, each e wide.
        specs: the modules.
        num_tokens: l.
        ensemble: ``sum``, ``weighted`` (a learned weight a module, 1 at the start) or ``concat``, which makes
            ``m' = l`` times the number of modules tokens.
    """

    def __init__(
        self,
        layout: FieldLayout,
        specs: Sequence[str | dict[str, Any]],
        num_tokens: int,
        ensemble: Ensemble,
    ) -> None:
        super().__init__()
        width = layout.widths[0]
        self.before = len(layout)
        self.ensemble, self.shape = ensemble, (num_tokens, width)
        self.num_tokens = num_tokens * len(specs) if ensemble == "concat" else num_tokens
        parts = [build_nested(spec, layout) for spec in specs]
        self.sides = tuple(dict.fromkeys(side for part in parts for side in part.sides))
        self.reads = [[self.sides.index(side) for side in part.sides] for part in parts]
        self.parts = nn.ModuleList(parts)
        self.maps = nn.ModuleDict()
        for i, part in enumerate(parts):
            if part.out_features != num_tokens * width:
                self.maps[str(i)] = _linear(part.out_features, num_tokens * width)
        self.weights = nn.Parameter(torch.ones(len(parts))) if ensemble == "weighted" else None
        self.shortcut = _linear(self.before, self.num_tokens) if self.before != self.num_tokens else None
        self.norm = nn.LayerNorm(width) if width > 1 else nn.Identity()

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        """``(B, m e)`` and the modules' side inputs to ``(B, m' e)``."""
        found = []
        for i, (part, reads) in enumerate(zip(self.parts, self.reads, strict=True)):
            out = part(x, *(sides[at] for at in reads))
            if str(i) in self.maps:
                out = self.maps[str(i)](out)
            if self.weights is not None:
                out = self.weights[i] * out
            found.append(out.reshape(-1, *self.shape))
        whole = torch.cat(found, dim=1) if self.ensemble == "concat" else sum(found[1:], found[0])
        tokens = x.reshape(-1, self.before, self.shape[1])
        if self.shortcut is not None:
            tokens = self.shortcut(tokens.transpose(1, 2)).transpose(1, 2)
        normed: Tensor = self.norm(whole + tokens)
        return normed.flatten(1)

    def flops(self) -> int:
        """Those of the modules and maps, and of the shortcut, one product a column of the tokens."""
        flops: int = sum(part.flops() for part in self.parts)  # type: ignore[operator]
        flops += 2 * sum(weight.numel() for weight in self.maps.parameters())
        return flops + (2 * self.shape[1] * self.shortcut.weight.numel() if self.shortcut is not None else 0)


@register(
    "dhen",
    title="DHEN",
    paper="Zhang et al., DHEN: A Deep and Hierarchical Ensemble Network for Large-Scale CTR Prediction",
    year=2022,
    order="none (LayerNorm; without it the product of its layers' highest)",
    cost="Σ layers (Σ modules (F + 2hle) + 2mm'e)",
    knob="token_width",
    secondary="width",
)
class DHEN(Interaction):
    """Deep & Hierarchical Ensemble Network: ``X_{n+1} = LN(ensemble_i(f_i(X_n)) + shortcut(X_n))``.

    The modules of a layer may be any architectures, as in the lists of lists of the Homefeed paper's Table 2.
    They read the fields as m tokens of width e. Modules that read more than ``x0`` (first-order terms,
    crossed ids) can stand in the first layer; those that read a second embedding only where the tokens are
    the fields themselves. With F the FLOPs of a module and h the width of its output, a layer takes
    ``sum(F + 2 h l e) + 2 m m' e`` (no ``2 h l e`` where ``h = l e``, no ``2 m m' e`` where ``m = m'``);
    there are ``2e`` parameters in each LayerNorm, ``h l e`` in each map, ``m m'`` in each shortcut.

    Args:
        features: the layout of ``x0``; a plain width is one token.
        layers: from the first on, each a list of modules: an architecture's name, or a mapping of its name
            and options.
        ensemble: ``sum`` of the modules' outputs, ``weighted`` sum with learned weights, or ``concat`` of
            their tokens.
        width: for the option that is each module's own width knob (of a DNN's layers, a mask block's output, a
            projection before full-rank cross layers), in place of the values in ``layers``.
        num_tokens: l, that each module gives; as many as there are fields by default.
        token_width: e, to which all fields are projected; by default the commonest width, to which only
            fields of other widths are.

    Raises:
        ValueError: a module's options do not fit, it has no width knob to turn, or it reads more than ``x0``
            where that is not to be had.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DHEN
        >>> from mldcn.layout import FieldLayout
        >>> layers = [["dnn", {"name": "dcnv2", "num_layers": 1}, "masknet_parallel"], ["dcnv2"]]
        >>> DHEN(FieldLayout.uniform(4, 8), layers=layers)(torch.randn(2, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        layers: Layers = (("dnn", "dcnv2", "masknet_parallel"), ("dcnv2",)),
        ensemble: Ensemble = "sum",
        width: Count | None = None,
        num_tokens: Count | None = None,
        token_width: Count | None = None,
    ) -> None:
        layout = as_layout(features)
        tokens = FieldTokens(layout, token_width)
        first = FieldLayout.build([(field.name, field.kind, field.source, tokens.width) for field in layout])
        fields = first
        built: list[EnsembleLayer] = []
        for i, specs in enumerate(layers):
            try:
                modules = specs if width is None else [turned(spec, width) for spec in specs]
                built.append(EnsembleLayer(fields, modules, num_tokens or len(layout), ensemble))
            except ValueError as error:
                raise ValueError(f"layers.{i}: {error}") from None
            fields = FieldLayout.uniform(built[-1].num_tokens, tokens.width)
        super().__init__(layout.width, fields.width)
        self.sides = _sides(built, layout, first)
        self.tokens = tokens
        self.layers = nn.ModuleList(built)

    def forward(self, x0: Tensor, *sides: Tensor) -> Tensor:
        """``(B, d)`` and the first layer's side inputs to ``(B, m' e)``, the last layer's tokens."""
        x: Tensor = self.tokens(x0).flatten(1)
        for i, layer in enumerate(self.layers):
            x = layer(x, *(sides if i == 0 else ()))
        return x

    def flops(self) -> int:
        """The projections' ``2 w e`` and the layers' FLOPs."""
        layers: int = sum(layer.flops() for layer in self.layers)  # type: ignore[operator]
        return self.tokens.flops() + layers


def _linear(before: int, after: int) -> nn.Linear:
    linear = nn.Linear(before, after, bias=False)
    nn.init.xavier_normal_(linear.weight)
    return linear


def _sides(layers: Sequence[EnsembleLayer], layout: FieldLayout, first: FieldLayout) -> tuple[Side, ...]:
    """What the first layer's modules read beside ``x0``, whose tokens are the fields of ``first``.

    Raises:
        ValueError: a later layer's module reads more, or the first's one as wide as ``x0`` and not as the
            tokens.
    """
    for i, layer in enumerate(layers):
        for side in layer.sides:
            kind = type(side).__name__
            if i > 0:
                raise ValueError(
                    f"layers.{i}: a module reads {kind} of x0's fields; put it into the first layer"
                )
            if side.width(layout) != side.width(first):
                raise ValueError(
                    f"layers.0: a module reads {kind}, as wide as x0, and its tokens are projected; "
                    "give all fields one width and leave token_width out"
                )
    return layers[0].sides
