"""Learning-rate schedulers of a device whose updates come later than Lightning's batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.utilities.types import LRSchedulerConfig

__all__ = ["ScheduleClock"]

_NEVER = 2**62  # a frequency at which Lightning steps no scheduler


class ScheduleClock:
    """Steps schedulers by this device's own count of updates, and by epochs when it has learned from their last batch.

    Schedulers that look at a metric are left to Lightning: what validation brings comes after a drain.

    Args:
        configs: Lightning's; what is stepped here, it no longer steps.

    Attributes:
        updates: of the device so far.
        epochs: whose batches have all been learned from.
    """

    def __init__(self, configs: Sequence[LRSchedulerConfig] = ()) -> None:
        self.updates = self.epochs = 0
        self._ends: deque[int] = deque()
        self._schedulers: list[tuple[LRSchedulerConfig, int]] = []
        for config in configs:
            if not config.reduce_on_plateau:
                self._schedulers.append((config, config.frequency))
                config.frequency = _NEVER

    def epoch_ends_with(self, batch: int) -> None:
        """Note the last batch of the epoch."""
        self._ends.append(batch)

    def updated(self, learned: int, step: Callable[[Any], None], *, counts: bool = True) -> None:
        """Step what is due after an update.

        Args:
            learned: the last batch that this device has learned from.
            step: called with each scheduler that is due.
            counts: whether it is an update of the device's least stale stage. In a fill and a drain a device of several stages
                makes updates of only some of them; counting the same stage's gives as many as there are batches.
        """
        self.updates += counts
        ended = 0
        while self._ends and self._ends[0] <= learned:
            self._ends.popleft()
            ended += 1
        for config, frequency in self._schedulers:
            if config.interval == "step" and counts and self.updates % frequency == 0:
                step(config.scheduler)
            elif config.interval == "epoch":
                for epoch in range(self.epochs + 1, self.epochs + ended + 1):
                    if epoch % frequency == 0:
                        step(config.scheduler)
        self.epochs += ended
