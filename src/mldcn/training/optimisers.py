"""Which optimiser moves which parameters."""

from __future__ import annotations

import torch

from mldcn.config import OptimiserConfig
from mldcn.model import Ranker
from mldcn.training.table_optim import LazyAdam, RowWiseAdagrad


def build_optimisers(config: OptimiserConfig, model: Ranker) -> list[torch.optim.Optimizer]:
    """The dense parameters' optimiser, and the tables' whose steps touch only the batch's rows."""
    tables = list(model.tables().values())
    known = {id(table) for table in tables}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in known]
    kind = torch.optim.AdamW if config.dense == "adamw" else torch.optim.Adam
    built: list[torch.optim.Optimizer] = [
        kind(dense, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    ]
    if tables:
        table_lr = config.table_lr if config.table_lr is not None else config.lr
        table_kind = LazyAdam if config.table == "lazy_adam" else RowWiseAdagrad
        built.append(table_kind(tables, lr=table_lr, l2=config.table_l2))
    return built
