"""One bit with the root mean square as scale, as 1-bit Adam sends its momentum.

Source: arXiv:2102.02888.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_distopt.compressors.base import fractions, wide
from lightning_distopt.compressors.kernels import kernels_for
from lightning_distopt.compressors.scaled_sign import ScaledSign

__all__ = ["OneBit"]


class OneBit(ScaledSign):
    """Send signs and the root mean square: ``C(v) = a * sgn(v)`` with ``a = |v|_2 / sqrt(n)`` and ``sgn(0) = +1``.

    Keeps the length of ``v``, and leaves ``|v - C(v)|² = 2 (1 - |v|_1 / (sqrt(n) |v|_2)) |v|²``: 0.404 of a Gaussian, but more
    than all of a tensor in which few entries dominate. So it is not contractive, and error feedback around it needs
    ``allow_noncontractive=True``; :class:`ScaledSign` costs the same and is.

    Payload: ``ceil(n / 8)`` bytes of bits and one scale a tensor.
    """

    contractive = False

    def _scale(self, flat: Tensor) -> Tensor:
        kernels = kernels_for(flat)
        if kernels is not None:
            length: Tensor = kernels.lengths(flat, flat.numel())[0]
            return length / math.sqrt(flat.numel())
        if flat.numel() == 0:
            return torch.zeros((), dtype=wide(flat.dtype), device=flat.device)
        parts, largest = fractions(flat.view(1, -1))
        return (parts.square().mean().sqrt() * largest[0, 0]).to(wide(flat.dtype))
