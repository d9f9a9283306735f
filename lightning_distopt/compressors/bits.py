"""One bit per element, really packed: element ``i`` is bit ``i % 8`` of byte ``i // 8``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["add_signs_", "pack_bits", "unpack_bits"]

# Long tensors are unpacked in parts that stay in the processor's cache, and whose temporaries are small: 1 MB of float32.
_PART = 1 << 18

# Eight 0/1 bytes read as one little-endian int64, times this, leave their eight bits in the top byte.
_GATHER = 0x0102040810204080


def pack_bits(bits: Tensor) -> Tensor:
    """Pack a boolean tensor of shape ``(n,)`` into uint8 of shape ``(ceil(n / 8),)``; the padding bits are 0."""
    n = bits.numel()
    if n % 8:
        bits = torch.nn.functional.pad(bits, (0, 8 - n % 8))
    bits = bits.contiguous()
    if bits.storage_offset() % 8:
        bits = bits.clone()
    words = bits.view(torch.uint8).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Return the first ``numel`` bits of ``packed`` as a boolean tensor of shape ``(numel,)``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & 1).view(-1)[:numel].bool()


def add_signs_(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """Add ``scale`` where the bit is set and ``-scale`` elsewhere to the 1-D tensor ``out``: one look-up a byte.

    Args:
        packed: uint8, shape ``(ceil(n / 8),)``.
        scale: one element of ``out``'s dtype.
        out: shape ``(n,)``.
    """
    table = torch.where(_all_bytes(packed.device), scale, -scale).view(256, 8)
    for start in range(0, out.numel(), _PART):
        part = out[start : start + _PART]
        signs = table[packed[start // 8 : (start + part.numel() + 7) // 8].int()]
        part.add_(signs.view(-1)[: part.numel()])


@cache
def _all_bytes(device: torch.device) -> Tensor:
    """The bits of all 256 bytes, in order."""
    return unpack_bits(torch.arange(256, dtype=torch.uint8, device=device), 2048)
