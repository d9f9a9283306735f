"""How many training samples each rank has, for weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy

__all__ = ["samples_of_all_ranks"]


def samples_of_all_ranks(strategy: CompressedDDPStrategy, weighting: str) -> list[int]:
    """Return the samples that each rank's training loaders draw in an epoch; a collective of 8 bytes a rank.

    Raises:
        MisconfigurationException: on all ranks, if a rank's loader cannot tell.
    """
    assert strategy.lightning_module is not None
    loaders = CombinedLoader(strategy.lightning_module.trainer.train_dataloader).flattened
    counts = [_samples(loader) for loader in loaders]
    table = torch.zeros(strategy.world_size, dtype=torch.int64, device=strategy.root_device)
    table[strategy.global_rank] = -1 if None in counts else sum(n for n in counts if n is not None)
    if strategy.world_size > 1:
        dist.all_reduce(table)
        strategy.meter.all_reduce("setup", table.nbytes, strategy.world_size)
    samples: list[int] = table.tolist()
    unknown = [rank for rank, n in enumerate(samples) if n < 0]
    if unknown:
        raise MisconfigurationException(
            f"`weighting={weighting!r}` needs to know how many samples each rank has: the training loaders of ranks {unknown} "
            "have no length. Use `weighting='uniform'`, or a dataset with a length."
        )
    return samples


def _samples(loader: Any) -> int | None:
    for source in (getattr(loader, "sampler", None), getattr(loader, "dataset", None), loader):
        try:
            return len(source)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            continue
    return None
