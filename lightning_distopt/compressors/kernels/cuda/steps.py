"""From a replica's local step to its displacement, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_distopt.compressors.kernels.cuda.common import TILE, launch

__all__ = ["displace_"]


def displace_(param: Tensor, anchor: Tensor, residual: Tensor, kept: float) -> None:
    """``residual = (anchor - param) + kept * residual;  param = anchor``; with ``kept`` 0 the old residual is not read."""
    programs = triton.cdiv(param.numel(), TILE)
    launch(_displace, programs, param, param.numel(), anchor, residual, kept, add=kept != 0.0, width=TILE)


@triton.jit
def _displace(param, numel, anchor, residual, kept, add: tl.constexpr, width: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    valid = places < numel
    x = tl.load(anchor + places, valid)
    moved = x - tl.load(param + places, valid)
    if add:
        moved += kept * tl.load(residual + places, valid)
    tl.store(residual + places, moved, valid)
    tl.store(param + places, x, valid)
