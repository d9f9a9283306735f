"""Codes packed and unpacked, as ``compressors/codes.py`` defines it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_distopt.compressors.codes import bits_per_code, packed_bytes
from lightning_distopt.compressors.kernels.cuda.common import TILE, launch

__all__ = ["pack", "unpack"]

_GROUPS = TILE // 8  # of 5 or 8 codes, that a program packs


def pack(codes: Tensor, symbols: int) -> Tensor:
    """Pack codes as :func:`lightning_distopt.compressors.codes.pack_codes` does."""
    numel, bits, nbytes = codes.numel(), bits_per_code(symbols), packed_bytes(codes.numel(), symbols)
    out = codes.new_empty(nbytes)
    if symbols == 3:
        launch(_pack_trits, triton.cdiv(nbytes, TILE), codes, numel, out, width=TILE)
    else:
        launch(_pack_bits, triton.cdiv(numel, 8 * _GROUPS), codes, numel, out, nbytes, bits=bits, groups=_GROUPS)
    return out


def unpack(packed: Tensor, numel: int, symbols: int) -> Tensor:
    """Unpack codes as :func:`lightning_distopt.compressors.codes.unpack_codes` does."""
    assert packed.numel() == packed_bytes(numel, symbols)
    codes = packed.new_empty(numel, dtype=torch.uint8)
    bits = 0 if symbols == 3 else bits_per_code(symbols)
    launch(_unpack, triton.cdiv(numel, TILE), packed, packed.numel(), codes, numel, bits=bits, width=TILE)
    return codes


@triton.jit
def _pack_trits(codes, numel, out, width: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    word = tl.zeros([width], tl.int32)
    for j in tl.static_range(5):  # from the last, of weight 81, to the first
        code = tl.load(codes + byte * 5 + (4 - j), byte * 5 + (4 - j) < numel, other=0)
        word = word * 3 + code.to(tl.int32)
    tl.store(out + byte, word.to(tl.uint8), byte * 5 < numel)


@triton.jit
def _pack_bits(codes, numel, out, nbytes, bits: tl.constexpr, groups: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * groups + tl.arange(0, groups)
    places = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    code = tl.load(codes + places, places < numel, other=0).to(tl.int64)
    word = tl.sum(code << (tl.arange(0, 8) * bits).to(tl.int64)[None, :], 1)
    for k in tl.static_range(bits):
        byte = group * bits + k
        tl.store(out + byte, ((word >> (8 * k)) & 255).to(tl.uint8), byte < nbytes)


@triton.jit
def _unpack(packed, nbytes, codes, numel, bits: tl.constexpr, width: tl.constexpr):
    """One code an element; ``bits`` 0 stands for five codes a byte."""
    places = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    if bits == 0:
        rest = tl.load(packed + places // 5, places < numel, other=0).to(tl.int32)
        for j in tl.static_range(4):
            rest = tl.where(places % 5 > j, rest // 3, rest)
        code = rest % 3
    else:
        byte = places * bits // 8  # a code lies in this byte and perhaps the next
        first = tl.load(packed + byte, places < numel, other=0).to(tl.int32)
        second = tl.load(packed + byte + 1, (places < numel) & (byte + 1 < nbytes), other=0).to(tl.int32)
        code = ((first | (second << 8)) >> (places * bits % 8).to(tl.int32)) & ((1 << bits) - 1)
    tl.store(codes + places, code.to(tl.uint8), places < numel)
