"""ORQ, optimal random quantisation: levels that make the error of unbiased random rounding least.

Source: arXiv:2002.11082. That the paper's search is this greedy halving is our reading; see docs/compressors.md.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lightning_distopt.compressors.base import fractions
from lightning_distopt.compressors.quantizer import RandomRounding, check_levels

__all__ = ["ORQ"]


class ORQ(RandomRounding):
    """Round at random to levels that satisfy the optimal condition, bucket by bucket.

    The outer levels are the bucket's minimum and maximum. Each level ``b`` between ``a`` and ``c`` is placed where

        ``#{v in [b, c]} = sum over v in [a, c] of (v - a) / (c - a)``,

    the number that would round up to ``c`` if ``b`` did not exist, which minimises the variance of the rounding: first
    the middle level, then the middle of each half, and so on. With 3 levels and a large symmetric bucket this is close to
    TernGrad; the gain comes with more levels, heavy tails and small buckets.

    Payload: ``levels`` floats a bucket; 1.6, 3 or 4 bits an element: 19x, 10x or 8x smaller than float32.

    Args:
        levels: 3, 5 or 9.
        bucket_size: elements that share levels.
        clip: clip to this many standard deviations first, which is biased but errs less; ``None`` does not.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(self, levels: int = 5, bucket_size: int | None = 2048, clip: float | None = None) -> None:
        super().__init__(check_levels(levels, (3, 5, 9)), levels, bucket_size, clip)
        self.unbiased = clip is None

    def _side(self, rows: Tensor) -> Tensor:
        return optimal_levels(rows, self.symbols)

    def _compiled_side(self, kernels: ModuleType, flat: Tensor, size: int, limits: Tensor | None) -> Tensor | None:
        levels: Tensor = kernels.optimal_levels(flat, size, self.symbols, limits)
        return levels

    def _table(self, side: Tensor) -> Tensor:
        return side

    def __repr__(self) -> str:
        return f"ORQ(levels={self.symbols}, bucket_size={self.bucket_size}, clip={self.clip})"


def optimal_levels(rows: Tensor, symbols: int) -> Tensor:
    """Return ``symbols = 2**L + 1`` ascending levels of each row, shape ``(buckets, symbols)``, by sorting."""
    buckets, size = rows.shape
    values = rows.sort(1).values
    parts, _ = fractions(values)
    sums = torch.nn.functional.pad(parts.cumsum(1), (1, 0))  # sums[i] = parts[0] + ... + parts[i - 1]
    levels = rows.new_empty(buckets, symbols)
    levels[:, 0], levels[:, -1] = values[:, 0], values[:, -1]
    # Of each level: how many values lie before it, and which value it is (the same, but for the last).
    places = torch.zeros(buckets, symbols, dtype=torch.int64, device=rows.device)
    places[:, -1] = size
    step = symbols - 1
    while step > 1:
        half = step // 2
        for k in range(half, symbols - 1, step):
            lo, hi = places[:, k - half, None], places[:, k + half, None]
            a, c = parts.gather(1, lo), parts.gather(1, hi.clamp(max=size - 1))
            # Between equal neighbours, or with nothing between them, a level is theirs.
            up = (sums.gather(1, hi) - sums.gather(1, lo) - (hi - lo) * a) / (c - a)  # expected number rounded up to c
            place = (hi - up.nan_to_num(0.0).ceil().long()).minimum(hi - 1).maximum(lo)
            places[:, k] = torch.where(c > a, place, lo)[:, 0]
            levels[:, k] = values.gather(1, places[:, k, None])[:, 0]
        step = half
    return levels
