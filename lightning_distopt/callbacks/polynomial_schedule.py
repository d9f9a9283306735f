"""The learning rate falls by a power of the time that is left: torch's ``LambdaLR``, configured.

Source: the schedule of CLARS' authors' code (arXiv:2002.01576).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_distopt.callbacks.gradual_warmup import GradualWarmup
from lightning_distopt.strategies.checks import count, positive

__all__ = ["PolynomialSchedule", "polynomial"]


def polynomial(step: int, start: int, steps: int, power: float, rate: float, end: float) -> float:
    """Return the rate of optimizer step ``step``: ``(rate - end) (1 - (step - start) / (steps - start)) ** power + end``.

    Args:
        step: from 0.
        start: steps of warm-up before it falls.
        steps: in the whole fit.
        power: above 0; 2 in the authors' code, 1 is a straight line.
        rate: before it falls.
        end: after the last step.
    """
    gone = min(1.0, max(0, step - start) / max(1, steps - start))
    return (rate - end) * math.pow(1.0 - gone, power) + end


class PolynomialSchedule(Callback):
    """Let every learning rate fall to ``end`` over the fit, after the ramp of a ``GradualWarmup`` among the callbacks.

    A ``LambdaLR`` of torch's, stepped and saved by Lightning like a module's own. torch's ``PolynomialLR`` would do for
    ``end=0`` without warm-up only.

    Args:
        power: above 0.
        end: rate after the last step, at least 0; a group whose rate is below keeps that.
        steps: optimizer steps in the whole fit, at least 1; ``None`` asks the Trainer.

    Raises:
        ValueError: for a value outside its range, or if the Trainer has no end (``max_epochs=-1``).
        MisconfigurationException: if the module brings a scheduler of its own.

    Source: arXiv:2002.01576, authors' code: power 2, end rate 1e-4, per optimizer step.
    """

    def __init__(self, power: float = 2.0, end: float = 1e-4, steps: int | None = None) -> None:
        self.power = positive("power", power)
        if isinstance(end, bool) or not isinstance(end, (int, float)) or not 0 <= end < float("inf"):
            raise ValueError(f"`end` must be a rate of at least 0: got {end!r}. The authors' code uses 1e-4.")
        self.end = float(end)
        self.steps = None if steps is None else count("steps", steps, 1)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.lr_scheduler_configs:
            theirs = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise MisconfigurationException(
                f"`PolynomialSchedule` sets the learning rate, and so does the module's {theirs}. Return optimizers only from "
                "`configure_optimizers`, or leave the callback out."
            )
        trainer.fit_loop.setup_data()  # so that epochs have a length
        steps = float(trainer.estimated_stepping_batches) if self.steps is None else float(self.steps)
        if steps == float("inf"):
            raise ValueError(
                f"`steps` must be given for a Trainer without an end: got max_epochs={trainer.max_epochs} and "
                f"max_steps={trainer.max_steps}. Pass `max_epochs`, or `PolynomialSchedule(steps=...)`."
            )
        warmups = [callback for callback in trainer.callbacks if isinstance(callback, GradualWarmup)]  # type: ignore[attr-defined]
        start = max((warmup.steps_of(trainer) for warmup in warmups), default=0)
        for optimizer in trainer.optimizers:
            lambdas = [
                self._factor(optimizer, group, start, int(steps)) for group in range(len(optimizer.param_groups))
            ]
            config = LRSchedulerConfig(LambdaLR(optimizer, lambdas), interval="step", name="polynomial")
            trainer.strategy.lr_scheduler_configs.append(config)

    def _factor(self, optimizer: Optimizer, group: int, start: int, steps: int) -> Callable[[int], float]:
        def factor(step: int) -> float:
            # Asked each time: `LinearScaling` changes the rate, and loading a state makes new groups.
            rate = float(optimizer.param_groups[group]["initial_lr"])
            return polynomial(step, start, steps, self.power, rate, min(self.end, rate)) / rate if rate else 1.0

        return factor
