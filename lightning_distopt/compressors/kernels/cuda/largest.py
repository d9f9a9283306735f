"""The exact k largest magnitudes: torch finds the bound, two passes collect what reaches it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_distopt.compressors.kernels.cuda.common import MAGNITUDE, TILE, launch

__all__ = ["scatter_add_", "select_largest"]

_MAGNITUDE = tl.constexpr(MAGNITUDE)


def select_largest(flat: Tensor, k: int) -> Tensor:
    """Return the places of the ``k`` largest magnitudes, ascending, int32; of equal ones the first. NaN is largest.

    The CPU's bound from a sample would leave a number of survivors that the host had to wait for. ``torch.topk`` selects
    by digits in a few passes, but of equal values it takes any, in any order: only its least value is used.
    """
    magnitudes = flat.view(torch.int32) & MAGNITUDE
    bound = magnitudes.topk(k, sorted=False).values.amin()
    programs = triton.cdiv(flat.numel(), TILE)
    counts = flat.new_empty(2, programs, dtype=torch.int32)
    launch(_count, programs, magnitudes, flat.numel(), bound, *counts, width=TILE)
    before = counts.cumsum(1) - counts  # of values above the bound, and at it, in earlier tiles
    ties = k - counts[0].sum()
    places = flat.new_empty(k, dtype=torch.int32)
    launch(_collect, programs, magnitudes, flat.numel(), bound, *before, ties, places, width=TILE)
    return places


def scatter_add_(out: Tensor, places: Tensor, values: Tensor, alpha: float) -> None:
    """``out[places] += alpha * values``; no place may occur twice, so that no addition waits for another."""
    if places.numel():
        programs = triton.cdiv(places.numel(), TILE)
        launch(_scatter_add, programs, out, places, values, places.numel(), float(alpha), width=TILE)


@triton.jit
def _seen(magnitudes, numel, bound, width: tl.constexpr):
    """Return this program's places, and 1 where a magnitude is above the bound, and where it is at it."""
    places = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    m = tl.load(magnitudes + places, places < numel, other=-1)
    b = tl.load(bound)
    return places, (m > b).to(tl.int32), (m == b).to(tl.int32)


@triton.jit
def _count(magnitudes, numel, bound, above, equal, width: tl.constexpr):
    _, over, at = _seen(magnitudes, numel, bound, width)
    tl.store(above + tl.program_id(0), tl.sum(over, 0))
    tl.store(equal + tl.program_id(0), tl.sum(at, 0))


@triton.jit
def _collect(magnitudes, numel, bound, above, equal, ties, out, width: tl.constexpr):
    places, over, at = _seen(magnitudes, numel, bound, width)
    over_before = tl.load(above + tl.program_id(0)) + tl.cumsum(over, 0) - over
    at_before = tl.load(equal + tl.program_id(0)) + tl.cumsum(at, 0) - at
    wanted = tl.load(ties)
    chosen = (over != 0) | ((at != 0) & (at_before < wanted))
    tl.store(out + over_before + tl.minimum(at_before, wanted), places.to(tl.int32), chosen)


@triton.jit(do_not_specialize=["alpha"])
def _scatter_add(out, places, values, numel, alpha, width: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    place = tl.load(places + i, i < numel, other=0)
    old = tl.load(out + place, i < numel, other=0.0)
    tl.store(out + place, old + alpha * tl.load(values + i, i < numel, other=0.0), i < numel)
