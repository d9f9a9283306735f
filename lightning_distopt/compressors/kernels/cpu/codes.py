"""Codes: rounding at random, two means, and decoding by look-up."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, float64, int32, int64, njit, uint8, uint64
from torch import Tensor

from lightning_distopt.compressors.kernels.cpu.common import BLOCK, PLAIN, SUMS

__all__ = ["add_levels_", "encode_binary", "round_randomly"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def round_randomly(flat: Tensor, table: Tensor, size: int, key: int, residual: bool) -> Tensor:
    """Return the code of each value's level, drawn with ``key``; with ``residual``, leave ``v - level`` in ``flat``."""
    codes = torch.empty(flat.numel(), dtype=torch.uint8)
    _round_randomly(flat.numpy(), table.contiguous().numpy(), size, np.uint64(key), codes.numpy(), residual)
    return codes


def encode_binary(flat: Tensor, size: int, residual: bool) -> tuple[Tensor, Tensor]:
    """Return BinGrad-b's levels, shape ``(buckets, 2)``, and codes, with each bucket's mean as threshold."""
    levels = torch.empty(-(-flat.numel() // size), 2, dtype=torch.float32)
    codes = torch.empty(flat.numel(), dtype=torch.uint8)
    _encode_binary(flat.numpy(), size, levels.numpy(), codes.numpy(), residual)
    return levels, codes


def add_levels_(codes: Tensor, table: Tensor, size: int, out: Tensor) -> None:
    """Add to ``out`` the level of its bucket that each code names."""
    table = table.contiguous()
    _add_levels(codes.numpy(), table.numpy(), size, out.numpy())


@njit(inline="always", **PLAIN)
def _uniform(key, i):
    z = key + (uint64(i) + uint64(1)) * _GOLDEN
    z = (z ^ (z >> uint64(30))) * _MIX1
    z = (z ^ (z >> uint64(27))) * _MIX2
    z = z ^ (z >> uint64(31))
    return float32(int32(z >> uint64(40))) * float32(2.0**-24)


@njit(**PLAIN)
def _round_randomly(v, table, size, key, codes, residual):
    half = float32(0.5)  # the whole width of a cell can overflow
    low, high = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for bucket in range(table.shape[0]):
        levels = table[bucket]
        stop = min((bucket + 1) * size, v.size)
        for start in range(bucket * size, stop, BLOCK):
            part = v[start : min(start + BLOCK, stop)]
            code = codes[start : start + part.size]
            for i in range(part.size):
                low[i], high[i], code[i] = levels[0], levels[1], 0
            for k in range(1, levels.size - 1):
                a, c = levels[k], levels[k + 1]
                for i in range(part.size):
                    above = part[i] >= a
                    code[i] += uint8(above)
                    low[i] = a if above else low[i]
                    high[i] = c if above else high[i]
            for i in range(part.size):
                width = high[i] * half - low[i] * half
                up = _uniform(key, start + i) * width < part[i] * half - low[i] * half
                code[i] += uint8(up)
                low[i] = high[i] if up else low[i]
            if residual:
                for i in range(part.size):
                    part[i] -= low[i]


@njit(**SUMS)
def _mean(v):
    total = 0.0
    for x in v:
        total += float64(x)
    return total / v.size


@njit(**SUMS)
def _upper(v, threshold):
    """Number and sum of the values from the threshold on."""
    count, total = 0, 0.0
    for x in v:
        count += int64(x >= threshold)
        total += float64(x) if x >= threshold else 0.0
    return count, total


@njit(**PLAIN)
def _encode_binary(v, size, levels, codes, residual):
    for bucket in range(levels.shape[0]):
        part = v[bucket * size : (bucket + 1) * size]
        code = codes[bucket * size : bucket * size + part.size]
        mean = _mean(part)
        threshold = float32(mean)
        count, total = _upper(part, threshold)
        if count == 0 or count == part.size or not abs(mean) < np.inf:
            low = high = threshold
        else:
            low, high = float32((mean * part.size - total) / (part.size - count)), float32(total / count)
        levels[bucket, 0], levels[bucket, 1] = low, high
        for i in range(part.size):
            code[i] = part[i] >= threshold
        if residual:
            for i in range(part.size):
                part[i] -= high if part[i] >= threshold else low


@njit(**PLAIN)
def _add_levels(codes, table, size, out):
    for bucket in range(table.shape[0]):
        levels = table[bucket]
        part = out[bucket * size : (bucket + 1) * size]
        code = codes[bucket * size : bucket * size + part.size]
        if levels.size == 2:
            low, high = levels[0], levels[1]
            for i in range(part.size):
                part[i] += high if code[i] else low
        elif levels.size == 3:  # a choice is a vector instruction, a look-up is not
            low, middle, high = levels[0], levels[1], levels[2]
            for i in range(part.size):
                part[i] += low if code[i] == 0 else (middle if code[i] == 1 else high)
        else:
            for i in range(part.size):
                part[i] += levels[code[i]]
