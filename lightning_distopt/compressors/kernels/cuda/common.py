"""How programs share a tensor's buckets, and what every kernel calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["MAGNITUDE", "TILE", "Tiling", "keep", "launch", "launch_tiles", "length", "tile", "tiling"]

TILE = 2048  # elements of a program, 16 for each of 128 threads
_LONGEST = 8192  # bucket that one program can hold, with more threads

# Mask of the bits of |v|, which as integers rise with it; infinity is above all numbers, NaN above it.
MAGNITUDE = 0x7FFFFFFF


class Tiling(NamedTuple):
    """How programs share the buckets of a tensor: each has a tile of ``rows`` buckets, ``columns`` elements of each.

    Args:
        numel: elements of the tensor.
        size: elements of a bucket; the last one may be shorter.
        buckets: in all.
        chunks: tiles that a bucket is cut into; ``rows`` is 1 if they are several.
        rows: buckets of a tile, a power of 2.
        columns: elements of a bucket in a tile, a power of 2.
    """

    numel: int
    size: int
    buckets: int
    chunks: int
    rows: int
    columns: int


def tiling(numel: int, size: int) -> Tiling:
    """Return how programs share ``numel`` elements in buckets of ``size``."""
    size = min(size, numel)
    columns = triton.next_power_of_2(size)
    if columns > _LONGEST:
        columns = TILE
    buckets = triton.cdiv(numel, size)
    rows = min(max(1, TILE // columns), triton.next_power_of_2(buckets))
    return Tiling(numel, size, buckets, triton.cdiv(size, columns), rows, columns)


def launch_tiles(kernel: Any, t: Tiling, first: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run a program of ``kernel(first, numel, size, chunks, *args, rows, columns, **constants)`` on each tile."""
    launch(
        kernel,
        triton.cdiv(t.buckets, t.rows) * t.chunks,
        *(first, t.numel, t.size, t.chunks, *args),
        warps=max(4, t.columns // 512),
        rows=t.rows,
        columns=t.columns,
        **constants,
    )


def launch(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of its first argument; nothing waits for them.

    A product and a sum are never fused into one operation, so that what is drawn and left over has the reference's bits.
    """
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **constants, num_warps=warps, enable_fp_fusion=False)


@triton.jit
def tile(numel, size, chunks, rows: tl.constexpr, columns: tl.constexpr):
    """Return of this program's tile: its buckets ``(rows,)``; places in the tensor, and if they exist ``(rows, columns)``."""
    program = tl.program_id(0).to(tl.int64)
    buckets = program // chunks * rows + tl.arange(0, rows)
    inside = program % chunks * columns + tl.arange(0, columns)
    places = buckets[:, None] * size + inside[None, :]
    return buckets, places, (inside[None, :] < size) & (places < numel)


@triton.jit
def keep(found, buckets, values, numel, size, chunks):
    """Store one number of each of this program's buckets in ``found``, shape ``(buckets, chunks)``."""
    tl.store(found + buckets * chunks + tl.program_id(0) % chunks, values, buckets * size < numel)


@triton.jit
def length(buckets, numel, size):
    """Return the number of elements of each bucket; 1 of those that do not exist, so that it can divide."""
    return tl.minimum(tl.maximum(numel - buckets * size, 1), size)
