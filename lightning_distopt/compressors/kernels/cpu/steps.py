"""From a replica's local step to its displacement, in one pass over memory."""

from __future__ import annotations

import numpy as np
from numba import float32, njit
from torch import Tensor

from lightning_distopt.compressors.kernels.cpu.common import FUSED

__all__ = ["displace_"]


def displace_(param: Tensor, anchor: Tensor, residual: Tensor, kept: float) -> None:
    """``residual = (anchor - param) + kept * residual;  param = anchor``; with ``kept`` 0 the old residual is not read."""
    _displace(param.numpy(), anchor.numpy(), residual.numpy(), np.float32(kept))


@njit(**FUSED)
def _displace(param, anchor, residual, kept):
    if kept == float32(0):
        for i in range(param.size):
            x = anchor[i]
            residual[i] = x - param[i]
            param[i] = x
    else:
        for i in range(param.size):
            x = anchor[i]
            residual[i] = (x - param[i]) + kept * residual[i]
            param[i] = x
