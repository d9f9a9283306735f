"""All-gather of a few numbers, for methods whose ranks draw equal directions and differ in nothing else."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.exchange.base import Collective

__all__ = ["ScalarGather"]


class ScalarGather(Collective):
    """Tells every rank the numbers of all: ``n (W - 1)`` bytes a rank for ``n`` bytes of numbers."""

    def gather(self, mine: Tensor, step: int) -> Tensor:
        """Return everyone's numbers in rank order.

        Args:
            mine: 1-D, the same length and dtype on all ranks.
            step: number of the step, for messages.

        Returns:
            Shape ``(world, len(mine))``, the same bits on all ranks.

        Raises:
            ExchangeError: if the collective failed or timed out.
        """
        everyones = torch.empty(self.world * len(mine), dtype=mine.dtype, device=mine.device)
        work = dist.all_gather_into_tensor(everyones, mine, group=self.group, async_op=True)
        self.meter.all_gather("scalars", mine.nbytes, self.world)
        self.wait(work, (), step)
        return everyones.view(self.world, -1)
