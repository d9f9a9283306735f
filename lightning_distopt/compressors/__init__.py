"""Tensor to bytes and back: one scheme a file, pure (no communication, no Lightning)."""

from lightning_distopt.compressors.base import Compressor, Payload
from lightning_distopt.compressors.dense import Dense
from lightning_distopt.compressors.random_block import RandomBlock
from lightning_distopt.compressors.scaled_sign import ScaledSign
from lightning_distopt.compressors.text import parse
from lightning_distopt.compressors.topk import TopK

__all__ = ["Compressor", "Dense", "Payload", "RandomBlock", "ScaledSign", "TopK", "parse"]
