"""All-reduce of payloads that can be summed: the cost does not grow with the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from lightning_distopt.compressors.base import Compressor, Payload
from lightning_distopt.exchange.base import Arrived, Arriving, Exchange, Piece
from lightning_distopt.exchange.meter import Meter

__all__ = ["AllReduceExchange"]


class AllReduceExchange(Exchange):
    """Sums the fields of linear payloads in their own dtype, then decodes once: ``2 n (W - 1) / W`` bytes a rank.

    For 16-bit fields the sum itself is rounded, and **that rounding enters no residual**; to sum in float32 use
    ``exchange="sharded_server"``. float16 fields are divided by a power of two, at least 2 W, before the sum: exact but
    for subnormals, and room enough that rounding cannot make the sum overflow. The others are divided after it.

    Raises:
        ValueError: if the compressor's payloads cannot be summed.
    """

    def __init__(self, compressor: Compressor, meter: Meter, group: dist.ProcessGroup | None = None) -> None:
        if not compressor.linear:
            raise ValueError(
                f"`exchange='all_reduce'` needs a compressor whose payloads can be summed: {compressor} is not linear. "
                "Use `exchange='all_gather'` (few ranks) or `'sharded_server'` (many)."
            )
        super().__init__(compressor, meter, group)

    def gather(self, names: Sequence[str], payloads: Sequence[Payload], step: int) -> Arriving:
        values = [payload.fields["values"] for payload in payloads]
        total = values[0] if len(values) == 1 else torch.cat(values)
        work: dist.Work | None = None
        shrink = 1
        if self.world > 1:
            if total.dtype is torch.float16:
                shrink = 2 << (self.world - 1).bit_length()
                total.div_(shrink)
            work = dist.all_reduce(total, group=self.group, async_op=True)
            self.meter.all_reduce("exchange", total.nbytes, self.world)
        yield
        self.wait(work, names, step)
        fields = torch.split(total, [value.numel() for value in values])
        return Arrived(
            [
                Piece(self.compressor, replace(payload, fields={"values": field}), tensor, 0, shrink / self.world)
                for tensor, (payload, field) in enumerate(zip(payloads, fields, strict=True))
            ]
        )
