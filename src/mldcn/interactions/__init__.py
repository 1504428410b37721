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
from mldcn.interactions.dcn import DCN
from mldcn.interactions.dcnv3 import DCNV3
from mldcn.interactions.dnn import DNN, MLP
from mldcn.interactions.edcn import EDCN
from mldcn.interactions.gdcn import GDCN
from mldcn.interactions.homefeed import Homefeed
from mldcn.interactions.masknet import MaskNet, ParallelMaskNet, SerialMaskNet
from mldcn.interactions.mldcn import MLDCN
from mldcn.interactions.parallel import ParallelDCNV2

__all__ = [
    "ParallelDCNV2",
    "GDCN",
    "EDCN",
    "DCNV3",
    "DCN",
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
