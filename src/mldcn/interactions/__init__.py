"""Feature-interaction architectures: ``x0 (B, d) -> (B, d')``, each a drop-in for every other."""

from mldcn.interactions.afn import AFN
from mldcn.interactions.autoint import AutoInt
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
from mldcn.interactions.cin import XDeepFM
from mldcn.interactions.cross import DCNV2, DCNMix, DCNV2LowRank
from mldcn.interactions.dcn import DCN
from mldcn.interactions.dcnv3 import DCNV3
from mldcn.interactions.deepfm import NFM, DeepFM, WideDeep
from mldcn.interactions.deeplight import DeepFwFM
from mldcn.interactions.dhen import DHEN
from mldcn.interactions.dnn import DNN, MLP
from mldcn.interactions.edcn import EDCN
from mldcn.interactions.fibinet import FiBiNET
from mldcn.interactions.finalmlp import FinalMLP
from mldcn.interactions.fm import FM, LR, FwFM
from mldcn.interactions.gdcn import GDCN
from mldcn.interactions.hcnet import HCNet
from mldcn.interactions.hiformer import Hiformer
from mldcn.interactions.homefeed import Homefeed
from mldcn.interactions.masknet import MaskNet, ParallelMaskNet, SerialMaskNet
from mldcn.interactions.mldcn import MLDCN
from mldcn.interactions.moe import MMoE, MoE
from mldcn.interactions.parallel import ParallelDCNV2
from mldcn.interactions.products import DLRM, PNN, PNN2016
from mldcn.interactions.rankmixer import RankMixer, RankMixerMoE
from mldcn.interactions.transformer import Transformer
from mldcn.interactions.wukong import Wukong

__all__ = [
    "AFN",
    "DCN",
    "DCNV2",
    "DCNV3",
    "DHEN",
    "DLRM",
    "DNN",
    "EDCN",
    "FM",
    "GDCN",
    "LR",
    "MLDCN",
    "MLP",
    "NFM",
    "PNN",
    "PNN2016",
    "AutoInt",
    "DCNMix",
    "DCNV2LowRank",
    "DeepFM",
    "DeepFwFM",
    "FiBiNET",
    "FinalMLP",
    "FwFM",
    "HCNet",
    "Hiformer",
    "Homefeed",
    "Info",
    "Interaction",
    "MMoE",
    "MaskNet",
    "MoE",
    "ParallelDCNV2",
    "ParallelMaskNet",
    "RankMixer",
    "RankMixerMoE",
    "Regularised",
    "SerialMaskNet",
    "Transformer",
    "WideDeep",
    "Wukong",
    "XDeepFM",
    "auxiliary_loss",
    "build",
    "config_of",
    "info",
    "names",
    "parse",
    "register",
]
