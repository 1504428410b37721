"""``Ranker``: embedding, then interaction, deep part and heads (``Scorer``), built from a config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mldcn import interactions
from mldcn.config import ModelConfig
from mldcn.data.batch import EncodedLayout
from mldcn.embedding import Embedder, SideEmbedder
from mldcn.errors import UserError
from mldcn.files import atomic
from mldcn.heads import TaskHeads
from mldcn.interactions.dnn import MLP
from mldcn.layout import FieldLayout
from mldcn.schema import Schema

# The position that serving pretends: the top of the page.
SERVING_POSITION = 1
# Numbers of x0 and its side inputs that a CPU works on at a time. Tensors of this size stay in its cache and
# in memory that the process holds already; those of a whole batch would be new pages, cleared by the system,
# at every operation.
PART_NUMBERS = 1 << 20


class Scorer(nn.Module):
    """``logits = heads(deep(interaction(x0)))``: all of a model but its embeddings.

    With ``deep.structure: stacked`` the MLP reads the interaction's output; with ``parallel`` it reads ``x0``
    and the heads read both outputs side by side (DCN V2, Figure 1). Of an interaction with one representation
    a task, each task's head reads its own, behind an MLP whose weights the tasks share.

    Args:
        config: the ``model`` part of a config.
        layout: the fields of ``x0 (B, d)``.
        tasks: names of the T tasks.

    Raises:
        UserError: the interaction's name or options are not known or do not fit ``x0``.
    """

    def __init__(self, config: ModelConfig, layout: FieldLayout, tasks: Sequence[str]) -> None:
        super().__init__()
        self.interaction = interactions.build(config.interaction, layout, num_tasks=len(tasks))
        self.inputs = [layout.width, *(side.width(layout) for side in self.interaction.sides)]
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
        """``(B, d) -> (B, T)``; the interaction's side inputs stand behind ``x0``'s own columns."""
        x0, crossed = self._crossed(x0)
        return self._logits(x0, crossed)

    def with_streams(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, T)``, and those of each stream alone, ``(S, B, T)``.

        With linear heads the whole's logit is the mean of the streams', as in DCNv3.
        """
        x0, crossed = self._crossed(x0)
        count = len(self.interaction.streams)
        alone = []
        for stream in self.interaction.streams:
            only = torch.zeros_like(crossed)
            only[..., stream] = count * crossed[..., stream]
            alone.append(self._logits(x0, only))
        return self._logits(x0, crossed), torch.stack(alone)

    def whole_batches(self) -> bool:
        """Whether a part looks at the whole batch in training, which must then not be cut."""
        kinds = (_BatchNorm, interactions.Regularised)
        return bool(self.interaction.streams) or any(isinstance(module, kinds) for module in self.modules())

    def flops(self) -> dict[str, int]:
        """GEMM FLOPs per example by part: 2 x the multiply-adds of every matrix product."""
        repeats = 1 if self.parallel else self.interaction.num_tasks or 1
        return {
            "interaction": self.interaction.flops(),
            "deep": repeats * self.deep.flops(),
            "heads": self.heads.flops(),
        }

    def _crossed(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """``x0`` without side inputs, and the interaction's result."""
        if len(self.inputs) == 1:
            return x0, self.interaction(x0)
        x0, *sides = torch.split(x0, self.inputs, dim=1)
        return x0, self.interaction(x0, *sides)

    def _logits(self, x0: Tensor, crossed: Tensor) -> Tensor:
        if self.parallel:
            deep = self.deep(x0)
            if crossed.dim() == 3:
                deep = deep.unsqueeze(1).expand(-1, crossed.shape[1], -1)
            shared = torch.cat([crossed, deep], dim=-1)
        else:
            # BatchNorm takes rows only.
            shared = self.deep(crossed.flatten(0, -2)).unflatten(0, crossed.shape[:-1])
        logits: Tensor = self.heads(shared)
        return logits


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
        sides = self.scorer.interaction.sides
        self.sides = SideEmbedder(sides, layout, schema, config.embedding, self.embedder.layout)
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
        return self.logits(self.embed(ids, dense), position)

    def embed(self, ids: Tensor, dense: Tensor) -> Tensor:
        """``x0 (B, d)``, and behind its columns those of the side inputs that the interaction asks for."""
        x0: Tensor = self.embedder(ids, dense)
        return torch.cat([x0, *self.sides(ids, dense)], dim=1) if self.sides.widths else x0

    def logits(self, x0: Tensor, position: Tensor | None = None) -> Tensor:
        """Logits ``(B, T)`` from what :meth:`embed` made."""
        logits: Tensor = self.scorer(x0)
        return logits if self.position_bias is None else logits + self.position_logit(position)

    def stream_logits(self, x0: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``(B, T)``, and those of the interaction's streams alone, ``(S, B, T)``."""
        logits, streams = self.scorer.with_streams(x0)
        if self.position_bias is None:
            return logits, streams
        bias = self.position_logit(position)
        return logits + bias, streams + bias

    @torch.inference_mode()
    def relevance(self, ids: Tensor, dense: Tensor) -> Tensor:
        """Logits ``(B, T)`` before the position's term, without gradients, part by part."""
        found = [self.scorer(self.embed(ids[part], dense[part])) for part in self.parts(len(ids), ids.device)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def parts(self, rows: int, device: torch.device) -> list[slice]:
        """Slices of a batch that are best computed one after another: all of it but on a CPU."""
        size = rows
        if device.type == "cpu":
            # A power of two, so that a compiled model sees few shapes.
            size = 1 << max(PART_NUMBERS // sum(self.scorer.inputs), 1).bit_length() - 1
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
        return {"embedding": self.embedder.flops() + self.sides.flops(), **self.scorer.flops()}

    def tables(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are sparse in their rows, by their names."""
        return {f"embedder.{name}": table for name, table in self.embedder.tables().items()} | {
            f"sides.{name}": table for name, table in self.sides.tables().items()
        }

    def spans(self) -> dict[str, dict[str, slice]]:
        """Parameter, as :meth:`tables` names it -> table -> its rows there."""
        return {f"embedder.{name}": spans for name, spans in self.embedder.spans().items()} | {
            f"sides.{name}": spans for name, spans in self.sides.spans().items()
        }

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters in tables and elsewhere."""
        tables = {id(table) for table in self.tables().values()}
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
