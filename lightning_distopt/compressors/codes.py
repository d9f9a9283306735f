"""Codes of a few symbols, packed: 1 bit, 5 three-valued codes a byte, or ``ceil(log2(symbols))`` bits an element.

=======  ============  =================
symbols  bits          packed as
=======  ============  =================
2        1             8 a byte
3        1.6           5 a byte (3**5 = 243)
5 to 8   3             8 in 3 bytes
9 to 16  4             8 in 4 bytes
17 ...   5 to 8        8 in as many bytes
=======  ============  =================
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["alignment", "bits_per_code", "pack_codes", "packed_bytes", "unpack_codes"]

_TRITS = 5  # three-valued codes in a byte
_PART = 40 * (1 << 13)  # elements unpacked at once: whole bytes in every format, small temporaries


def bits_per_code(symbols: int) -> int:
    """Return the whole bits of a code; three symbols, at 1.6 bits, are packed another way."""
    return max(1, (symbols - 1).bit_length())


def alignment(symbols: int) -> int:
    """Return the number of codes that fill whole bytes: payloads are cut at multiples of it."""
    return _TRITS if symbols == 3 else 8


def packed_bytes(numel: int, symbols: int) -> int:
    """Return the bytes of ``numel`` packed codes."""
    return -(-numel // _TRITS) if symbols == 3 else -(-numel * bits_per_code(symbols) // 8)


def pack_codes(codes: Tensor, symbols: int) -> Tensor:
    """Pack uint8 codes below ``symbols``, shape ``(n,)``, into uint8 of shape ``(packed_bytes(n, symbols),)``.

    Code ``i`` of a byte of five has weight ``3**i``; otherwise it takes bits ``b i`` to ``b (i + 1)`` of eight codes' word,
    low bits first. Padding is 0.
    """
    parts = [_pack(part, symbols) for part in torch.split(codes, _PART)]
    return torch.cat(parts)[: packed_bytes(codes.numel(), symbols)]


def _pack(codes: Tensor, symbols: int) -> Tensor:
    group = alignment(symbols)
    if codes.numel() % group:
        codes = torch.nn.functional.pad(codes, (0, group - codes.numel() % group))
    groups = codes.view(-1, group)
    if symbols == 3:
        return (groups * _weights(codes.device)).sum(1, dtype=torch.uint8)
    bits = bits_per_code(symbols)
    words = (groups.long() << (bits * torch.arange(8, device=codes.device))).sum(1)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)


def unpack_codes(packed: Tensor, numel: int, symbols: int) -> Tensor:
    """Return the first ``numel`` codes of ``packed`` as uint8, shape ``(numel,)``."""
    if symbols == 3:
        return _trits(packed.device)[packed.int()].view(-1)[:numel]
    bits = bits_per_code(symbols)
    packed = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.nn.functional.pad(packed, (0, 8 - bits)).view(-1).view(torch.int64)
    shifts = bits * torch.arange(8, device=packed.device)
    return ((words.unsqueeze(1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).view(-1)[:numel]


@cache
def _weights(device: torch.device) -> Tensor:
    return torch.tensor([3**i for i in range(_TRITS)], dtype=torch.uint8, device=device)


@cache
def _trits(device: torch.device) -> Tensor:
    """The five codes of every byte; bytes from 243 on are never written and decode to what their remainders say."""
    every = torch.arange(256, device=device)
    return torch.stack([every // 3**i % 3 for i in range(_TRITS)], 1).to(torch.uint8)
