"""Codes packed and unpacked, as ``compressors/codes.py`` defines it."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, uint32, uint64
from torch import Tensor

from lightning_distopt.compressors.codes import bits_per_code, packed_bytes
from lightning_distopt.compressors.kernels.cpu.common import GATHER, PLAIN

__all__ = ["pack", "unpack"]


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


@njit(**PLAIN)
def _pack_trits(codes, out):
    for i in range(out.size):
        out[i] = (
            codes[5 * i] + 3 * codes[5 * i + 1] + 9 * codes[5 * i + 2] + 27 * codes[5 * i + 3] + 81 * codes[5 * i + 4]
        )


@njit(**PLAIN)
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


@njit(**PLAIN)
def _pack_three_bits(words, out):
    for i in range(words.size):  # fold eight 3-bit bytes into 24 bits, by pairs
        x = words[i]
        x = (x | (x >> uint64(5))) & uint64(0x003F003F003F003F)
        x = (x | (x >> uint64(10))) & uint64(0x00000FFF00000FFF)
        x = x | (x >> uint64(20))
        out[3 * i] = x & uint64(255)
        out[3 * i + 1] = (x >> uint64(8)) & uint64(255)
        out[3 * i + 2] = (x >> uint64(16)) & uint64(255)


@njit(**PLAIN)
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


@njit(**PLAIN)
def _pack_bits(codes, bits, out):
    if bits == 1:
        words = codes.view(np.uint64)
        for i in range(out.size):
            out[i] = (words[i] * GATHER) >> uint64(56)
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


@njit(**PLAIN)
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


@njit(**PLAIN)
def _unpack_words(packed, bits, codes, first, last):
    mask = uint64((1 << bits) - 1)
    for i in range(first, last):
        word = uint64(0)
        for j in range(min(bits, packed.size - bits * i)):
            word |= uint64(packed[bits * i + j]) << uint64(8 * j)
        for j in range(min(8, codes.size - 8 * i)):
            codes[8 * i + j] = (word >> uint64(bits * j)) & mask
