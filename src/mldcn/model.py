"""``Ranker``: embedding, then interaction, deep part and heads (``Scorer``), built from a config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mldcn import interactions
from mldcn.config import ModelConfig
from mldcn.data.batch import EncodedLayout
from mldcn.embedding import Embedder
from mldcn.errors import UserError
from mldcn.files import atomic
from mldcn.heads import TaskHeads
from mldcn.interactions.dnn import MLP
from mldcn.layout import FieldLayout
from mldcn.schema import Schema

# The position that serving pretends: the top of the page.
SERVING_POSITION = 1
# Numbers of x0 that a CPU works on at a time. Tensors of this size stay in its cache and in memory that the
# process holds already; those of a whole batch would be new pages, cleared by the system, at every operation.
PART_NUMBERS = 1 << 20


class Scorer(nn.Module):
    """``logits = heads(deep(interaction(x0)))``: all of a model but its embeddings.

    With ``deep.structure: stacked`` the MLP reads the interaction's output; with ``parallel`` it reads ``x0``
    and the heads read both outputs side by side (DCN V2, Figure 1).

    Args:
        config: the ``model`` part of a config.
        layout: the fields of ``x0 (B, d)``.
        tasks: names of the T tasks.

    Raises:
        UserError: the interaction's name or options are not known or do not fit ``x0``.
    """

    def __init__(self, config: ModelConfig, layout: FieldLayout, tasks: Sequence[str]) -> None:
        super().__init__()
        self.interaction = interactions.build(config.interaction, layout)
        self.parallel = config.deep.structure == "parallel"
        crossed = self.interaction.out_features
        self.deep = MLP(
            layout.width if self.parallel else crossed,
            config.deep.hidden,
            dropout=config.deep.dropout,
            batch_norm=config.deep.batch_norm,
        )
        shared = self.deep.out_features + (crossed if self.parallel else 0)
        self.heads = TaskHeads(shared, tasks, config.heads.hidden)

    def forward(self, x0: Tensor) -> Tensor:
        """``(B, d) -> (B, T)``."""
        crossed = self.interaction(x0)
        shared = torch.cat([crossed, self.deep(x0)], dim=1) if self.parallel else self.deep(crossed)
        logits: Tensor = self.heads(shared)
        return logits

    def flops(self) -> dict[str, int]:
        """GEMM FLOPs per example by part: 2 x the multiply-adds of every matrix product."""
        return {
            "interaction": self.interaction.flops(),
            "deep": self.deep.flops(),
            "heads": self.heads.flops(),
        }


class Ranker(nn.Module):
    """A multi-task ranking model: ``logits = scorer(embedder(row)) + position bias``.

    Args:
        config: the ``model`` part of a config.
        schema: the log's schema.
        layout: what the columns of its encoded rows are.

    Raises:
        UserError: the interaction's name or options are not known, or a table is named that is not there.
    """

    def __init__(self, config: ModelConfig, schema: Schema, layout: EncodedLayout) -> None:
        super().__init__()
        self.tasks = layout.tasks
        self.embedder = Embedder(layout, schema, config.embedding)
        self.scorer = Scorer(config, self.embedder.layout, layout.tasks)
        self.position_bias: nn.Embedding | None = None
        if layout.num_positions:
            self.position_bias = nn.Embedding(layout.num_positions + 1, len(layout.tasks))
            nn.init.zeros_(self.position_bias.weight)

    def forward(self, ids: Tensor, dense: Tensor, position: Tensor | None = None) -> Tensor:
        """Logits ``(B, T)`` of the log's own distribution.

        Args:
            ids: ``(B, C)`` table rows.
            dense: ``(B, D)``.
            position: ``(B,)`` logged positions, 0 where unknown; the serving position when not given.
        """
        return self.logits(self.embedder(ids, dense), position)

    def logits(self, x0: Tensor, position: Tensor | None = None) -> Tensor:
        """Logits ``(B, T)`` from what the embedder made, ``x0 (B, d)``."""
        logits: Tensor = self.scorer(x0)
        return logits if self.position_bias is None else logits + self.position_logit(position)

    @torch.inference_mode()
    def relevance(self, ids: Tensor, dense: Tensor) -> Tensor:
        """Logits ``(B, T)`` before the position's term, without gradients, part by part."""
        found = [
            self.scorer(self.embedder(ids[part], dense[part])) for part in self.parts(len(ids), ids.device)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def parts(self, rows: int, device: torch.device) -> list[slice]:
        """Slices of a batch that are best computed one after another: all of it but on a CPU."""
        size = rows
        if device.type == "cpu":
            # A power of two, so that a compiled model sees few shapes.
            size = 1 << max(PART_NUMBERS // self.embedder.layout.width, 1).bit_length() - 1
        return [slice(start, start + size) for start in range(0, rows, size)] or [slice(0, 0)]

    def position_logit(self, position: Tensor | None) -> Tensor:
        """The additive position term, ``(B, T)``, or ``(T,)`` for the serving position."""
        assert self.position_bias is not None
        if position is None:
            return self.position_bias.weight[SERVING_POSITION]
        bias: Tensor = self.position_bias(position)
        return bias

    def flops(self) -> dict[str, int]:
        """GEMM FLOPs per example by part; look-ups and element-wise work are not counted."""
        return {"embedding": self.embedder.flops(), **self.scorer.flops()}

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters in tables and elsewhere."""
        tables = {id(table) for table in self.embedder.tables().values()}
        counts = {"embedding": 0, "dense": 0}
        for parameter in self.parameters():
            counts["embedding" if id(parameter) in tables else "dense"] += parameter.numel()
        return counts


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's parameters and buffers as safetensors, atomically."""
    save_tensors(model.state_dict(), path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads what :func:`save_weights` wrote.

    Raises:
        UserError: the file is missing or damaged, or belongs to another model.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); train the run again or restore the file"
        ) from None
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit the run's config: {error}") from None


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes named tensors as safetensors, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(plain, temporary)


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        UserError: the device is not known or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"training.device: no device {name!r}; use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"training.device: {name!r} asked for, but PyTorch sees no GPU; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"training.device: {name!r} asked for, but there are {count}, from cuda:0 on")
    return device
