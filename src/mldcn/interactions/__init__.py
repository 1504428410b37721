"""Feature-interaction architectures: ``x0 (B, d) -> (B, d')``, each a drop-in for every other."""

from mldcn.interactions.base import (
    Info,
    Interaction,
    Regularised,
    auxiliary_loss,
    build,
    config_of,
    info,
    names,
    parse,
    register,
)
from mldcn.interactions.cross import DCNV2, DCNMix, DCNV2LowRank
from mldcn.interactions.dnn import DNN, MLP
from mldcn.interactions.homefeed import Homefeed
from mldcn.interactions.masknet import MaskNet, ParallelMaskNet, SerialMaskNet
from mldcn.interactions.mldcn import MLDCN

__all__ = [
    "DCNV2",
    "DNN",
    "MLDCN",
    "MLP",
    "DCNMix",
    "DCNV2LowRank",
    "Homefeed",
    "Info",
    "Interaction",
    "MaskNet",
    "ParallelMaskNet",
    "Regularised",
    "SerialMaskNet",
    "auxiliary_loss",
    "build",
    "config_of",
    "info",
    "names",
    "parse",
    "register",
]
