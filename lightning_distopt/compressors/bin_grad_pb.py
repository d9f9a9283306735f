"""BinGrad-pb: two levels, unbiased between them and clipped outside, at the best place for that.

Source: arXiv:2002.11082.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lightning_distopt.compressors.base import fractions
from lightning_distopt.compressors.quantizer import RandomRounding

__all__ = ["BinGradPB"]


class BinGradPB(RandomRounding):
    """Send ``+b`` with probability ``clip((v + b) / 2b, 0, 1)``, else ``-b``: unbiased inside ``[-b, b]``, clipped outside.

    The error is least where ``b = (1/d) * sum of |v_i| over |v_i| >= b`` (the sum is divided by the size ``d`` of the bucket,
    not by the number of terms), which has one root. Half of a Gaussian's energy is left (0.454).

    Payload: one float a bucket and 1 bit an element: 31.5x smaller than float32 with buckets of 2048.

    Args:
        bucket_size: elements that share ``b``; ``None`` is all of a tensor.

    Raises:
        ValueError: if ``bucket_size`` is below 1.
    """

    contractive = True

    def __init__(self, bucket_size: int | None = 2048) -> None:
        super().__init__(2, 1, bucket_size)

    def _side(self, rows: Tensor) -> Tensor:
        return best_magnitude(rows)[:, None]

    def _compiled_side(self, kernels: ModuleType, flat: Tensor, size: int, limits: Tensor | None) -> Tensor | None:
        magnitudes: Tensor = kernels.best_magnitudes(flat, size)[:, None]
        return magnitudes

    def _table(self, side: Tensor) -> Tensor:
        return torch.cat((-side, side), 1)

    def __repr__(self) -> str:
        return f"BinGradPB(bucket_size={self.bucket_size})"


def best_magnitude(rows: Tensor) -> Tensor:
    """Return the root ``b`` of each row, shape ``(buckets,)``, by sorting."""
    parts, largest = fractions(rows)
    falling = parts.abs().sort(1, descending=True).values
    means = falling.cumsum(1) / rows.size(1)  # means[i]: of the i + 1 largest, over all
    first = (falling <= means).to(torch.uint8).argmax(1, keepdim=True)
    before = means.gather(1, (first - 1).clamp(min=0)) * (first > 0)
    return (falling.gather(1, first).maximum(before) * largest)[:, 0].to(rows.dtype)
