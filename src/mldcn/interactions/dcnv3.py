"""DCNv3: an exponential and a linear cross network that mask themselves, and the loss that trains both."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mldcn.interactions.base import Count, DropRate, Interaction, register
from mldcn.interactions.tokens import ResizedFields
from mldcn.layout import FieldLayout, as_layout

PAPER = "Li et al., DCNv3: Towards Next Generation Deep Cross Network for CTR Prediction"
Layers = Annotated[int, pydantic.Field(ge=0)]


class SelfMaskCrossLayer(nn.Module):
    """``x_{l+1} = base * ([h; h * ReLU(LN(h))] + b) + x_l`` with ``h = W x_l`` half as wide as x.

    The base is ``x_l`` itself in the exponential network (ECN) and ``x0`` in the linear one (LCN). The mask
    ``ReLU(LN(h))`` drops what is below the mean, and spares the parameters of the other half. Xavier-normal
    W, zero b. With ``n = ceil(d / 2)``: ``dn + d + 2n`` parameters, ``2dn`` FLOPs a head.

    Args:
        features: width d of one head. Where d is odd, the masked half is one column narrower.
        num_heads: H; they share all weights.
        layer_norm: whether the mask normalises; else it is ``ReLU(h)``.
        batch_norm: of h, one mean and variance a head.
        dropout: on the result.
    """

    def __init__(
        self, features: int, num_heads: int, layer_norm: bool, batch_norm: bool, dropout: float
    ) -> None:
        super().__init__()
        half = (features + 1) // 2
        self.masked = features - half
        self.linear = nn.Linear(features, half, bias=False)
        self.bias = nn.Parameter(torch.zeros(features))
        nn.init.xavier_normal_(self.linear.weight)
        self.batch_norm = nn.BatchNorm1d(num_heads) if batch_norm else nn.Identity()
        self.layer_norm = nn.LayerNorm(half) if layer_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, base: Tensor, x: Tensor) -> Tensor:
        """``base (B, H, d)`` and ``x (B, H, d)`` to ``(B, H, d)``."""
        h = self.batch_norm(self.linear(x))  # (B, H, n)
        masked = h * self.layer_norm(h).relu()
        whole = torch.cat([h, masked[..., : self.masked]], dim=2)  # (B, H, d)
        out: Tensor = self.dropout(base * (whole + self.bias) + x)
        return out


class SplitHeads(nn.Module):
    """Columns of ``x0`` as H heads, each with a part of every field, in the order of the networks' halves.

    A field's columns are cut into H parts and each part into two halves; a head is all first halves, then
    all second halves, so that masked and plain columns meet in every field. A part of odd width gives its
    odd column to the first and to the second half by turns; fields that H does not divide are filled up
    with zeros.

    Args:
        layout: the fields of ``x0``.
        num_heads: H.
    """

    index: Tensor

    def __init__(self, layout: FieldLayout, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.width = num_heads, layout.width
        zero = layout.width  # the index of a column of zeros behind x0
        heads: list[int] = []
        for head in range(num_heads):
            first: list[int] = []
            second: list[int] = []
            for field in layout:
                size = -(-field.width // num_heads)
                taken = range(head * size, (head + 1) * size)
                part = [field.offset + i if i < field.width else zero for i in taken]
                # The half that is behind so far gets the odd column.
                cut = (size + 1) // 2 if len(first) <= len(second) else size // 2
                first += part[:cut]
                second += part[cut:]
            heads += first + second
        self.filled = zero in heads
        self.features = len(heads) // num_heads
        self.register_buffer("index", torch.tensor(heads), persistent=False)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, H, columns of a head)``."""
        (x0,) = torch.split(x0, [self.width], dim=1)  # an x0 of another width is refused
        x0 = F.pad(x0, (0, 1)) if self.filled else x0
        return x0.index_select(1, self.index).view(-1, self.num_heads, self.features)


@register(
    "dcnv3",
    title="DCNv3",
    paper=PAPER,
    year=2024,
    order="2^L",
    cost="2 (L + L') d ⌈d/2⌉",
    knob="projection",
)
@register(
    "sdcnv3",
    title="SDCNv3",
    paper=PAPER,
    year=2024,
    order="2^L",
    cost="2 (L + L') d ⌈d/2⌉",
    knob="projection",
    loss="whole",
)
@register(
    "ecn",
    title="Exponential cross network",
    paper=PAPER,
    year=2024,
    order="2^L",
    cost="2Ld ⌈d/2⌉",
    knob="projection",
    num_shallow_layers=0,
)
@register(
    "lcn",
    title="Linear cross network",
    paper=PAPER,
    year=2024,
    order="L + 1",
    cost="2Ld ⌈d/2⌉",
    knob="projection",
    num_deep_layers=0,
)
class DCNV3(Interaction):
    """Exponential and linear cross networks of :class:`SelfMaskCrossLayer` side by side: ``[x_D; x_S]``.

    Without masks, the exponential network's l layers reach order ``2^l``, the linear network's ``l + 1``.
    A linear head on both gives the paper's logit ``(w_D . x_D + w_S . x_S) / 2`` but for the scale of w.

    The paper's first version called the exponential network DCNv3 and both together SDCNv3, the name the
    Homefeed paper uses; later versions call both DCNv3. Here ``sdcnv3`` trains on the whole's loss alone
    and ``dcnv3`` on Tri-BCE, ``L + w_D L_D + w_S L_S`` with ``w = max(0, L_stream - L)``: a stream that
    predicts worse than the whole is trained on its own too.

    With d the width of a head, ``n = ceil(d / 2)`` and L layers in both networks together:
    ``L (dn + d + 2n)`` parameters, ``2 H L d n`` FLOPs, and those of :class:`ResizedFields`.

    Args:
        features: the layout of ``x0`` (with one head, d columns), or its width.
        num_deep_layers: layers of the exponential network (ECN); 0 leaves it out.
        num_shallow_layers: layers of the linear network (LCN); 0 leaves it out.
        num_heads: H. Every field's columns are divided among the heads, which share all weights; the result
            is their mean, as the paper's logit is.
        loss: ``tri_bce``, or ``whole`` for the loss of the result alone. One network alone has no streams.
        detach_weights: whether Tri-BCE's weights are taken as constants; the authors' code lets gradients
            through them.
        layer_norm: inside the mask.
        batch_norm: before the mask.
        dropout: after every layer.
        projection: columns in all to which the fields are projected first, each by itself; by default fields
            stay as they are.

    Raises:
        ValueError: neither network has a layer.

    Example:
        >>> import torch
        >>> from mldcn.interactions import DCNV3
        >>> from mldcn.layout import FieldLayout
        >>> net = DCNV3(FieldLayout.uniform(8, 16), num_deep_layers=2, num_shallow_layers=2)
        >>> net(torch.randn(4, 128)).shape, net.flops(), net.streams
        (torch.Size([4, 256]), 65536, (slice(0, 128, None), slice(128, 256, None)))
    """

    def __init__(
        self,
        features: int | FieldLayout,
        *,
        num_deep_layers: Layers = 3,
        num_shallow_layers: Layers = 3,
        num_heads: Count = 1,
        loss: Literal["tri_bce", "whole"] = "tri_bce",
        detach_weights: bool = True,
        layer_norm: bool = True,
        batch_norm: bool = False,
        dropout: DropRate = 0.0,
        projection: Count | None = None,
    ) -> None:
        if not num_deep_layers and not num_shallow_layers:
            raise ValueError("num_deep_layers and num_shallow_layers are both 0; one network needs a layer")
        layout = as_layout(features)
        resized = ResizedFields(layout, projection) if projection else None
        fields = resized.layout if resized else layout
        heads = SplitHeads(fields, num_heads)
        width = heads.features
        both = bool(num_deep_layers and num_shallow_layers)
        super().__init__(layout.width, 2 * width if both else width)
        self.projection = resized
        self.heads = heads

        def stack(layers: int) -> nn.ModuleList:
            options = (layer_norm, batch_norm, dropout)
            return nn.ModuleList(SelfMaskCrossLayer(width, num_heads, *options) for _ in range(layers))

        self.deep = stack(num_deep_layers)
        self.shallow = stack(num_shallow_layers)
        if both and loss == "tri_bce":
            self.streams = (slice(0, width), slice(width, 2 * width))
        self.detach_weights = detach_weights

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, 2d)``, or ``(B, d)`` with one network; d / H in place of d with H heads."""
        split = self.heads(x0 if self.projection is None else self.projection(x0))  # (B, H, d)
        found = []
        x = split
        for layer in self.deep:
            x = layer(x, x)
        if self.deep:
            found.append(x)
        x = split
        for layer in self.shallow:
            x = layer(split, x)
        if self.shallow:
            found.append(x)
        return torch.cat(found, dim=2).mean(dim=1)

    def stream_loss(self, loss: Tensor, streams: Tensor) -> Tensor:
        """Tri-BCE ``(T,)`` from the whole's loss ``(T,)`` and the streams' ``(2, T)``."""
        weights = (streams - loss).relu()
        if self.detach_weights:
            weights = weights.detach()
        return loss + (weights * streams).sum(dim=0)

    def flops(self) -> int:
        """``2 H L d n``, and those of the projection of fields."""
        layers = 0
        for module in self.modules():
            if isinstance(module, SelfMaskCrossLayer):
                layers += 2 * self.heads.num_heads * module.linear.weight.numel()
        return layers + (self.projection.flops() if self.projection is not None else 0)
