"""No compression at all: every element in the tensor's own dtype, whatever that is."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Field, Payload

__all__ = ["Exact"]


class Exact(Compressor):
    """Every element in the tensor's own dtype, without a copy: the payload is the tensor's memory.

    So there is no residual to leave in it, and a caller may not touch the tensor while the payload is in use.
    """

    unbiased = True
    contractive = True
    linear = True
    per_tensor = False

    def layout(self, numel: int, dtype: torch.dtype, entries: int | None = None) -> tuple[Field, ...]:
        return (Field("values", dtype, numel),)

    def _encode(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        return {"values": flat}

    def _encode_(self, flat: Tensor, key: int) -> dict[str, Tensor]:
        values = flat.clone()
        flat.zero_()
        return {"values": values}

    def _decode_add_(self, fields: dict[str, Tensor], key: int, out: Tensor, alpha: float) -> None:
        out.add_(fields["values"], alpha=alpha)

    def split(self, payload: Payload, bounds: list[int]) -> list[Payload]:
        values = payload.fields["values"]
        return [Payload({"values": values[a:b]}, torch.Size([b - a]), payload.dtype) for a, b in pairwise(bounds)]
