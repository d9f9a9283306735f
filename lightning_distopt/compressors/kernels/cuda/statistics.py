"""What a scheme asks of each bucket: largest magnitude, range, length, deviation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_distopt.compressors.kernels.cuda.common import MAGNITUDE, keep, launch_tiles, tile, tiling

__all__ = ["bucket_lengths", "deviations", "largest_magnitudes", "lengths", "moments", "ranges"]

_MAGNITUDE = tl.constexpr(MAGNITUDE)


def largest_magnitudes(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's largest magnitude, shape ``(buckets,)``; NaN or infinite where one of its values is."""
    t = tiling(flat.numel(), size)
    found = flat.new_empty(t.buckets, t.chunks, dtype=torch.int32)
    launch_tiles(_largest_magnitudes, t, flat.view(torch.int32), found)
    return found.amax(1).view(torch.float32)


def ranges(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's least and largest value, shape ``(buckets, 2)``; one is NaN or infinite where a value is."""
    t = tiling(flat.numel(), size)
    least, largest = flat.new_empty(2, t.buckets, t.chunks, dtype=torch.int32)
    launch_tiles(_ranges, t, flat.view(torch.int32), least, largest)
    keys = torch.stack((least.amin(1), largest.amax(1)), 1)
    return (keys ^ ((keys >> 31) & MAGNITUDE)).view(torch.float32)


def lengths(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's length ``|v|_2``, float64, shape ``(buckets,)``."""
    return moments(flat, size)[1].sqrt()


def deviations(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's population standard deviation, float64, shape ``(buckets,)``."""
    totals, squares = moments(flat, size)
    numel = bucket_lengths(flat, size)
    return (squares / numel - (totals / numel).square()).clamp(min=0).sqrt()


def moments(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the sums of each bucket's values and of their squares, float64, shape ``(buckets,)``."""
    t = tiling(flat.numel(), size)
    totals, squares = flat.new_empty(2, t.buckets, t.chunks, dtype=torch.float64)
    launch_tiles(_moments, t, flat, totals, squares)
    return totals.sum(1), squares.sum(1)


def bucket_lengths(flat: Tensor, size: int) -> Tensor:
    """Return each bucket's number of elements, int64, shape ``(buckets,)``."""
    starts = torch.arange(0, flat.numel(), size, device=flat.device)
    return (flat.numel() - starts).clamp(max=size)


@triton.jit
def _largest_magnitudes(bits, numel, size, chunks, found, rows: tl.constexpr, columns: tl.constexpr):
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    magnitudes = tl.load(bits + places, valid, other=0) & _MAGNITUDE
    keep(found, buckets, tl.max(magnitudes, 1), numel, size, chunks)


@triton.jit
def _ranges(bits, numel, size, chunks, least, largest, rows: tl.constexpr, columns: tl.constexpr):
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    seen = tl.load(bits + places, valid, other=0)
    keys = seen ^ ((seen >> 31) & _MAGNITUDE)  # rises with the value
    keep(least, buckets, tl.min(tl.where(valid, keys, _MAGNITUDE), 1), numel, size, chunks)
    keep(largest, buckets, tl.max(tl.where(valid, keys, -_MAGNITUDE - 1), 1), numel, size, chunks)


@triton.jit
def _moments(flat, numel, size, chunks, totals, squares, rows: tl.constexpr, columns: tl.constexpr):
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    v = tl.load(flat + places, valid, other=0.0).to(tl.float64)
    keep(totals, buckets, tl.sum(v, 1), numel, size, chunks)
    keep(squares, buckets, tl.sum(v * v, 1), numel, size, chunks)
