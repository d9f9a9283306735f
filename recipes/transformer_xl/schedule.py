"""The learning rate of the authors' code: a linear rise, then the rest of a cosine."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_distopt.strategies.checks import count


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Return the factor of the rate in ``step``: ``step / warmup_steps``, then ``(1 + cos(pi step / steps)) / 2``.

    The cosine begins at step 0, under the rise, and stays at 0 after ``steps``.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))


class WarmupCosine(LRScheduler):
    """Multiply each rate by :func:`warmup_cosine` of the optimizer's steps (``interval="step"``).

    In a pipeline with stale gradients each device counts its own updates.

    Args:
        optimizer: whose rates it sets.
        steps: where the cosine reaches 0; keep it equal to the Trainer's ``max_steps``.
        warmup_steps: length of the rise, below ``steps``; 0 is none.

    Raises:
        ValueError: for numbers outside their ranges.
    """

    def __init__(self, optimizer: Optimizer, steps: int, warmup_steps: int = 0) -> None:
        self.steps, self.warmup_steps = count("steps", steps, 1), count("warmup_steps", warmup_steps, 0)
        if warmup_steps >= steps:
            raise ValueError(
                f"`warmup_steps` must be below `steps`: got {warmup_steps} of {steps}. The paper's large models rise for "
                "4,000 of 400,000 steps."
            )
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the rate of each group."""
        factor = warmup_cosine(self.last_epoch, self.steps, self.warmup_steps)
        return [rate * factor for rate in self.base_lrs]
