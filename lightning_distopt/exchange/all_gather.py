"""All-gather of payloads: every rank decodes every payload, so the cost grows with the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from lightning_distopt.compressors.base import Payload
from lightning_distopt.exchange.base import Arrived, Arriving, Exchange, Piece, device_of
from lightning_distopt.exchange.wire import Wire

__all__ = ["AllGatherExchange"]


class AllGatherExchange(Exchange):
    """Gathers all payloads and sums the decoded ones in rank order: ``n (W - 1)`` bytes a rank.

    One collective, the lowest latency; the best choice up to about eight ranks.
    """

    def gather(self, names: Sequence[str], payloads: Sequence[Payload], step: int) -> Arriving:
        wire = Wire([self.compressor.layout(payload.numel, payload.dtype) for payload in payloads])
        mine = wire.pack(payloads, device_of(payloads))
        likes = [Payload({}, payload.shape, payload.dtype, payload.key) for payload in payloads]
        everyones, work = mine, None
        if self.world > 1:
            everyones = torch.empty(self.world * wire.nbytes, dtype=torch.uint8, device=mine.device)
            work = dist.all_gather_into_tensor(everyones, mine, group=self.group, async_op=True)
            self.meter.all_gather("exchange", wire.nbytes, self.world)
        yield
        self.wait(work, names, step)
        received = [wire.unpack(data) for data in everyones.view(self.world, wire.nbytes)]
        return Arrived(
            [  # tensor after tensor, for the cache, and in each in rank order: the same sums on every rank
                Piece(self.compressor, replace(like, fields=theirs[tensor]), tensor, 0, 1.0 / self.world)
                for tensor, like in enumerate(likes)
                for theirs in received
            ]
        )
