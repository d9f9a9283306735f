"""BinGrad-b: two levels, each the mean of the values that it stands for.

Source: arXiv:2002.11082. Which threshold the paper takes is not known to us, so three are offered.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distopt.compressors.base import fractions
from lightning_distopt.compressors.quantizer import Quantizer

__all__ = ["BinGradB"]

Threshold = Literal["mean", "exact", "lloyd"]
_LLOYD_ITERATIONS = 20


class BinGradB(Quantizer):
    """Send the mean of a bucket's values from a threshold on for each of them, and the mean of the others for those.

    ``C(v) = b+ if v >= b0 else b-``. For every threshold the means are kept (``sum C(v) = sum v``), the error is orthogonal
    to what is sent, and ``|v - C(v)|² = |v|² - |C(v)|²``: contractive. The best threshold is ``b0 = (b- + b+) / 2``.

    Payload: two floats a bucket and 1 bit an element: 31x smaller than float32 with buckets of 2048.

    Args:
        bucket_size: elements that share levels; ``None`` is all of a tensor.
        threshold: "mean" of the bucket (one pass), "exact" (the best split, by sorting), or "lloyd" (from the mean, at most
            20 steps of ``b0 = (b- + b+) / 2``; may stop at a worse split than the best).

    Raises:
        ValueError: if an argument is outside its range.
    """

    contractive = True

    def __init__(self, bucket_size: int | None = 2048, threshold: Threshold = "mean") -> None:
        if threshold not in get_args(Threshold):
            raise ValueError(f"`threshold` must be one of 'mean', 'exact', 'lloyd': got {threshold!r}. 'mean' is fast.")
        super().__init__(2, 2, bucket_size)
        self.threshold: Threshold = threshold

    def _quantize(self, rows: Tensor, dtype: torch.dtype, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        b0 = {"mean": _mean, "exact": _best_split, "lloyd": _lloyd}[self.threshold](rows)
        high = rows >= b0
        return self._settle(side_means(rows, high), rows, dtype), high.to(torch.uint8)

    def _compiled(self, kernels: ModuleType, flat: Tensor, key: int, residual: bool) -> dict[str, Tensor] | None:
        if self.threshold != "mean":
            return None
        levels, codes = kernels.encode_binary(flat, self.bucket_size or flat.numel(), residual)
        return {"levels": levels.view(-1), "codes": kernels.pack(codes, 2)}

    def _table(self, side: Tensor) -> Tensor:
        return side

    def __repr__(self) -> str:
        return f"BinGradB(bucket_size={self.bucket_size}, threshold={self.threshold!r})"


def side_means(rows: Tensor, high: Tensor) -> Tensor:
    """Return the means below and from the threshold on, shape ``(buckets, 2)``; both the whole mean if a side is empty."""
    parts, largest = fractions(rows)
    count = high.sum(1)
    total, upper = parts.sum(1), (parts * high).sum(1)
    one_sided = (count == 0) | (count == rows.size(1))
    whole = total / rows.size(1)
    low_mean = torch.where(one_sided, whole, (total - upper) / (rows.size(1) - count))
    high_mean = torch.where(one_sided, whole, upper / count)
    return (torch.stack((low_mean, high_mean), 1) * largest).to(rows.dtype)


def _mean(rows: Tensor) -> Tensor:
    parts, largest = fractions(rows)
    return (parts.mean(1, keepdim=True) * largest).to(rows.dtype)


def _lloyd(rows: Tensor) -> Tensor:
    b0 = _mean(rows)
    for _ in range(_LLOYD_ITERATIONS):
        better = (side_means(rows, rows >= b0) * 0.5).sum(1, keepdim=True)
        if torch.equal(better, b0):
            break
        b0 = better
    return b0


def _best_split(rows: Tensor) -> Tensor:
    """Return the smallest value of the upper side in the split whose two means hold the most energy."""
    size = rows.size(1)
    if size == 1:
        return rows
    values = rows.sort(1).values
    parts, _ = fractions(values)
    sums = (parts - parts.mean(1, keepdim=True)).cumsum(1)[:, :-1]  # centred: no cancellation
    below = torch.arange(1, size, device=rows.device).double()
    energy = sums.square() * (1 / below + 1 / (size - below))
    return values.gather(1, energy.argmax(1, keepdim=True) + 1)
