"""RSGD over torch's optimizers, by class path with flat arguments, and the callbacks of averaging baselines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch.optim import Optimizer

from lightning_distopt.optimizers import RSGD

Base = Literal["sgd", "adam", "asgd"]


def base_optimizer(params: Iterable[Any], base: Base, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """Return torch's optimizer of that name."""
    if base == "adam":
        return torch.optim.Adam(params, lr=lr, weight_decay=weight_decay)
    if base == "asgd":
        return torch.optim.ASGD(params, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)


class ResidualOptimizer(RSGD):
    """:class:`~lightning_distopt.optimizers.RSGD` over an optimizer of torch's.

    Args:
        params: of the model.
        base: "sgd", "adam" or "asgd".
        lr: learning rate, at least 0.
        momentum: of SGD, in [0, 1).
        weight_decay: at least 0.
        scheme: residual scheme, for example "ema:0.9".
        rho: share of the residual that is explored, in (0, 1].
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Base = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        scheme: str = "ema:0.9",
        rho: float = 1.0,
    ) -> None:
        super().__init__(base_optimizer(params, base, lr, momentum, weight_decay), scheme, rho)


class AveragedPoints(Callback):
    """Calls ``train()`` and ``eval()`` of schedule-free optimizers around validation."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._call(trainer, "train")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._call(trainer, "eval")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._call(trainer, "train")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._call(trainer, "eval")

    def _call(self, trainer: pl.Trainer, what: str) -> None:
        for optimizer in trainer.optimizers:
            getattr(optimizer, what)()


class IterateAveraging(WeightAveraging):
    """The mean of all iterates, by Lightning's callback over torch's ``AveragedModel``: evaluated instead of the last one."""
