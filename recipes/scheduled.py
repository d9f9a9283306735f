"""An optimizer and its schedule, as LightningModules return them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer

__all__ = ["scheduled"]


def scheduled(optimizer: Optimizer, scheduler: LRSchedulerCallable | None, interval: str) -> Any:
    """Return what ``configure_optimizers`` does: the optimizer, and its scheduler if there is one, stepped every ``interval``."""
    if scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": interval}}
