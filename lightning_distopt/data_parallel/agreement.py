"""Before anything large travels, one small all-reduce: all ranks do the same, and no number is a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors.base import all_finite, wide
from lightning_distopt.data_parallel.buckets import Group
from lightning_distopt.exchange import Meter

__all__ = ["Agreement", "agree", "first_bad_parameter", "first_non_finite"]


class Agreement(NamedTuple):
    """What all ranks know after :func:`agree`, the same on each.

    Args:
        alike: all ranks gave the same checksum.
        culprit: (rank, index) of something non-finite, or ``None``.
        wanted: some rank wanted it.
    """

    alike: bool
    culprit: tuple[int, int] | None
    wanted: bool


def agree(
    checksum: int,
    bad: int | None,
    wants: bool,
    meter: Meter,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Agreement:
    """Tell all ranks what this rank is about to do; 32 bytes, counted as "flag".

    It has the same size whatever the ranks are about to do, so ranks that disagree learn it here instead of waiting for
    each other in collectives that do not match.

    Args:
        checksum: of a description of what this rank is about to do.
        bad: index of the tensor in which this rank found a NaN or an infinity.
        wants: a wish that one rank can have for all.
        meter: counts what travels.
        device: where collectives take their tensors.
        group: process group; the default one if ``None``.
    """
    world, rank = (dist.get_world_size(group), dist.get_rank(group)) if dist.is_initialized() else (1, 0)
    code = 0 if bad is None else 1 + bad * world + rank
    header = torch.tensor([code, checksum, -checksum, int(wants)], device=device)
    if world > 1:
        with meter.timed("exchange"):
            dist.all_reduce(header, op=dist.ReduceOp.MAX, group=group)
        meter.all_reduce("flag", header.nbytes, world)
    code, largest, smallest, wanted = header.tolist()
    index, culprit = divmod(code - 1, world)
    return Agreement(largest == -smallest, (culprit, index) if code else None, bool(wanted))


def first_non_finite(tensors: Sequence[Tensor | None]) -> int | None:
    """Return the index of the first tensor that holds a NaN or an infinity."""
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        if not bool(values.isfinite().all()):
            return index
    return None


def first_bad_parameter(groups: Sequence[Group]) -> int | None:
    """Return the index, over all groups, of the parameter to blame for a non-finite one; usually one pass over them."""
    params = [param for group in groups for param in group.data]
    # A sum is finite only if all terms are, and costs a fraction of what a look at each does; it may overflow, though.
    sums = torch.stack([param.sum(dtype=wide(param.dtype)).double() for param in params])
    if bool(sums.isfinite().all()) or all(all_finite(param) for param in params):
        return None
    # A NaN spreads over a parameter, and a clipped one over all: the gradients know better where it began.
    grads = [param.grad for group in groups for bucket in group.buckets for param in bucket.params]
    bad = first_non_finite(grads)
    return first_non_finite(params) if bad is None else bad
