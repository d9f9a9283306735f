"""The learning rate grows with the batch.

Source: arXiv:1706.02677; the square root is a common choice for Adam and LAMB, ours.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ChainedScheduler, CyclicLR, OneCycleLR, SequentialLR

from lightning_distopt.callbacks.optimizer_steps import global_batch_size
from lightning_distopt.strategies.checks import choice, count

__all__ = ["LinearScaling"]

Scaling = Literal["linear", "square_root"]
_DONE = "linear_scaling"  # entry of a parameter group: the factor that is in its rate


class LinearScaling(Callback):
    """Multiply every learning rate by ``B / base_batch_size``, with ``B = micro-batch x ranks x accumulation``.

    Once, before the first step, for the rates that ``configure_optimizers`` gave and for those that schedulers start from. The
    factor is noted in the parameter groups and so in checkpoints: a resumed run is not scaled twice, and one resumed with
    another ``B`` is scaled by the ratio.

    Logs ``linear_scaling/batch_size`` and ``linear_scaling/factor`` once, as hyper-parameters, and says both.

    Args:
        base_batch_size: samples a step that the learning rate was tuned for, at least 1.
        rule: "linear", or "square_root" of the same quotient.
        batch_size: samples in one micro-batch of one process, at least 1; ``None`` asks the training loader.

    Attributes:
        factor: in the rates of the last fit; 1 before.

    Raises:
        ValueError: for a value outside its range; at the start of the fit, where the loader does not tell its batch size.
        MisconfigurationException: at the start of the fit, for schedulers that keep rates of their own (``OneCycleLR``, ...).

    Source: arXiv:1706.02677.
    """

    def __init__(self, base_batch_size: int = 256, rule: Scaling = "linear", batch_size: int | None = None) -> None:
        self.base_batch_size = count("base_batch_size", base_batch_size, 1)
        self.rule: Scaling = choice("rule", rule, Scaling)
        self.batch_size = None if batch_size is None else count("batch_size", batch_size, 1)
        self.factor = 1.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not before: only here the loaders exist, and what a checkpoint holds has been put back.
        micro, replicas, accumulation = global_batch_size(trainer, self.batch_size)
        batch = micro * replicas * accumulation
        quotient = batch / self.base_batch_size
        self.factor = quotient if self.rule == "linear" else math.sqrt(quotient)
        self._refuse_absolute_rates(trainer)
        for optimizer in trainer.optimizers:
            ratios = [self._scale(group) for group in optimizer.param_groups]
            for config in trainer.lr_scheduler_configs:
                if config.scheduler.optimizer is optimizer and hasattr(config.scheduler, "base_lrs"):
                    scheduler: Any = config.scheduler
                    scheduler.base_lrs = [base * ratio for base, ratio in zip(scheduler.base_lrs, ratios, strict=True)]
        words = f"{batch} = {micro} samples x {replicas} ranks x {accumulation} micro-batches"
        rank_zero_info(f"`LinearScaling` multiplied the learning rates by {self.factor:g}: the batch is {words}.")
        for logger in trainer.loggers:
            logger.log_hyperparams({"linear_scaling/batch_size": batch, "linear_scaling/factor": self.factor})

    def _refuse_absolute_rates(self, trainer: pl.Trainer) -> None:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, (ChainedScheduler, CyclicLR, OneCycleLR, SequentialLR)):
                raise MisconfigurationException(
                    f"`LinearScaling` cannot scale {type(config.scheduler).__name__}, which keeps rates of its own. Scale the "
                    "rates that you give to it, or use a scheduler that multiplies the optimizer's, or `PolynomialSchedule`."
                )

    def _scale(self, group: dict[str, Any]) -> float:
        ratio = self.factor / float(group.get(_DONE, 1.0))
        group["lr"] = group["lr"] * ratio
        if "initial_lr" in group:
            group["initial_lr"] = group["initial_lr"] * ratio
        group[_DONE] = self.factor
        return ratio
