"""One bit per element, really packed: element ``i`` is bit ``i % 8`` of byte ``i // 8``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits"]

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
