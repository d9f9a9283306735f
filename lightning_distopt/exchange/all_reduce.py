"""All-reduce of payloads that can be summed: the cost does not grow with the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Payload
from lightning_distopt.compressors.dense import Dense
from lightning_distopt.exchange.base import Exchange, Means
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

    def mean(
        self,
        names: Sequence[str],
        payloads: Sequence[Payload],
        step: int,
        onto: Sequence[Tensor] | None = None,
        alpha: float = 1.0,
    ) -> Means:
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
        with self.meter.timed("encode"):
            fields = torch.split(total, [value.numel() for value in values])
            scale = shrink / self.world
            if onto is None and isinstance(self.compressor, Dense):  # the field is the tensor: no second buffer
                return [field.to(payload.dtype).mul_(scale) for field, payload in zip(fields, payloads, strict=True)]
            out = self.targets(payloads, onto)
            for payload, target, field in zip(payloads, out, fields, strict=True):
                self.add_decoded({"values": field}, payload, target, scale if onto is None else scale * alpha)
            return out
