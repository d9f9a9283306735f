"""Random block sparsification with a shared seed: one contiguous block of each tensor, the same on every rank.

Source: arXiv:2004.05298 version 3 (URSB, "uniform random sparsification of blocks"), values unscaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Field, check_ratio, kept
from lightning_distopt.compressors.randomness import hash64

__all__ = ["RandomBlock"]


class RandomBlock(Compressor):
    """Keep ``k = max(1, int(n * ratio))`` consecutive elements from a random start, wrapping round the end.

    ``C(v)_i = v_i`` inside the block, else 0, unscaled, so it is biased and contractive:
    ``E|v - C(v)|² = (1 - k/n)|v|²`` over the uniform start. All ranks draw the same block, so payloads can be summed:
    all-reduce, no places on the wire.

    Payload: k values in the tensor's dtype.

    Args:
        ratio: fraction kept, in (0, 1]; 1/64 is the papers' "ratio 64".

    Raises:
        ValueError: if ``ratio`` is outside (0, 1].
    """

    contractive = True
    linear = True
    shared_randomness = True
    splittable = False  # nothing gained: all-reduce already costs twice the payload on any number of ranks
    random = True

    def __init__(self, ratio: float = 0.01) -> None:
        self.ratio = check_ratio(ratio)

    def layout(self, numel: int, dtype: torch.dtype, entries: int | None = None) -> tuple[Field, ...]:
        return (Field("values", dtype, kept(numel, self.ratio)),)

    def _encode(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        head, tail = _block(flat, kept(flat.numel(), self.ratio), key)
        values = torch.cat((head, tail))
        if flat.numel():
            # A NaN or Inf outside the block must not be hidden: 0 times an extreme is 0 for finite input, else NaN.
            least, largest = torch.aminmax(flat)
            values += 0.0 * least + 0.0 * largest
        return {"values": values}

    def _decode_add_(self, fields: dict[str, Tensor], key: int, out: Tensor, alpha: float) -> None:
        values = fields["values"].to(out.dtype)
        head, tail = _block(out, values.numel(), key)
        head.add_(values[: head.numel()], alpha=alpha)
        tail.add_(values[head.numel() :], alpha=alpha)

    def __repr__(self) -> str:
        return f"RandomBlock(ratio={self.ratio})"


def _block(flat: Tensor, k: int, key: int) -> tuple[Tensor, Tensor]:
    """Return views of the block's two parts: up to the end of ``flat``, and what wraps to its beginning."""
    n = flat.numel()
    start = hash64(key, 0) % n if n else 0
    return flat[start : start + k], flat[: max(0, start + k - n)]
