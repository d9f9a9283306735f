"""What a scheme asks of each bucket: largest magnitude, range, length, deviation."""

from __future__ import annotations

import numpy as np
import torch
from numba import float64, int32, njit
from torch import Tensor

from lightning_distopt.compressors.kernels.cpu.common import MAGNITUDE, PLAIN, SUMS

__all__ = ["deviations", "largest_magnitudes", "lengths", "ranges"]


def largest_magnitudes(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's largest magnitude, shape ``(buckets,)``; NaN or infinite where one of its values is."""
    found = torch.empty(-(-flat.numel() // size), dtype=torch.float32)
    _largest_magnitudes(flat.numpy().view(np.int32), size, found.numpy().view(np.int32))
    return found


def ranges(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's least and largest value, shape ``(buckets, 2)``; one is NaN or infinite where a value is."""
    found = torch.empty(-(-flat.numel() // size), 2, dtype=torch.float32)
    _ranges(flat.numpy().view(np.int32), size, found.numpy().view(np.int32))
    return found


def lengths(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's length ``|v|_2``, float64, shape ``(buckets,)``."""
    found = torch.empty(-(-flat.numel() // size), dtype=torch.float64)
    _lengths(flat.numpy(), size, found.numpy())
    return found


def deviations(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's population standard deviation, float64, shape ``(buckets,)``."""
    found = torch.empty(-(-flat.numel() // size), dtype=torch.float64)
    _deviations(flat.numpy(), size, found.numpy())
    return found


@njit(**PLAIN)
def _largest_magnitudes(bits, size, found):
    for bucket in range(found.size):
        part = bits[bucket * size : (bucket + 1) * size]
        largest = int32(0)
        for i in range(part.size):
            largest = max(largest, part[i] & int32(MAGNITUDE))
        found[bucket] = largest


@njit(**PLAIN)
def _ranges(bits, size, found):
    for bucket in range(found.shape[0]):
        part = bits[bucket * size : (bucket + 1) * size]
        least, largest = int32(MAGNITUDE), int32(-MAGNITUDE - 1)
        for i in range(part.size):
            key = part[i] ^ ((part[i] >> int32(31)) & int32(MAGNITUDE))  # rises with the value
            least, largest = min(least, key), max(largest, key)
        found[bucket, 0] = least ^ ((least >> int32(31)) & int32(MAGNITUDE))
        found[bucket, 1] = largest ^ ((largest >> int32(31)) & int32(MAGNITUDE))


@njit(**SUMS)
def _lengths(v, size, found):
    for bucket in range(found.size):
        part = v[bucket * size : (bucket + 1) * size]
        squares = 0.0
        for i in range(part.size):
            squares += float64(part[i]) * float64(part[i])
        found[bucket] = np.sqrt(squares)


@njit(**SUMS)
def _deviations(v, size, found):
    for bucket in range(found.size):
        part = v[bucket * size : (bucket + 1) * size]
        total = squares = 0.0
        for i in range(part.size):
            total += float64(part[i])
            squares += float64(part[i]) * float64(part[i])
        mean = total / part.size
        variance = squares / part.size - mean * mean
        found[bucket] = np.sqrt(variance if variance > 0 or variance != variance else 0.0)
