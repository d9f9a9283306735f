"""Signs, packed, and the mean magnitude."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_distopt.compressors.kernels.cuda.common import TILE, keep, launch, launch_tiles, tile, tiling

__all__ = ["absolute_sum", "add_signs_", "encode_signs"]

_BYTES = TILE // 8  # of packed signs, that a program works on


def absolute_sum(flat: Tensor) -> Tensor:
    """Return the sum of magnitudes, float64, 0-d."""
    t = tiling(flat.numel(), TILE)
    found = flat.new_empty(t.buckets, dtype=torch.float64)
    launch_tiles(_absolute_sum, t, flat, found)
    return found.sum()


def encode_signs(flat: Tensor, scale: Tensor, residual: bool) -> Tensor:
    """Return the packed signs of ``flat``; with ``residual``, leave ``v - scale * sgn(v)`` in it."""
    bits = flat.new_empty((flat.numel() + 7) // 8, dtype=torch.uint8)
    programs = triton.cdiv(bits.numel(), _BYTES)
    launch(_encode_signs, programs, flat, flat.numel(), scale, bits, residual=residual, width=_BYTES)
    return bits


def add_signs_(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """Add ``scale`` where the bit is set and ``-scale`` elsewhere."""
    launch(_add_signs, triton.cdiv(packed.numel(), _BYTES), out, out.numel(), scale, packed, width=_BYTES)


@triton.jit
def _absolute_sum(flat, numel, size, chunks, found, rows: tl.constexpr, columns: tl.constexpr):
    buckets, places, valid = tile(numel, size, chunks, rows, columns)
    v = tl.load(flat + places, valid, other=0.0).to(tl.float64)
    keep(found, buckets, tl.sum(tl.abs(v), 1), numel, size, chunks)


@triton.jit
def _eights(width: tl.constexpr):
    """Return this program's places in bytes of signs ``(width,)``, and those of each byte's eight elements ``(width, 8)``."""
    byte = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    return byte, byte[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _encode_signs(flat, numel, scale, bits, residual: tl.constexpr, width: tl.constexpr):
    byte, places = _eights(width)
    v = tl.load(flat + places, places < numel, other=-1.0)  # the padding's bits are 0
    positive = v >= 0
    if residual:
        a = tl.load(scale)
        tl.store(flat + places, tl.where(positive, v - a, v + a), places < numel)
    packed = tl.sum(positive.to(tl.int32) << tl.arange(0, 8)[None, :], 1)
    tl.store(bits + byte, packed.to(tl.uint8), byte * 8 < numel)


@triton.jit
def _add_signs(out, numel, scale, packed, width: tl.constexpr):
    byte, places = _eights(width)
    bits = tl.load(packed + byte, byte * 8 < numel, other=0).to(tl.int32)
    positive = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1
    a = tl.load(scale)
    old = tl.load(out + places, places < numel, other=0.0)
    tl.store(out + places, old + tl.where(positive != 0, a, -a), places < numel)
