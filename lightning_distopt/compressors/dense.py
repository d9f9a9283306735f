"""Dense transfer in a chosen float format: no compression at 32 bit, the baseline at 16 bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Field, Payload, all_finite

__all__ = ["Dense"]

_PART = 1 << 18  # elements widened at once: a temporary that stays in the processor's cache

DenseDType = Literal["float32", "float16", "bfloat16"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Dense(Compressor):
    """Send every element, rounded to ``dtype``: ``C(v) = round(v)``.

    Values beyond the format's range (65,504 for float16) become the largest finite one, and the rest stays in the
    residual. Payload: ``n * itemsize`` bytes, 1x or 2x smaller than float32. ``unbiased`` holds for "float32" only:
    rounding to nearest is not unbiased. Linear; where the sum over ranks is itself taken in 16 bit (all-reduce), the
    rounding of the sum enters no residual: use ``exchange="sharded_server"`` to sum in float32.

    Args:
        dtype: format on the wire, "float32", "float16" (range 65,504, 11 bits of precision) or "bfloat16" (the range
            of float32, 8 bits of precision).

    Raises:
        ValueError: if ``dtype`` is another name.
    """

    contractive = True
    linear = True
    per_tensor = False

    def __init__(self, dtype: DenseDType = "float32") -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(map(repr, get_args(DenseDType)))}: got {dtype!r}.")
        self.dtype: DenseDType = dtype
        self.unbiased = dtype == "float32"

    def layout(self, numel: int, dtype: torch.dtype, entries: int | None = None) -> tuple[Field, ...]:
        return (Field("values", _DTYPES[self.dtype], numel),)

    def _encode(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        target = _DTYPES[self.dtype]
        values = flat.to(target, copy=True)
        # A wider format (bfloat16 of a float16 tensor) may round up to what the receiver's cast back makes infinite.
        wider = torch.finfo(target).max > torch.finfo(flat.dtype).max
        if not all_finite(values.to(flat.dtype) if wider else values):
            limit = _largest(target, flat.dtype)  # saturate what overflowed in a cast; keep what was non-finite before
            values = torch.where(flat.isfinite(), values.clamp(-limit, limit), values)
        return {"values": values}

    def _decode_add_(self, fields: dict[str, Tensor], key: int, out: Tensor, alpha: float) -> None:
        values = fields["values"]
        if values.dtype is out.dtype:
            out.add_(values, alpha=alpha)
            return
        for part, its in zip(torch.split(out, _PART), torch.split(values, _PART), strict=True):
            part.add_(its.to(out.dtype), alpha=alpha)

    def split(self, payload: Payload, bounds: list[int]) -> list[Payload]:
        values = payload.fields["values"]
        return [Payload({"values": values[a:b]}, torch.Size([b - a]), payload.dtype) for a, b in pairwise(bounds)]

    def __repr__(self) -> str:
        return f"Dense(dtype={self.dtype!r})"


def _largest(target: torch.dtype, source: torch.dtype) -> float:
    """Return the largest number of ``target`` that is finite in ``source`` too: 65,280 for float16 sent as bfloat16."""
    largest = torch.tensor(min(torch.finfo(target).max, torch.finfo(source).max), dtype=target)
    if not largest.to(source).isfinite():  # rounded up, out of the source's range
        largest = torch.nextafter(largest, torch.zeros_like(largest))
    return float(largest)
