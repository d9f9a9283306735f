"""How far the replicas' gradients are taken from the auxiliary point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.data_parallel.buckets import Bucket
from lightning_distopt.data_parallel.server_memory import ServerMemory
from lightning_distopt.error_feedback import FlatViews
from lightning_distopt.exchange import Meter

__all__ = ["mismatch"]


def mismatch(
    buckets: Sequence[Bucket],
    server: ServerMemory,
    coefficient: float,
    meter: Meter,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Return ``mean_k |mean(e) + s - coefficient e_k|²``; a collective, counted as "diagnostics"."""
    world = server.exchange.world

    def sum_over_ranks(values: Tensor) -> Tensor:
        if world > 1:
            dist.all_reduce(values, group=group)
            meter.all_reduce("diagnostics", values.nbytes, world)
        return values

    pieces = server.pieces(buckets)
    total = 0.0
    for bucket in buckets:
        memory = FlatViews(bucket.params)
        memory.flat.copy_(bucket.residual.flat)
        for name, flat in zip(bucket.names, memory.flats, strict=True):
            for start, values in pieces.get(name, []):
                # every coordinate of s has one owner, so W of it in the sum is s in the mean
                flat[start : start + values.numel()].add_(values, alpha=world)
        mean = sum_over_ranks(memory.flat).div_(world)
        if bucket.server is not None:
            mean.add_(bucket.server.flat)
        squares = mean.sub_(bucket.residual.flat, alpha=coefficient).square_().sum(dtype=torch.float64)
        total += float(sum_over_ranks(squares)) / world
    return total
