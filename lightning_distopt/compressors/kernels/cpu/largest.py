"""The exact k largest magnitudes, in little more than one pass."""

from __future__ import annotations

import numpy as np
import torch
from numba import int32, int64, njit, uint32, uint64
from torch import Tensor

from lightning_distopt.compressors.kernels.cpu.common import MAGNITUDE, PLAIN

__all__ = ["scatter_add_", "select_largest"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SAMPLE = 64  # one run of 8 neighbours in this many runs is looked at


def select_largest(flat: Tensor, k: int) -> Tensor:
    """Return the places of the ``k`` largest magnitudes, ascending, int32; of equal ones the first. NaN is largest.

    A sample gives a bound that a little more than ``k`` values reach; the exact choice is among those.
    """
    bits = flat.numpy().view(np.int32)
    places = torch.empty(k, dtype=torch.int32)
    bound = np.int32(_sampled_bound(bits, k)) if k < flat.numel() // 4 else np.int32(0)
    survivors = _survivors(bits, bound, k)
    if survivors.size < k:
        survivors = _survivors(bits, np.int32(0), k)
    _largest_of(bits, survivors, places.numpy())
    return places


def scatter_add_(out: Tensor, places: Tensor, values: Tensor, alpha: float) -> None:
    """``out[places] += alpha * values``."""
    _scatter_add(out.numpy(), places.numpy(), values.numpy(), np.float32(alpha))


@njit(**PLAIN)
def _sampled_bound(bits, k):
    """Return the bits of a magnitude that about ``k (1 + 4 / sqrt(sampled k))`` values reach."""
    runs = bits.size // (8 * _SAMPLE)
    if runs == 0:
        return int32(0)
    sample = np.empty(8 * runs, np.int32)
    for run in range(runs):
        # A hashed place in each stretch: an even stride would resonate with the layout of channels.
        jump = int64((uint64(run) * _GOLDEN) >> uint64(58)) % _SAMPLE
        for j in range(8):
            sample[8 * run + j] = bits[8 * (run * _SAMPLE + jump) + j] & int32(MAGNITUDE)
    expected = k * sample.size / bits.size
    rank = int64(expected + 4 * np.sqrt(expected) + 1)
    return int32(0) if rank >= sample.size else _kth_largest(sample, rank)


@njit(**PLAIN)
def _kth_largest(bits, k):
    """Return the ``k``-th largest of non-negative integers, by their digits of 11, 10 and 10 bits from the top."""
    prefix, known = int32(0), int32(0)
    counts = np.empty(2048, np.int64)
    for shift, digits in ((20, 11), (10, 10), (0, 10)):
        counts[:] = 0
        for b in bits:
            counts[(b >> shift) & ((1 << digits) - 1)] += (b & known) == prefix
        digit = (1 << digits) - 1
        while counts[digit] < k:
            k -= counts[digit]
            digit -= 1
        prefix |= int32(digit << shift)
        known |= int32(((1 << digits) - 1) << shift)
    return prefix


@njit(**PLAIN)
def _survivors(bits, bound, k):
    """Return the places of magnitudes from ``bound`` on, ascending."""
    size = 32
    found = np.empty(min(bits.size, 4 * k + 1024) if bound > 0 else bits.size, np.int32)
    n = 0
    for start in range(0, bits.size, size):
        part = bits[start : start + size]
        inside = int32(0)
        for i in range(part.size):
            inside += int32((part[i] & int32(MAGNITUDE)) >= bound)
        if inside:
            if n + inside > found.size:  # the sample misled: let the caller look at all
                return found[:0]
            for i in range(part.size):
                if (part[i] & int32(MAGNITUDE)) >= bound:
                    found[n] = start + i
                    n += 1
    return found[:n]


@njit(**PLAIN)
def _largest_of(bits, survivors, places):
    magnitudes = np.empty(survivors.size, np.int32)
    for i in range(survivors.size):
        magnitudes[i] = bits[survivors[i]] & int32(MAGNITUDE)
    bound = _kth_largest(magnitudes, places.size)
    above = 0
    for m in magnitudes:
        above += m > bound
    ties, n = places.size - above, 0
    for i in range(survivors.size):
        if magnitudes[i] > bound or (magnitudes[i] == bound and ties > 0):
            ties -= magnitudes[i] == bound
            places[n] = survivors[i]
            n += 1


@njit(**PLAIN)
def _scatter_add(out, places, values, alpha):
    for i in range(places.size):
        out[uint32(places[i])] += alpha * values[i]  # unsigned: no look at whether an index counts from the end
