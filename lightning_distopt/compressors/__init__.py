"""Tensor to bytes and back: one scheme a file, pure (no communication, no Lightning)."""

from lightning_distopt.compressors.base import Compressor, Payload
from lightning_distopt.compressors.bin_grad_b import BinGradB
from lightning_distopt.compressors.bin_grad_pb import BinGradPB
from lightning_distopt.compressors.dense import Dense
from lightning_distopt.compressors.linear import LinearQuantizer
from lightning_distopt.compressors.one_bit import OneBit
from lightning_distopt.compressors.orq import ORQ
from lightning_distopt.compressors.qsgd import QSGD
from lightning_distopt.compressors.random_block import RandomBlock
from lightning_distopt.compressors.scaled_sign import ScaledSign
from lightning_distopt.compressors.specifications import PowerSGD, SignSGD, Specification
from lightning_distopt.compressors.terngrad import TernGrad
from lightning_distopt.compressors.text import parse
from lightning_distopt.compressors.topk import TopK

__all__ = [
    "ORQ",
    "QSGD",
    "BinGradB",
    "BinGradPB",
    "Compressor",
    "Dense",
    "LinearQuantizer",
    "OneBit",
    "Payload",
    "PowerSGD",
    "RandomBlock",
    "ScaledSign",
    "SignSGD",
    "Specification",
    "TernGrad",
    "TopK",
    "parse",
]
