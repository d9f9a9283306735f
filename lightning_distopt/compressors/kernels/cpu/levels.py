"""Levels found by halving (BinGrad-pb) or from a histogram (ORQ)."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, float64, int32, int64, njit, uint8
from torch import Tensor

from lightning_distopt.compressors.kernels.cpu.common import PLAIN, SUMS
from lightning_distopt.compressors.kernels.cpu.statistics import largest_magnitudes, ranges

__all__ = ["best_magnitudes", "optimal_levels"]


def best_magnitudes(flat: Tensor, size: int) -> Tensor:
    """Return the root ``b = (1/d) * sum of |v_i| >= b`` of each bucket, to float32; NaN where a value is not finite."""
    found = largest_magnitudes(flat, size)
    _best_magnitudes(flat.numpy(), size, found.numpy())
    return found


def optimal_levels(flat: Tensor, size: int, symbols: int, limits: Tensor | None) -> Tensor:
    """Return ORQ's levels of each bucket from a histogram instead of a sort, shape ``(buckets, symbols)``.

    The outer levels are exact. The others divide the values of a bin evenly, which costs 0.1 % of error.

    Args:
        flat: float32.
        size: of a bucket.
        symbols: 3, 5 or 9.
        limits: values are clipped to plus and minus these, shape ``(buckets, 1)``.
    """
    levels = torch.empty(-(-flat.numel() // size), symbols, dtype=torch.float32)
    ends = ranges(flat, size)
    if limits is not None:
        ends = torch.where(ends.isfinite(), torch.clamp(ends, -limits, limits), ends)
    _optimal_levels(flat.numpy(), size, ends.numpy(), levels.numpy())
    return levels


@njit(**SUMS)
def _share_from(v, bound, share):
    """Sum of ``share`` of the magnitudes from ``bound`` on."""
    total = float32(0)
    for i in range(v.size):
        total += abs(v[i]) * share if abs(v[i]) >= bound else float32(0)
    return total


@njit(**PLAIN)
def _best_magnitudes(v, size, found):
    for bucket in range(found.size):
        part = v[bucket * size : (bucket + 1) * size]
        largest = found[bucket]
        if not largest < float32(np.inf):
            found[bucket] = np.nan
            continue
        # The sum divided by d falls with the bound, so the root is between any bound and what it gives; halve.
        share = float32(1) / float32(part.size)
        low, high = float32(0), largest
        for _ in range(20):
            middle = float32(0.5) * low + float32(0.5) * high
            if _share_from(part, middle, share) >= middle:
                low = middle
            else:
                high = middle
        found[bucket] = min(max(_share_from(part, low, share), low), high)


_BINS = 128


@njit(**PLAIN)
def _optimal_levels(v, size, ends, levels):
    symbols = levels.shape[1]
    places = np.zeros(min(size, v.size) + 1, np.uint8)
    hits = np.empty((2, _BINS), np.int32)  # two tables: neighbours that fall in one bin need not wait for each other
    counts = np.empty(_BINS + 1, np.float64)  # of values below each edge; sums likewise
    sums = np.empty(_BINS + 1, np.float64)
    positions = np.empty(symbols, np.float64)  # of levels, in bins
    for bucket in range(levels.shape[0]):
        part = v[bucket * size : (bucket + 1) * size]
        least, largest = ends[bucket, 0], ends[bucket, 1]
        if not (abs(least) < np.inf and abs(largest) < np.inf):
            levels[bucket, :] = np.nan
            continue
        width = float64(largest) - float64(least)
        if width <= 0:
            levels[bucket, :] = least
            continue
        per_unit = _BINS / width
        scale, offset = float32(per_unit), float32(-least * per_unit)
        if not scale < float32(np.inf):  # denormal range: even levels do
            for k in range(symbols):
                levels[bucket, k] = float32(float64(least) + width * k / (symbols - 1))
            continue
        for i in range(part.size):
            places[i] = uint8(int32(min(max(part[i] * scale + offset, float32(0)), float32(_BINS - 1))))
        hits[:] = 0
        for i in range(part.size // 2):
            hits[0, places[2 * i]] += 1
            hits[1, places[2 * i + 1]] += 1
        if part.size % 2:
            hits[0, places[part.size - 1]] += 1
        # Values are taken to lie evenly in their bin; in bins, so that sums are small numbers.
        counts[0] = sums[0] = 0
        for b in range(_BINS):
            inside = hits[0, b] + hits[1, b]
            counts[b + 1] = counts[b] + inside
            sums[b + 1] = sums[b] + inside * (b + 0.5)
        positions[0], positions[symbols - 1] = 0.0, _BINS
        step = symbols - 1
        while step > 1:
            half = step // 2
            for k in range(half, symbols - 1, step):
                positions[k] = _between(counts, sums, positions[k - half], positions[k + half])
            step = half
        levels[bucket, 0], levels[bucket, symbols - 1] = least, largest
        for k in range(1, symbols - 1):
            level = float32(float64(least) + positions[k] / per_unit)
            levels[bucket, k] = min(max(level, levels[bucket, k - 1]), largest)


@njit(**PLAIN)
def _between(counts, sums, a, c):
    """Position of the best level between positions ``a`` and ``c``, all in bins."""
    low, high = _count_at(counts, a), _count_at(counts, c)
    if not (high > low and c > a):
        return 0.5 * (a + c)
    up = (_sum_at(counts, sums, c) - _sum_at(counts, sums, a) - (high - low) * a) / (c - a)
    wanted = high - up  # of values below the level
    first, last = 0, counts.size - 1  # counts[first] <= wanted
    while last - first > 1:
        middle = (first + last) // 2
        if counts[middle] <= wanted:
            first = middle
        else:
            last = middle
    inside = counts[first + 1] - counts[first]
    position = first + ((wanted - counts[first]) / inside if inside > 0 else 0.5)
    return min(max(position, a), c)


@njit(**PLAIN)
def _count_at(counts, position):
    b = min(int64(position), counts.size - 2)
    return counts[b] + (position - b) * (counts[b + 1] - counts[b])


@njit(**PLAIN)
def _sum_at(counts, sums, position):
    b = min(int64(position), counts.size - 2)
    share = position - b
    return sums[b] + share * (counts[b + 1] - counts[b]) * (b + 0.5 * share)
