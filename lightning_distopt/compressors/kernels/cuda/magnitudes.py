"""The best magnitude of BinGrad-pb, found by halving."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_distopt.compressors.kernels.cuda.common import (
    MAGNITUDE,
    Tiling,
    keep,
    launch_tiles,
    length,
    tile,
    tiling,
)
from lightning_distopt.compressors.kernels.cuda.statistics import bucket_lengths, largest_magnitudes

__all__ = ["best_magnitudes"]

_HALVINGS = 20
_TIMES = tl.constexpr(_HALVINGS)
_MAGNITUDE = tl.constexpr(MAGNITUDE)


def best_magnitudes(flat: Tensor, size: int) -> Tensor:
    """Return the root ``b = (1/d) * sum of |v_i| >= b`` of each bucket, to float32; NaN where a value is not finite."""
    t = tiling(flat.numel(), size)
    if t.chunks > 1:
        return _by_passes(flat, t)
    found = flat.new_empty(t.buckets)
    launch_tiles(_best_magnitudes, t, flat, found)
    return found


def _by_passes(flat: Tensor, t: Tiling) -> Tensor:
    """The same for buckets longer than a tile: one pass over the tensor for each halving, and no copy of it."""
    largest = largest_magnitudes(flat, t.size)
    share = 1.0 / bucket_lengths(flat, t.size).float()
    sums = flat.new_empty(t.buckets, t.chunks)

    def given(bound: Tensor) -> Tensor:
        launch_tiles(_sums_from, t, flat, bound, share, sums)
        return sums.sum(1)

    low, high = torch.zeros_like(largest), largest
    for _ in range(_HALVINGS):
        middle = 0.5 * low + 0.5 * high
        up = given(middle) >= middle
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    best = torch.minimum(torch.maximum(given(low), low), high)
    return torch.where(largest.isfinite(), best, torch.nan)


@triton.jit
def _sums_from(flat, numel, size, chunks, bound, share, found, rows: tl.constexpr, columns: tl.constexpr):
    """Store the sum of ``share`` of the magnitudes from ``bound`` on."""
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    real = buckets * size < numel
    v = tl.abs(tl.load(flat + places, valid, other=0.0))
    b = tl.load(bound + buckets, real, other=0.0)
    s = tl.load(share + buckets, real, other=0.0)
    keep(found, buckets, tl.sum(tl.where(v >= b[:, None], v * s[:, None], 0.0), 1), numel, size, chunks)


@triton.jit
def _best_magnitudes(flat, numel, size, chunks, found, rows: tl.constexpr, columns: tl.constexpr):
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    v = tl.abs(tl.load(flat + places, valid, other=0.0))
    largest = tl.max(v.to(tl.int32, bitcast=True) & _MAGNITUDE, 1).to(tl.float32, bitcast=True)
    parts = v * tl.div_rn(1.0, length(buckets, numel, size).to(tl.float32))[:, None]
    # The sum divided by d falls with the bound, so the root is between any bound and what it gives; halve.
    low, high = tl.zeros_like(largest), largest
    for _ in range(_TIMES):
        middle = 0.5 * low + 0.5 * high
        up = tl.sum(tl.where(v >= middle[:, None], parts, 0.0), 1) >= middle
        low = tl.where(up, middle, low)
        high = tl.where(up, high, middle)
    given = tl.sum(tl.where(v >= low[:, None], parts, 0.0), 1)
    best = tl.minimum(tl.maximum(given, low), high)
    keep(found, buckets, tl.where(largest < float("inf"), best, float("nan")), numel, size, chunks)
