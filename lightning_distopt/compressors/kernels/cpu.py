"""Kernels for the CPU, compiled by numba: each works through a tensor in blocks that stay in the first-level cache.

Loops are written so that the compiler turns them into vector instructions: one simple statement each, no branch.
Non-finite values need no check of their own: seen as integers, the bits of |v| rise with it, and NaN is above infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import float32, float64, int32, int64, njit, uint8, uint32, uint64
from torch import Tensor

from lightning_distopt.compressors.codes import bits_per_code, packed_bytes

__all__ = [
    "absolute_sum",
    "add_levels_",
    "add_signs_",
    "best_magnitudes",
    "deviations",
    "encode_binary",
    "encode_signs",
    "largest_magnitudes",
    "lengths",
    "optimal_levels",
    "pack",
    "ranges",
    "round_randomly",
    "scatter_add_",
    "select_largest",
    "unpack",
]

_PLAIN: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}
_SUMS: dict[str, Any] = {
    **_PLAIN,
    "fastmath": {"reassoc", "contract", "nsz"},
}  # may reorder, must keep NaN and infinity
_BLOCK = 4096
_INFINITY = 0x7F800000  # bits of infinity; NaN is above
_MAGNITUDE = 0x7FFFFFFF

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_GATHER = np.uint64(0x0102040810204080)


# ---- signs -----------------------------------------------------------------------------------------------------------


def absolute_sum(flat: Tensor) -> Tensor:
    """Return the sum of magnitudes, float64, 0-d."""
    total = _absolute_sum(flat.numpy())
    if np.isinf(total):  # a block's sum may overflow where no value does
        total = torch.linalg.vector_norm(flat, 1, dtype=torch.float64).item()
    return torch.tensor(total, dtype=torch.float64)


def encode_signs(flat: Tensor, scale: Tensor, residual: bool) -> Tensor:
    """Return the packed signs of ``flat``; with ``residual``, leave ``v - scale * sgn(v)`` in it."""
    bits = torch.empty((flat.numel() + 7) // 8, dtype=torch.uint8)
    _encode_signs(flat.numpy(), np.float32(scale.item()), bits.numpy(), residual)
    return bits


def add_signs_(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """Add ``scale`` where the bit is set and ``-scale`` elsewhere."""
    _add_signs(packed.numpy(), np.float32(scale.item()), out.numpy())


@njit(**_SUMS)
def _absolute_sum(v):
    total = 0.0
    for start in range(0, v.size, _BLOCK):
        part = v[start : start + _BLOCK]
        partial = float32(0)
        for i in range(part.size):
            partial += abs(part[i])
        total += float64(partial)
    return total


@njit(**_PLAIN)
def _encode_signs(v, scale, bits, residual):
    signs = np.zeros(_BLOCK, np.uint8)
    words = signs.view(np.uint64)
    for start in range(0, v.size, _BLOCK):
        part = v[start : start + _BLOCK]
        for i in range(part.size):
            signs[i] = part[i] >= float32(0)
        if residual:
            for i in range(part.size):
                part[i] = part[i] - scale if part[i] >= float32(0) else part[i] + scale
        for i in range(part.size, (part.size + 7) // 8 * 8):
            signs[i] = 0
        packed = bits[start // 8 : start // 8 + (part.size + 7) // 8]
        for i in range(packed.size):
            packed[i] = (words[i] * _GATHER) >> uint64(56)


@njit(**_PLAIN)
def _add_signs(bits, scale, out):
    whole = out.size // 8
    for i in range(whole):
        for j in range(8):
            out[8 * i + j] += scale if (bits[i] >> j) & 1 else -scale
    for i in range(8 * whole, out.size):
        out[i] += scale if (bits[i // 8] >> (i % 8)) & 1 else -scale


# ---- statistics of buckets -------------------------------------------------------------------------------------------


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


@njit(**_PLAIN)
def _largest_magnitudes(bits, size, found):
    for bucket in range(found.size):
        part = bits[bucket * size : (bucket + 1) * size]
        largest = int32(0)
        for i in range(part.size):
            largest = max(largest, part[i] & int32(_MAGNITUDE))
        found[bucket] = largest


@njit(**_PLAIN)
def _ranges(bits, size, found):
    for bucket in range(found.shape[0]):
        part = bits[bucket * size : (bucket + 1) * size]
        least, largest = int32(_MAGNITUDE), int32(-_MAGNITUDE - 1)
        for i in range(part.size):
            key = part[i] ^ ((part[i] >> int32(31)) & int32(_MAGNITUDE))  # rises with the value
            least, largest = min(least, key), max(largest, key)
        found[bucket, 0] = least ^ ((least >> int32(31)) & int32(_MAGNITUDE))
        found[bucket, 1] = largest ^ ((largest >> int32(31)) & int32(_MAGNITUDE))


@njit(**_SUMS)
def _lengths(v, size, found):
    for bucket in range(found.size):
        part = v[bucket * size : (bucket + 1) * size]
        squares = 0.0
        for i in range(part.size):
            squares += float64(part[i]) * float64(part[i])
        found[bucket] = np.sqrt(squares)


@njit(**_SUMS)
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


# ---- levels ----------------------------------------------------------------------------------------------------------


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


@njit(**_SUMS)
def _share_from(v, bound, share):
    """Sum of ``share`` of the magnitudes from ``bound`` on."""
    total = float32(0)
    for i in range(v.size):
        total += abs(v[i]) * share if abs(v[i]) >= bound else float32(0)
    return total


@njit(**_PLAIN)
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


@njit(**_PLAIN)
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


@njit(**_PLAIN)
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


@njit(**_PLAIN)
def _count_at(counts, position):
    b = min(int64(position), counts.size - 2)
    return counts[b] + (position - b) * (counts[b + 1] - counts[b])


@njit(**_PLAIN)
def _sum_at(counts, sums, position):
    b = min(int64(position), counts.size - 2)
    share = position - b
    return sums[b] + share * (counts[b + 1] - counts[b]) * (b + 0.5 * share)


# ---- codes -----------------------------------------------------------------------------------------------------------


def round_randomly(flat: Tensor, table: Tensor, size: int, key: int, residual: bool) -> Tensor:
    """Return the code of each value's level, drawn with ``key``; with ``residual``, leave ``v - level`` in ``flat``."""
    codes = torch.empty(flat.numel(), dtype=torch.uint8)
    _round_randomly(flat.numpy(), table.contiguous().numpy(), size, np.uint64(key), codes.numpy(), residual)
    return codes


def encode_binary(flat: Tensor, size: int, residual: bool) -> tuple[Tensor, Tensor]:
    """Return BinGrad-b's levels, shape ``(buckets, 2)``, and codes, with each bucket's mean as threshold."""
    levels = torch.empty(-(-flat.numel() // size), 2, dtype=torch.float32)
    codes = torch.empty(flat.numel(), dtype=torch.uint8)
    _encode_binary(flat.numpy(), size, levels.numpy(), codes.numpy(), residual)
    return levels, codes


def add_levels_(codes: Tensor, table: Tensor, size: int, out: Tensor) -> None:
    """Add to ``out`` the level of its bucket that each code names."""
    table = table.contiguous()
    _add_levels(codes.numpy(), table.numpy(), size, out.numpy())


@njit(inline="always", **_PLAIN)
def _uniform(key, i):
    z = key + (uint64(i) + uint64(1)) * _GOLDEN
    z = (z ^ (z >> uint64(30))) * _MIX1
    z = (z ^ (z >> uint64(27))) * _MIX2
    z = z ^ (z >> uint64(31))
    return float32(int32(z >> uint64(40))) * float32(2.0**-24)


@njit(**_PLAIN)
def _round_randomly(v, table, size, key, codes, residual):
    half = float32(0.5)  # the whole width of a cell can overflow
    low, high = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for bucket in range(table.shape[0]):
        levels = table[bucket]
        stop = min((bucket + 1) * size, v.size)
        for start in range(bucket * size, stop, _BLOCK):
            part = v[start : min(start + _BLOCK, stop)]
            code = codes[start : start + part.size]
            for i in range(part.size):
                low[i], high[i], code[i] = levels[0], levels[1], 0
            for k in range(1, levels.size - 1):
                a, c = levels[k], levels[k + 1]
                for i in range(part.size):
                    above = part[i] >= a
                    code[i] += uint8(above)
                    low[i] = a if above else low[i]
                    high[i] = c if above else high[i]
            for i in range(part.size):
                width = high[i] * half - low[i] * half
                up = _uniform(key, start + i) * width < part[i] * half - low[i] * half
                code[i] += uint8(up)
                low[i] = high[i] if up else low[i]
            if residual:
                for i in range(part.size):
                    part[i] -= low[i]


@njit(**_SUMS)
def _mean(v):
    total = 0.0
    for x in v:
        total += float64(x)
    return total / v.size


@njit(**_SUMS)
def _upper(v, threshold):
    """Number and sum of the values from the threshold on."""
    count, total = 0, 0.0
    for x in v:
        count += int64(x >= threshold)
        total += float64(x) if x >= threshold else 0.0
    return count, total


@njit(**_PLAIN)
def _encode_binary(v, size, levels, codes, residual):
    for bucket in range(levels.shape[0]):
        part = v[bucket * size : (bucket + 1) * size]
        code = codes[bucket * size : bucket * size + part.size]
        mean = _mean(part)
        threshold = float32(mean)
        count, total = _upper(part, threshold)
        if count == 0 or count == part.size or not abs(mean) < np.inf:
            low = high = threshold
        else:
            low, high = float32((mean * part.size - total) / (part.size - count)), float32(total / count)
        levels[bucket, 0], levels[bucket, 1] = low, high
        for i in range(part.size):
            code[i] = part[i] >= threshold
        if residual:
            for i in range(part.size):
                part[i] -= high if part[i] >= threshold else low


@njit(**_PLAIN)
def _add_levels(codes, table, size, out):
    for bucket in range(table.shape[0]):
        levels = table[bucket]
        part = out[bucket * size : (bucket + 1) * size]
        code = codes[bucket * size : bucket * size + part.size]
        if levels.size == 2:
            low, high = levels[0], levels[1]
            for i in range(part.size):
                part[i] += high if code[i] else low
        elif levels.size == 3:  # a choice is a vector instruction, a look-up is not
            low, middle, high = levels[0], levels[1], levels[2]
            for i in range(part.size):
                part[i] += low if code[i] == 0 else (middle if code[i] == 1 else high)
        else:
            for i in range(part.size):
                part[i] += levels[code[i]]


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(codes: Tensor, symbols: int) -> Tensor:
    """Pack codes as :func:`lightning_distopt.compressors.codes.pack_codes` does."""
    nbytes = packed_bytes(codes.numel(), symbols)
    group = 5 if symbols == 3 else 8
    if codes.numel() % group:
        codes = torch.nn.functional.pad(codes, (0, group - codes.numel() % group))
    bits = bits_per_code(symbols)
    out = torch.empty(codes.numel() // 5 if symbols == 3 else codes.numel() // 8 * bits, dtype=torch.uint8)
    if symbols == 3:
        _pack_trits(codes.numpy(), out.numpy())
    elif bits == 3:
        _pack_three_bits(codes.numpy().view(np.uint64), out.numpy())
    else:
        _pack_bits(codes.numpy(), bits, out.numpy())
    return out[:nbytes]


def unpack(packed: Tensor, numel: int, symbols: int) -> Tensor:
    """Unpack codes as :func:`lightning_distopt.compressors.codes.unpack_codes` does."""
    codes = torch.empty(numel, dtype=torch.uint8)
    assert packed.numel() == packed_bytes(numel, symbols)
    if symbols == 3:
        _unpack_trits(packed.numpy(), codes.numpy())
    elif bits_per_code(symbols) == 3:
        _unpack_three_bits(packed.numpy(), codes.numpy())
    else:
        _unpack_bits(packed.numpy(), bits_per_code(symbols), codes.numpy())
    return codes


@njit(**_PLAIN)
def _pack_trits(codes, out):
    for i in range(out.size):
        out[i] = (
            codes[5 * i] + 3 * codes[5 * i + 1] + 9 * codes[5 * i + 2] + 27 * codes[5 * i + 3] + 81 * codes[5 * i + 4]
        )


@njit(**_PLAIN)
def _unpack_trits(packed, codes):
    whole = codes.size // 5
    for i in range(whole):
        rest = uint32(packed[i])
        for j in range(5):
            third = (rest * uint32(171)) >> uint32(9)  # rest // 3 of a byte
            codes[5 * i + j] = rest - uint32(3) * third
            rest = third
    for i in range(5 * whole, codes.size):
        codes[i] = packed[i // 5] // (1, 3, 9, 27, 81)[i % 5] % 3


@njit(**_PLAIN)
def _pack_three_bits(words, out):
    for i in range(words.size):  # fold eight 3-bit bytes into 24 bits, by pairs
        x = words[i]
        x = (x | (x >> uint64(5))) & uint64(0x003F003F003F003F)
        x = (x | (x >> uint64(10))) & uint64(0x00000FFF00000FFF)
        x = x | (x >> uint64(20))
        out[3 * i] = x & uint64(255)
        out[3 * i + 1] = (x >> uint64(8)) & uint64(255)
        out[3 * i + 2] = (x >> uint64(16)) & uint64(255)


@njit(**_PLAIN)
def _unpack_three_bits(packed, codes):
    whole = codes.size // 8
    for i in range(whole):
        word = uint32(packed[3 * i]) | uint32(packed[3 * i + 1]) << uint32(8) | uint32(packed[3 * i + 2]) << uint32(16)
        for j in range(8):
            codes[8 * i + j] = (word >> uint32(3 * j)) & uint32(7)
    for i in range(8 * whole, codes.size):
        word = uint32(0)
        for j in range(3 * whole, packed.size):
            word |= uint32(packed[j]) << uint32(8 * (j - 3 * whole))
        codes[i] = (word >> uint32(3 * (i - 8 * whole))) & uint32(7)


@njit(**_PLAIN)
def _pack_bits(codes, bits, out):
    if bits == 1:
        words = codes.view(np.uint64)
        for i in range(out.size):
            out[i] = (words[i] * _GATHER) >> uint64(56)
    elif bits == 4:
        for i in range(out.size):
            out[i] = codes[2 * i] | (codes[2 * i + 1] << 4)
    else:
        for i in range(codes.size // 8):
            word = uint64(0)
            for j in range(8):
                word |= uint64(codes[8 * i + j]) << uint64(bits * j)
            for j in range(bits):
                out[bits * i + j] = (word >> uint64(8 * j)) & uint64(255)


@njit(**_PLAIN)
def _unpack_bits(packed, bits, codes):
    whole = codes.size // 8
    if bits == 1:
        for i in range(whole):
            for j in range(8):
                codes[8 * i + j] = (packed[i] >> j) & 1
    elif bits == 4:
        for i in range(4 * whole):
            codes[2 * i] = packed[i] & 15
            codes[2 * i + 1] = packed[i] >> 4
    else:
        _unpack_words(packed, bits, codes, 0, whole)
    _unpack_words(packed, bits, codes, whole, (codes.size + 7) // 8)


@njit(**_PLAIN)
def _unpack_words(packed, bits, codes, first, last):
    mask = uint64((1 << bits) - 1)
    for i in range(first, last):
        word = uint64(0)
        for j in range(min(bits, packed.size - bits * i)):
            word |= uint64(packed[bits * i + j]) << uint64(8 * j)
        for j in range(min(8, codes.size - 8 * i)):
            codes[8 * i + j] = (word >> uint64(bits * j)) & mask


# ---- the largest entries ---------------------------------------------------------------------------------------------

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


@njit(**_PLAIN)
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
            sample[8 * run + j] = bits[8 * (run * _SAMPLE + jump) + j] & int32(_MAGNITUDE)
    expected = k * sample.size / bits.size
    rank = int64(expected + 4 * np.sqrt(expected) + 1)
    return int32(0) if rank >= sample.size else _kth_largest(sample, rank)


@njit(**_PLAIN)
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


@njit(**_PLAIN)
def _survivors(bits, bound, k):
    """Return the places of magnitudes from ``bound`` on, ascending."""
    size = 32
    found = np.empty(min(bits.size, 4 * k + 1024) if bound > 0 else bits.size, np.int32)
    n = 0
    for start in range(0, bits.size, size):
        part = bits[start : start + size]
        inside = int32(0)
        for i in range(part.size):
            inside += int32((part[i] & int32(_MAGNITUDE)) >= bound)
        if inside:
            if n + inside > found.size:  # the sample misled: let the caller look at all
                return found[:0]
            for i in range(part.size):
                if (part[i] & int32(_MAGNITUDE)) >= bound:
                    found[n] = start + i
                    n += 1
    return found[:n]


@njit(**_PLAIN)
def _largest_of(bits, survivors, places):
    magnitudes = np.empty(survivors.size, np.int32)
    for i in range(survivors.size):
        magnitudes[i] = bits[survivors[i]] & int32(_MAGNITUDE)
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


@njit(**_PLAIN)
def _scatter_add(out, places, values, alpha):
    for i in range(places.size):
        out[uint32(places[i])] += alpha * values[i]  # unsigned: no look at whether an index counts from the end
