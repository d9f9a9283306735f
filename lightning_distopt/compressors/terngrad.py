"""TernGrad: minus, zero or plus the largest magnitude, after clipping.

Source: arXiv:1705.07878.
"""

from __future__ import annotations

from lightning_distopt.compressors.qsgd import QSGD

__all__ = ["TernGrad"]


class TernGrad(QSGD):
    """Send ``N * sgn(v)`` with probability ``|v| / N``, else 0, with ``N`` the largest magnitude: QSGD with 3 levels.

    Values are first clipped to ``clip`` standard deviations, which makes ``N`` small and the result biased. Each tensor has
    its own ``N``.

    Payload: one float a tensor (or bucket) and 1.6 bits an element: 20x smaller than float32.

    Args:
        clip: in standard deviations; ``None`` does not clip, which is unbiased.
        bucket_size: elements that share ``N``; ``None`` is all of a tensor.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(self, clip: float | None = 2.5, bucket_size: int | None = None) -> None:
        super().__init__(3, "linf", bucket_size, clip)

    def __repr__(self) -> str:
        return f"TernGrad(clip={self.clip}, bucket_size={self.bucket_size})"
