"""The whole state of a rank, and whether two of them are the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_distopt.strategies.staged import StagedStrategy


class Everything(Callback):
    """Keeps the whole state of each rank at the end of the fit in a folder, to compare two fits.

    Args:
        folder: where.
        generators: Python's and NumPy's, too; Lightning draws from them now and then before a fit.
    """

    def __init__(self, folder: Path, generators: bool = False) -> None:
        self.folder, self.generators = folder, generators
        folder.mkdir()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        state = everything(trainer, pl_module)
        if self.generators:
            state["generators"] = (random.random(), float(numpy.random.rand()))
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def everything(trainer: Trainer, module: Any) -> dict[str, Any]:
    """Return what decides how this rank goes on."""
    return {
        "engine": engine(trainer.strategy),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "model": module.state_dict(),
        "step": (trainer.global_step, trainer.current_epoch),
        "random": torch.get_rng_state(),
    }


def engine(strategy: Any) -> dict[str, Any]:
    """Return the state of what a strategy adds to training."""
    if isinstance(strategy, StagedStrategy):
        strategy.share_weights()
        clock = getattr(strategy, "clock", None)
        return {} if clock is None else {"updates": clock.updates, "epochs": clock.epochs}
    sync = strategy.update_sync or strategy.gradient_sync
    return sync.state_dict()


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Compare bit for bit, and say where two states differ."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def assert_all_same(one: Path, other: Path, ranks: int) -> None:
    """Compare the states that two fits left in two folders."""
    for rank in range(ranks):
        a, b = (torch.load(folder / f"{rank}.pt", weights_only=False) for folder in (one, other))
        assert_same(a, b, f"rank {rank}")
