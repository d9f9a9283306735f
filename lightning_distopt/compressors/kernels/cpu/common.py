"""How every CPU kernel is compiled, and the numbers that they share."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BLOCK", "FUSED", "GATHER", "MAGNITUDE", "PLAIN", "SUMS"]

PLAIN: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}

# May reorder what is summed, must keep NaN and infinity.
SUMS: dict[str, Any] = {**PLAIN, "fastmath": {"reassoc", "contract", "nsz"}}

# May round a product and a sum once instead of twice, as torch does.
FUSED: dict[str, Any] = {**PLAIN, "fastmath": {"contract"}}

BLOCK = 4096  # elements that stay in the first-level cache
MAGNITUDE = (
    0x7FFFFFFF  # mask of the bits of |v|, which as integers rise with it; infinity is above all numbers, NaN above it
)
GATHER = np.uint64(0x0102040810204080)  # eight 0/1 bytes times this leave their bits in the top byte
