"""Signs, packed, and the mean magnitude."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, float64, njit, uint64
from torch import Tensor

from lightning_distopt.compressors.kernels.cpu.common import BLOCK, GATHER, PLAIN, SUMS

__all__ = ["absolute_sum", "add_signs_", "encode_signs"]


def absolute_sum(flat: Tensor) -> Tensor:
    """Return the sum of magnitudes, float64, 0-d."""
    total = _absolute_sum(flat.numpy())
    if np.isinf(total):  # a block's sum may overflow where no value does
        total = torch.linalg.vector_norm(flat, 1, dtype=torch.float64).item()
    return torch.tensor(total, dtype=torch.float64)


def encode_signs(flat: Tensor, scale: Tensor, residual: bool) -> Tensor:
    """Return the packed signs of ``flat``; with ``residual``, leave ``v - scale * sgn(v)`` in it."""
    bits = torch.empty((flat.numel() + 7) // 8, dtype=torch.uint8)
    _encode_signs(flat.numpy(), np.float32(scale.item()), bits.numpy(), residual)
    return bits


def add_signs_(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """Add ``scale`` where the bit is set and ``-scale`` elsewhere."""
    _add_signs(packed.numpy(), np.float32(scale.item()), out.numpy())


@njit(**SUMS)
def _absolute_sum(v):
    total = 0.0
    for start in range(0, v.size, BLOCK):
        part = v[start : start + BLOCK]
        partial = float32(0)
        for i in range(part.size):
            partial += abs(part[i])
        total += float64(partial)
    return total


@njit(**PLAIN)
def _encode_signs(v, scale, bits, residual):
    signs = np.zeros(BLOCK, np.uint8)
    words = signs.view(np.uint64)
    for start in range(0, v.size, BLOCK):
        part = v[start : start + BLOCK]
        for i in range(part.size):
            signs[i] = part[i] >= float32(0)
        if residual:
            for i in range(part.size):
                part[i] = part[i] - scale if part[i] >= float32(0) else part[i] + scale
        for i in range(part.size, (part.size + 7) // 8 * 8):
            signs[i] = 0
        packed = bits[start // 8 : start // 8 + (part.size + 7) // 8]
        for i in range(packed.size):
            packed[i] = (words[i] * GATHER) >> uint64(56)


@njit(**PLAIN)
def _add_signs(bits, scale, out):
    whole = out.size // 8
    for i in range(whole):
        for j in range(8):
            out[8 * i + j] += scale if (bits[i] >> j) & 1 else -scale
    for i in range(8 * whole, out.size):
        out[i] += scale if (bits[i // 8] >> (i % 8)) & 1 else -scale
