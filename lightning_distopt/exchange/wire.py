"""The wire format: the fields of many payloads in one contiguous byte buffer, so that a bucket is one collective.

Fields are laid out by falling element size, so every field is aligned without a byte of padding:

    | float64 ... | float32, int32 ... | float16 ... | bytes ... |      within a size, in order of the payloads
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_distopt.compressors.base import Field, Payload

__all__ = ["Wire"]

_ALIGN = 8  # the largest element


class _Slot(NamedTuple):
    payload: int
    field: Field
    offset: int


class Wire:
    """The place of every field of a list of payloads.

    Args:
        layouts: one layout a payload, see :meth:`lightning_distopt.compressors.Compressor.layout`.
    """

    def __init__(self, layouts: Sequence[tuple[Field, ...]]) -> None:
        pairs = [(i, field) for i, layout in enumerate(layouts) for field in layout]
        pairs.sort(key=lambda pair: -pair[1].dtype.itemsize)  # stable: order within a size is kept
        self._slots: list[_Slot] = []
        offset = 0
        for i, field in pairs:
            self._slots.append(_Slot(i, field, offset))
            offset += field.numel * field.dtype.itemsize
        self._count = len(layouts)
        self.nbytes = offset

    def pack(self, payloads: Sequence[Payload], device: torch.device) -> Tensor:
        """Return one uint8 tensor of ``nbytes`` on ``device`` that holds all fields."""
        parts = [payloads[slot.payload].fields[slot.field.name].view(torch.uint8) for slot in self._slots]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)

    def unpack(self, data: Tensor) -> list[dict[str, Tensor]]:
        """Return the fields of each payload as views into ``data`` (of a copy where its memory is not aligned)."""
        if data.storage_offset() % _ALIGN or data.data_ptr() % _ALIGN:  # an empty slice has offset but no address
            data = data.clone()
        fields: list[dict[str, Tensor]] = [{} for _ in range(self._count)]
        for i, field, offset in self._slots:
            end = offset + field.numel * field.dtype.itemsize
            fields[i][field.name] = data[offset:end].view(field.dtype)
        return fields
