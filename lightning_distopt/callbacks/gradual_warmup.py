"""The learning rate rises to its value over the first epochs.

Source: arXiv:1706.02677.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lightning_distopt.callbacks.optimizer_steps import steps_in_an_epoch
from lightning_distopt.callbacks.rate_checks import share
from lightning_distopt.strategies.checks import flag

__all__ = ["GradualWarmup", "ramp"]


def ramp(step: int, steps: int, start_factor: float = 0.0) -> float:
    """Return the factor of the rate in optimizer step ``step`` of ``steps``: linear from ``start_factor``, then 1."""
    return 1.0 if step >= steps else start_factor + (1.0 - start_factor) * step / steps


class GradualWarmup(Callback):
    """Multiply the scheduled learning rate by ``s / S``, with ``s`` optimizer steps done and ``S`` in the first ``epochs``.

    The factor is in the rate from the start of a training batch to its end, and schedulers go on underneath: torch's own
    warm-up (``LinearLR``) can neither start at 0 nor be laid over a scheduler that sets rates absolutely. List this callback
    before ``LearningRateMonitor``, which then logs the rate with the factor; checkpoints and schedulers see it without.

    Args:
        epochs: length of the ramp, at least 0; parts of epochs are allowed, 0 switches it off.
        start_factor: factor of the first step, in [0, 1); 0 is the paper's code's, ``1 / ranks`` the other usage.
        start_at_one: count steps from 1, so that the first is not wasted on a rate of 0.

    Raises:
        ValueError: for a value outside its range; at the start of the fit, if the loader has no length.

    Source: arXiv:1706.02677; per optimizer step.
    """

    def __init__(self, epochs: float = 5, start_factor: float = 0.0, start_at_one: bool = False) -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 <= epochs < float("inf"):
            raise ValueError(f"`epochs` must be a number of at least 0: got {epochs!r}. The paper uses 5.")
        self.epochs = epochs
        self.start_factor = share("start_factor", start_factor)
        self.start_at_one = flag("start_at_one", start_at_one)
        self.steps = 0
        self._done: dict[int, int] = {}  # steps of each optimizer, by its number
        self._scheduled: list[tuple[dict[str, Any], Any]] = []
        self._handles: list[Any] = []

    def steps_of(self, trainer: pl.Trainer) -> int:
        """Return the length of the ramp in optimizer steps."""
        return round(self.epochs * steps_in_an_epoch(trainer, "GradualWarmup(epochs)")) if self.epochs else 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = self.steps_of(trainer)
        self._detach()
        for number, optimizer in enumerate(trainer.optimizers):
            self._done.setdefault(number, 0)
            self._handles.append(optimizer.register_step_post_hook(self._after(number)))

    def _after(self, number: int) -> Any:
        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._done[number] += 1
            self._restore()  # before schedulers step

        return after

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore()
        for number, optimizer in enumerate(trainer.optimizers):
            step = self._done[number] + self.start_at_one
            if step >= self.steps:
                continue
            factor = ramp(step, self.steps, self.start_factor)
            for group in optimizer.param_groups:
                self._scheduled.append((group, group["lr"]))
                group["lr"] = group["lr"] * factor

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._restore()  # after a micro-batch that no step follows

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    def _restore(self) -> None:
        for group, rate in self._scheduled:
            if isinstance(group["lr"], torch.Tensor) and isinstance(rate, torch.Tensor):
                rate = rate.to(group["lr"])
            group["lr"] = rate
        self._scheduled = []

    def _detach(self) -> None:
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Return the steps done by each optimizer."""
        return {"done": dict(self._done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = {int(number): int(steps) for number, steps in state_dict["done"].items()}
