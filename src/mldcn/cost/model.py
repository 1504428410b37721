"""What a whole model costs: work, parameters and memory traffic, part by part, without allocating anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mldcn.config import ModelConfig
from mldcn.cost.flops import REST, Work, meta, per_example
from mldcn.data.batch import EncodedLayout
from mldcn.interactions import Interaction
from mldcn.layout import FieldLayout, as_layout
from mldcn.model import Ranker
from mldcn.schema import Schema


@dataclass(frozen=True)
class ModelCost:
    """What a model costs in serving, by part.

    example: work for each example. call: work for each forward pass, whatever its batch. parameters: those
    outside of tables. table_parameters: those in tables (first-order weights, second embeddings and codebooks
    included). dense_bytes: size of all parameters outside of tables.
    """

    example: dict[str, Work]
    call: dict[str, Work]
    parameters: dict[str, int]
    table_parameters: int
    dense_bytes: int

    def request(self, candidates: int) -> dict[str, Work]:
        """The work of a request, scored in one pass: nothing is shared between its candidates but ``call``."""
        return {part: self.example[part] * candidates + self.call[part] for part in self.example}

    def bytes_read(self, batch: int) -> float:
        """Bytes of weights read for an example: its table rows, and its share of the dense weights.

        Dense weights are read once a batch, so each example has ``1 / batch`` of them; rows are read for each
        look-up, also where two examples have an id in common. Activations are not weights.
        """
        rows = total(self.example).row_bytes
        return rows + (self.dense_bytes + total(self.call).row_bytes) / batch


def total(work: dict[str, Work]) -> Work:
    """The sum over all parts."""
    return sum(work.values(), Work())


def model_cost(config: ModelConfig, schema: Schema, layout: EncodedLayout) -> ModelCost:
    """The cost of a model; nothing is allocated and nothing computed.

    Args:
        config: the model.
        schema: the log's schema.
        layout: what the columns of its encoded rows are, and how many rows each table has.

    Example:
        >>> from mldcn.config import ModelConfig
        >>> from mldcn.cost import log_layout, plain_schema
        >>> schema = plain_schema(fields=26)
        >>> layout, _ = log_layout(schema, rows=1_000_000)
        >>> cost = model_cost(ModelConfig(interaction={"name": "dcnv2"}), schema, layout)
        >>> cost.example["interaction"].gemm, cost.parameters["interaction"], cost.table_parameters
        (1038336, 520416, 416000000)
    """
    with meta():
        model = Ranker(config, schema, layout).eval()

    def run(size: int) -> Tensor:
        ids = torch.zeros(size, layout.num_id_columns, dtype=torch.int32, device="meta")
        dense = torch.zeros(size, layout.num_dense_columns, device="meta")
        logits: Tensor = model(ids, dense)
        return logits

    scorer = model.scorer
    parts: dict[str, list[nn.Module]] = {
        "embedding": [model.embedder, model.sides],
        "interaction": [scorer.interaction],
        "deep": [scorer.deep],
        "heads": [scorer.heads],
    }
    example, call = per_example(run, parts)
    # Outside of all parts there are the position's bias and the sums that the parts meet in.
    for work in (example, call):
        work["heads"] += work.pop(REST)
    tables = {id(table) for table in model.tables().values()}
    parameters = {name: _numbers(modules, tables) for name, modules in parts.items()}
    if model.position_bias is not None:
        parameters["heads"] += model.position_bias.weight.numel()
    dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
    return ModelCost(example, call, parameters, model.parameter_counts()["embedding"], dense_bytes)


def interaction_work(module: Interaction, features: int | FieldLayout) -> tuple[Work, Work]:
    """The work of an interaction alone: per example, and per pass whatever the batch.

    Args:
        module: built on the ``meta`` device.
        features: width of ``x0``, or its layout.
    """
    layout = as_layout(features)
    widths = [layout.width, *(side.width(layout) for side in module.sides)]

    def run(size: int) -> Tensor:
        out: Tensor = module(*(torch.zeros(size, width, device="meta") for width in widths))
        return out

    example, call = per_example(run)
    return example[REST], call[REST]


def _numbers(modules: Sequence[nn.Module], tables: set[int]) -> int:
    every = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in tables}
    return sum(every.values())
