"""Counter-based randomness: every draw is a pure function of a 64-bit key and an element's index.

The hash is SplitMix64's finaliser (Steele, Lea, Flood 2014). It needs multiplication, xor and shifts of 64-bit integers
only, so that torch, numba and Triton give the same bits, and it keeps no state, so that a run repeats and ranks that
share a key draw alike. Not for cryptography.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

__all__ = ["derive_key", "fresh_key", "hash64", "hashes", "normals", "uniform"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def hash64(key: int, counter: int) -> int:
    """Return the 64-bit hash of element ``counter`` under ``key``: the plain-Python reference of :func:`uniform`."""
    z = (key + (counter + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def derive_key(seed: int, rank: int, step: int, tensor: str) -> int:
    """Mix where and when a draw happens into one 64-bit key.

    Args:
        seed: the run's seed.
        rank: the rank that draws; pass 0 on every rank for a compressor with ``shared_randomness``.
        step: number of the exchange, from 0.
        tensor: the tensor's name; only its CRC-32 enters.
    """
    key = seed & _MASK
    for part in (rank, step, zlib.crc32(tensor.encode())):
        key = hash64(key, part)
    return key


def fresh_key() -> int:
    """Draw a key from torch's global generator (so ``seed_everything`` decides it)."""
    high, low = torch.randint(0, 1 << 32, (2,)).tolist()
    return int(high) << 32 | int(low)


def _signed(value: int) -> int:
    """The same 64 bits as a two's-complement integer, which is what torch's int64 holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64: torch's is arithmetic, so the copies of the sign bit are masked away."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(key: int, numel: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """Return float32 uniforms in [0, 1) with 24 random bits for elements ``start`` to ``start + numel``.

    Element ``i`` has ``(hash64(key, i) >> 40) / 2**24``.
    """
    z = torch.arange(start + 1, start + numel + 1, device=device) * _signed(_GOLDEN) + _signed(key)
    return _shift_right(_mixed(z), 40).to(torch.float32) * 2.0**-24


def hashes(keys: Tensor, counters: Tensor) -> Tensor:
    """Return :func:`hash64` of keys and counters, broadcast, as int64 (the same 64 bits, two's complement)."""
    return _mixed((counters + 1) * _signed(_GOLDEN) + keys)


def normals(keys: Tensor, start: int, stop: int) -> Tensor:
    """Return float32 draws of N(0, 1), one row a key, for elements ``start`` to ``stop``; shape ``(len(keys), stop - start)``.

    Box and Muller's formula on two times 24 bits of :func:`hash64`, so every element can be drawn by itself, and an
    element is the same however it is asked for. (Logarithm and cosine may differ in the last bit between kinds of device.)

    Args:
        keys: int64, shape ``(K,)``.
        start: first element.
        stop: after the last one.
    """
    counters = torch.arange(start + 1, stop + 1, device=keys.device) * _signed(_GOLDEN)
    z = _mixed(counters + keys[:, None])
    radius = (_shift_right(z, 40) + 1).to(torch.float32).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = ((z >> 16) & 0xFFFFFF).to(torch.float32).mul_(2 * math.pi * 2.0**-24)
    return radius.mul_(angle.cos_())


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser."""
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX2)
    return z ^ _shift_right(z, 31)
