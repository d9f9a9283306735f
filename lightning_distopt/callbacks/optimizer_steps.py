"""How many optimizer steps a fit and its epochs have, and how large a step's batch is."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

__all__ = ["global_batch_size", "steps_in_an_epoch"]


def steps_in_an_epoch(trainer: pl.Trainer, needed_by: str) -> int:
    """Return the optimizer steps of one epoch; the last window of an accumulation may be short and steps, too.

    Args:
        trainer: inside of a fit, with its loaders set up.
        needed_by: argument that counts in epochs, for the message.

    Raises:
        ValueError: if the training loader has no length.
    """
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        raise ValueError(
            f"`{needed_by}` counts in epochs, and the training loader has no length: got {batches} batches. Pass "
            "`limit_train_batches` to the Trainer."
        )
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


def global_batch_size(trainer: pl.Trainer, micro_batch: int | None) -> tuple[int, int, int]:
    """Return samples of a micro-batch, number of replicas, and micro-batches of a step.

    Args:
        trainer: inside of a fit, with its loaders set up.
        micro_batch: ``None`` asks the training loader.

    Raises:
        ValueError: if the loader does not say how large its batches are.
    """
    size = _loader_batch_size(trainer.train_dataloader) if micro_batch is None else micro_batch
    if size is None:
        raise ValueError(
            "`batch_size` must be given where the training loader does not say it: got a "
            f"{type(trainer.train_dataloader).__name__}. Pass the samples in one micro-batch of one process, "
            "`LinearScaling(batch_size=32)`."
        )
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    return size, int(replicas), trainer.accumulate_grad_batches


def _loader_batch_size(loader: Any) -> int | None:
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int):
            return size
    return None
