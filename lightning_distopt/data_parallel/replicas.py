"""Replicas start alike and know it: agreement checks and broadcasts from rank 0."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.errors import RankMismatchError
from lightning_distopt.exchange import Meter

__all__ = ["broadcast_", "check_alike"]


def check_alike(
    lines: Sequence[str],
    meter: Meter,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    doing: str = "",
) -> None:
    """Raise on all ranks unless all ranks describe the same parameters.

    Args:
        lines: one line a parameter: name, shape, dtype, owner.
        meter: counts what travels.
        device: where collectives take their tensors.
        group: process group; the default one if ``None``.
        doing: what the ranks are about to do with the parameters; must be the same, too.

    Raises:
        RankMismatchError: naming the ranks that differ from rank 0.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    table = torch.zeros(world, 2, dtype=torch.int64, device=device)
    table[rank] = torch.tensor([zlib.crc32("\n".join([*lines, doing]).encode()), len(lines)])
    dist.all_reduce(table, group=group)
    meter.all_reduce("setup", table.nbytes, world)
    checksums, counts = table.t().tolist()
    odd = [r for r in range(world) if checksums[r] != checksums[0]]
    if odd:
        raise RankMismatchError(
            f"All ranks must train the same parameters with the same optimizers: ranks {odd} differ from rank 0 (number of "
            f"parameters by rank: {counts}). Build, freeze and unfreeze the model alike on every rank, step the same optimizers "
            "in the same batches, and install the same extras (numba or none) everywhere."
        )


def broadcast_(tensors: Iterable[Tensor], meter: Meter, purpose: str, group: dist.ProcessGroup | None = None) -> int:
    """Overwrite tensors by rank 0's, one message a dtype and device; return the bytes that this rank sent."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        return 0
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    before = meter.sent[purpose]
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        with meter.timed("exchange"):
            dist.broadcast(flat, 0, group=group)
        meter.broadcast(purpose, flat.nbytes, world, rank)
        if rank:
            for tensor, values in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                tensor.copy_(values.view(tensor.shape))
    return meter.sent[purpose] - before
