"""Feature-interaction architectures: ``x0 (B, d) -> (B, d')``, each a drop-in for every other."""

from mldcn.interactions.base import Info, Interaction, build, config_of, info, names, parse, register
from mldcn.interactions.dnn import DNN, MLP
from mldcn.interactions.mldcn import MLDCN

__all__ = [
    "DNN",
    "MLDCN",
    "MLP",
    "Info",
    "Interaction",
    "build",
    "config_of",
    "info",
    "names",
    "parse",
    "register",
]
