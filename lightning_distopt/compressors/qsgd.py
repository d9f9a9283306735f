"""QSGD: unbiased random rounding to even levels between minus and plus the bucket's norm.

Source: arXiv:1610.02132.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distopt.compressors.base import fractions
from lightning_distopt.compressors.quantizer import RandomRounding, check_levels

__all__ = ["QSGD"]

Norm = Literal["linf", "l2"]


class QSGD(RandomRounding):
    """Round at random to ``N * (-1, ..., -1/q, 0, 1/q, ..., 1)`` with ``q = (levels - 1) / 2`` and ``N`` a norm of the bucket.

    ``E[C(v)] = v``. The norm is "linf" (the largest magnitude; errs less) or "l2" (the paper's bound; most codes are zero).

    Payload: one float a bucket; 1.6 bits an element for 3 levels, 3 for 5, 4 for 9, 8 for 255.

    Args:
        levels: an odd number from 3 to 255.
        norm: "linf" or "l2".
        bucket_size: elements that share a norm; ``None`` is all of a tensor.
        clip: clip to this many standard deviations first, which is biased but errs less; ``None`` does not.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self, levels: int = 5, norm: Norm = "linf", bucket_size: int | None = 2048, clip: float | None = None
    ) -> None:
        if norm not in get_args(Norm):
            raise ValueError(f"`norm` must be one of 'linf', 'l2': got {norm!r}. 'linf' errs less.")
        super().__init__(check_levels(levels, tuple(range(3, 256, 2))), 1, bucket_size, clip)
        self.norm: Norm = norm
        self.unbiased = clip is None

    def _side(self, rows: Tensor) -> Tensor:
        if self.norm == "linf":
            return rows.abs().amax(1, keepdim=True)
        parts, largest = fractions(rows)
        norm = parts.square().sum(1, keepdim=True).sqrt() * largest
        # At least the largest magnitude, whatever the sum's rounding, so that no value lies outside.
        return norm.clamp(max=torch.finfo(rows.dtype).max).to(rows.dtype).maximum(largest.to(rows.dtype))

    def _compiled_side(self, kernels: ModuleType, flat: Tensor, size: int, limits: Tensor | None) -> Tensor | None:
        largest: Tensor = kernels.largest_magnitudes(flat, size)[:, None]
        if limits is not None:
            largest = torch.minimum(largest, limits)
        if self.norm == "linf":
            return largest
        if limits is not None:
            return None  # the length of clipped values: plain torch
        lengths = kernels.lengths(flat, size)[:, None].clamp(max=torch.finfo(torch.float32).max).float()
        return torch.where(largest.isfinite(), torch.maximum(lengths, largest), largest)

    def _table(self, side: Tensor) -> Tensor:
        return even_levels(self.symbols, side) * side

    def __repr__(self) -> str:
        return f"QSGD(levels={self.symbols}, norm={self.norm!r}, bucket_size={self.bucket_size}, clip={self.clip})"


def even_levels(symbols: int, like: Tensor) -> Tensor:
    """Return ``symbols`` numbers from -1 to 1, exactly symmetric."""
    half = symbols // 2
    return torch.arange(-half, half + 1, device=like.device).to(like.dtype) / half
