"""Levels of ORQ from a histogram: the arithmetic of the CPU kernel, so the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_distopt.compressors.kernels.cuda.common import launch, tiling
from lightning_distopt.compressors.kernels.cuda.statistics import ranges

__all__ = ["optimal_levels"]

_BINS = tl.constexpr(128)
_PLACES = tl.constexpr(16)  # room for up to 9 levels


def optimal_levels(flat: Tensor, size: int, symbols: int, limits: Tensor | None) -> Tensor:
    """Return ORQ's levels of each bucket from a histogram instead of a sort, shape ``(buckets, symbols)``.

    The outer levels are exact. The others divide the values of a bin evenly, which costs 0.1 % of error. A sort of every
    bucket (``torch.sort``) would take temporaries of four times the tensor.

    Args:
        flat: float32.
        size: of a bucket.
        symbols: 3, 5 or 9.
        limits: values are clipped to plus and minus these, shape ``(buckets, 1)``.
    """
    ends = ranges(flat, size)
    if limits is not None:
        ends = torch.where(ends.isfinite(), torch.clamp(ends, -limits, limits), ends)
    t = tiling(flat.numel(), size)
    columns = max(t.columns, 128)
    levels = flat.new_empty(t.buckets, symbols)
    hits = flat.new_zeros(1, dtype=torch.int32)  # not looked at where one program sees the whole bucket
    if t.chunks > 1:
        parts = flat.new_empty(t.buckets, t.chunks, 128, dtype=torch.int32)
        programs = t.buckets * t.chunks
        launch(_histograms, programs, flat, t.numel, t.size, t.chunks, ends, parts, columns=columns)
        hits = parts.sum(1, dtype=torch.int32)
    constants = {"symbols": symbols, "whole": t.chunks == 1, "columns": columns}
    launch(_optimal_levels, t.buckets, flat, t.numel, t.size, ends, hits, levels, warps=4, **constants)
    return levels


@triton.jit
def _scaled(ends, bucket):
    """Return least and largest value of a bucket, the bins in a unit, and if it can be cut into bins at all."""
    least, largest = tl.load(ends + bucket * 2), tl.load(ends + bucket * 2 + 1)
    width = largest.to(tl.float64) - least.to(tl.float64)
    finite = (tl.abs(least) < float("inf")) & (tl.abs(largest) < float("inf"))
    per_unit = _BINS / tl.where(finite & (width > 0), width, 1.0)
    return least, largest, width, per_unit, finite & (width > 0) & (per_unit.to(tl.float32) < float("inf"))


@triton.jit
def _histogram(flat, numel, size, bucket, start, least, per_unit, good, columns: tl.constexpr):
    """Return how many values of a bucket, from ``start`` on, lie in each bin."""
    inside = start + tl.arange(0, columns)
    valid = (inside < size) & (bucket * size + inside < numel)
    v = tl.load(flat + bucket * size + inside, valid, other=0.0)
    scale = per_unit.to(tl.float32)
    offset = (-least.to(tl.float64) * per_unit).to(tl.float32)
    place = tl.where(good, v * scale + offset, 0.0)
    place = tl.minimum(tl.maximum(place, 0.0), _BINS - 1.0).to(tl.int32)
    return tl.histogram(place, _BINS, mask=valid)


@triton.jit
def _histograms(flat, numel, size, chunks, ends, parts, columns: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    bucket = program // chunks
    least, _, _, per_unit, good = _scaled(ends, bucket)
    hits = _histogram(flat, numel, size, bucket, program % chunks * columns, least, per_unit, good, columns)
    tl.store(parts + program * _BINS + tl.arange(0, _BINS), hits)


@triton.jit
def _count_at(hits, position):
    """Number of values below a position in bins, which are taken to lie evenly in their bin."""
    bins = tl.arange(0, _BINS)
    b = tl.minimum(position.to(tl.int32), _BINS - 1)
    inside = tl.sum(tl.where(bins == b, hits, 0.0), 0)
    return tl.sum(tl.where(bins < b, hits, 0.0), 0) + (position - b) * inside


@triton.jit
def _sum_at(hits, position):
    """Sum of the values below a position, in bins, so that they are small numbers."""
    bins = tl.arange(0, _BINS)
    b = tl.minimum(position.to(tl.int32), _BINS - 1)
    share = position - b
    inside = tl.sum(tl.where(bins == b, hits, 0.0), 0)
    return tl.sum(tl.where(bins < b, hits * (bins + 0.5), 0.0), 0) + share * inside * (b + 0.5 * share)


@triton.jit
def _between(hits, a, c):
    """Position of the best level between positions ``a`` and ``c``, all in bins."""
    bins = tl.arange(0, _BINS)
    low, high = _count_at(hits, a), _count_at(hits, c)
    wide = tl.where(c > a, c - a, 1.0)
    wanted = high - (_sum_at(hits, c) - _sum_at(hits, a) - (high - low) * a) / wide  # of values below the level
    before = tl.cumsum(hits, 0) - hits  # of values below each bin
    first = tl.maximum(tl.sum((before <= wanted).to(tl.int32), 0) - 1, 0)
    inside = tl.sum(tl.where(bins == first, hits, 0.0), 0)
    left = wanted - tl.sum(tl.where(bins < first, hits, 0.0), 0)
    position = first + tl.where(inside > 0, left / tl.where(inside > 0, inside, 1.0), 0.5)
    return tl.where((high > low) & (c > a), tl.minimum(tl.maximum(position, a), c), 0.5 * (a + c))


@triton.jit
def _divided(positions, counts, half: tl.constexpr, times: tl.constexpr):
    """Place level ``half * times`` between those that are ``half`` before and after it."""
    index = tl.arange(0, _PLACES)
    a = tl.sum(tl.where(index == half * times - half, positions, 0.0), 0)
    c = tl.sum(tl.where(index == half * times + half, positions, 0.0), 0)
    return tl.where(index == half * times, _between(counts, a, c), positions)


@triton.jit
def _optimal_levels(
    flat, numel, size, ends, hits, levels, symbols: tl.constexpr, whole: tl.constexpr, columns: tl.constexpr
):
    bucket = tl.program_id(0).to(tl.int64)
    least, largest, width, per_unit, good = _scaled(ends, bucket)
    if whole:
        counts = _histogram(flat, numel, size, bucket, 0, least, per_unit, good, columns).to(tl.float64)
    else:
        counts = tl.load(hits + bucket * _BINS + tl.arange(0, _BINS)).to(tl.float64)
    index = tl.arange(0, _PLACES)
    positions = tl.where(index == symbols - 1, 1.0 * _BINS, 0.0).to(tl.float64)  # of levels, in bins
    for depth in tl.static_range(3):
        if (symbols - 1) >> (depth + 1) > 0:
            for part in tl.static_range(1 << depth):
                positions = _divided(positions, counts, (symbols - 1) >> (depth + 1), 2 * part + 1)
    previous = least
    finite = (tl.abs(least) < float("inf")) & (tl.abs(largest) < float("inf"))
    for k in tl.static_range(symbols):
        even = (least.to(tl.float64) + width * k / (symbols - 1)).to(tl.float32)  # of a denormal range
        level = (least.to(tl.float64) + tl.sum(tl.where(index == k, positions, 0.0), 0) / per_unit).to(tl.float32)
        if k > 0:
            previous = tl.minimum(tl.maximum(level, previous), largest)
        if k == symbols - 1:
            previous = largest
        chosen = tl.where(good, previous, tl.where(width > 0, even, least))
        tl.store(levels + bucket * symbols + k, tl.where(finite, chosen, float("nan")))
