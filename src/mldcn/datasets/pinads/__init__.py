"""``pinads``: a synthetic log of ad impressions whose true probabilities are known."""

from mldcn.datasets.pinads.bayes import BayesMeter, bayes
from mldcn.datasets.pinads.files import write_days, write_log
from mldcn.datasets.pinads.log import (
    Columns,
    History,
    Impressions,
    batches,
    label_matrix,
    simulate,
)
from mldcn.datasets.pinads.shipped import pinads_config
from mldcn.datasets.pinads.truth import World
from mldcn.datasets.pinads.world import TASKS, Contexts, PinadsConfig

__all__ = [
    "TASKS",
    "BayesMeter",
    "Columns",
    "Contexts",
    "History",
    "Impressions",
    "PinadsConfig",
    "World",
    "batches",
    "bayes",
    "label_matrix",
    "pinads_config",
    "simulate",
    "write_days",
    "write_log",
]
