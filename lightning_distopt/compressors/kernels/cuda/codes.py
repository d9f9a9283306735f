"""Codes: rounding at random, two means, and decoding by look-up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_distopt.compressors.kernels.cuda.common import keep, launch_tiles, length, tile, tiling
from lightning_distopt.compressors.kernels.cuda.statistics import bucket_lengths, moments

__all__ = ["add_levels_", "encode_binary", "round_randomly"]

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)


def round_randomly(flat: Tensor, table: Tensor, size: int, key: int, residual: bool) -> Tensor:
    """Return the code of each value's level, drawn with ``key``; with ``residual``, leave ``v - level`` in ``flat``."""
    codes = flat.new_empty(flat.numel(), dtype=torch.uint8)
    t = tiling(flat.numel(), size)
    launch_tiles(_round_randomly, t, flat, table.contiguous(), key, codes, symbols=table.size(1), residual=residual)
    return codes


def encode_binary(flat: Tensor, size: int, residual: bool) -> tuple[Tensor, Tensor]:
    """Return BinGrad-b's levels, shape ``(buckets, 2)``, and codes, with each bucket's mean as threshold."""
    t = tiling(flat.numel(), size)
    codes = flat.new_empty(flat.numel(), dtype=torch.uint8)
    if t.chunks == 1:
        levels = flat.new_empty(t.buckets, 2)
        threshold = levels  # not looked at
    else:
        levels, threshold = _two_means(flat, size)
    launch_tiles(_encode_binary, t, flat, levels, threshold, codes, residual=residual, whole=t.chunks == 1)
    return levels, codes


def add_levels_(codes: Tensor, table: Tensor, size: int, out: Tensor) -> None:
    """Add to ``out`` the level of its bucket that each code names."""
    launch_tiles(_add_levels, tiling(out.numel(), size), out, codes, table.contiguous(), symbols=table.size(1))


def _two_means(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return levels and thresholds of buckets that are longer than a tile."""
    t = tiling(flat.numel(), size)
    numel = bucket_lengths(flat, size)
    mean = moments(flat, size)[0] / numel
    threshold = mean.float()
    counts = flat.new_empty(t.buckets, t.chunks, dtype=torch.int32)
    totals = flat.new_empty(t.buckets, t.chunks, dtype=torch.float64)
    launch_tiles(_upper, t, flat, threshold, counts, totals)
    count, total = counts.sum(1), totals.sum(1)
    one_sided = (count == 0) | (count == numel) | ~mean.isfinite()
    means = torch.stack(((mean * numel - total) / (numel - count), total / count), 1).float()
    return torch.where(one_sided[:, None], threshold[:, None], means), threshold


@triton.jit
def _uniform(key, places):
    """Return the draws of :func:`lightning_distopt.compressors.randomness.uniform`."""
    z = key.to(tl.uint64) + (places + 1).to(tl.uint64) * _GOLDEN
    z = (z ^ (z >> 30)) * _MIX1
    z = (z ^ (z >> 27)) * _MIX2
    z = z ^ (z >> 31)
    return (z >> 40).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@triton.jit(do_not_specialize=["key"])
def _round_randomly(
    flat,
    numel,
    size,
    chunks,
    table,
    key: tl.uint64,
    codes,
    symbols: tl.constexpr,
    residual: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    v = tl.load(flat + places, valid, other=0.0)
    levels = table + buckets[:, None] * symbols
    # The last inner level that a value reaches, by halving; levels ascend.
    cell = tl.zeros([rows, columns], tl.int32)
    for bit in tl.static_range(8):
        if 128 >> bit <= symbols - 2:
            probe = cell + (128 >> bit)
            inner = valid & (probe <= symbols - 2)
            cell = tl.where(inner & (v >= tl.load(levels + probe, inner, other=0.0)), probe, cell)
    low = tl.load(levels + cell, valid, other=0.0)
    high = tl.load(levels + cell + 1, valid, other=0.0)
    width = high * 0.5 - low * 0.5  # the whole width of a cell can overflow
    up = _uniform(key, places) * width < v * 0.5 - low * 0.5
    tl.store(codes + places, (cell + up.to(tl.int32)).to(tl.uint8), valid)
    if residual:
        tl.store(flat + places, v - tl.where(up, high, low), valid)


@triton.jit
def _upper(flat, numel, size, chunks, threshold, counts, totals, rows: tl.constexpr, columns: tl.constexpr):
    """Store number and sum of the values from the threshold on."""
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    v = tl.load(flat + places, valid, other=0.0)
    upper = valid & (v >= tl.load(threshold + buckets, buckets * size < numel, other=0.0)[:, None])
    keep(counts, buckets, tl.sum(upper.to(tl.int32), 1), numel, size, chunks)
    keep(totals, buckets, tl.sum(tl.where(upper, v.to(tl.float64), 0.0), 1), numel, size, chunks)


@triton.jit
def _encode_binary(
    flat,
    numel,
    size,
    chunks,
    levels,
    threshold,
    codes,
    residual: tl.constexpr,
    whole: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    real = buckets * size < numel
    v = tl.load(flat + places, valid, other=0.0)
    if whole:
        d = length(buckets, numel, size)
        mean = tl.sum(v.to(tl.float64), 1) / d.to(tl.float64)
        bound = mean.to(tl.float32)
        upper = valid & (v >= bound[:, None])
        count = tl.sum(upper.to(tl.int32), 1)
        total = tl.sum(tl.where(upper, v.to(tl.float64), 0.0), 1)
        one_sided = (count == 0) | (count == d) | ~(tl.abs(mean) < float("inf"))
        below = tl.where(one_sided, 1, d - count).to(tl.float64)
        above = tl.where(one_sided, 1, count).to(tl.float64)
        low = tl.where(one_sided, bound, ((mean * d.to(tl.float64) - total) / below).to(tl.float32))
        high = tl.where(one_sided, bound, (total / above).to(tl.float32))
        tl.store(levels + buckets * 2, low, real)
        tl.store(levels + buckets * 2 + 1, high, real)
    else:
        upper = v >= tl.load(threshold + buckets, real, other=0.0)[:, None]
        low = tl.load(levels + buckets * 2, real, other=0.0)
        high = tl.load(levels + buckets * 2 + 1, real, other=0.0)
    tl.store(codes + places, upper.to(tl.uint8), valid)
    if residual:
        tl.store(flat + places, v - tl.where(upper, high[:, None], low[:, None]), valid)


@triton.jit
def _add_levels(
    out, numel, size, chunks, codes, table, symbols: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    code = tl.load(codes + places, valid, other=0).to(tl.int64)
    level = tl.load(table + buckets[:, None] * symbols + code, valid, other=0.0)
    tl.store(out + places, tl.load(out + places, valid, other=0.0) + level, valid)
