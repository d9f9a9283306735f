"""The way of a batch through all stages, one batch at a time and without gradients: validation, test and prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_distopt.exchange.meter import Meter
from lightning_distopt.model_parallel.block import Block, States
from lightning_distopt.model_parallel.transport import Channel, Endpoint, LocalChannel, Receiver, Sender

__all__ = ["Passage"]

_FIRST_TAG = 4096  # tags from here on belong to evaluation


class Passage:
    """One process's part of it.

    Args:
        blocks: of this process, by stage.
        ranks: global rank of each stage's process.
        rank: of this process.
        meter: counts bytes and waiting.
        timeout: seconds to wait for a neighbour.
        device: of the blocks.
        group: process group of Gloo; the default one if ``None``.
    """

    def __init__(
        self,
        blocks: Mapping[int, Block],
        ranks: Sequence[int],
        rank: int,
        meter: Meter,
        timeout: float,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._blocks, self._last, self._number = dict(sorted(blocks.items())), len(ranks) - 1, 0
        self._states: dict[int, States] = {}
        self._ends: dict[int, tuple[Channel | None, Channel | None]] = {}
        for hop in range(self._last):
            before, after, tag = ranks[hop], ranks[hop + 1], _FIRST_TAG + 2 * hop
            sender: Channel | None = None
            receiver: Channel | None = None
            if before == after == rank:
                sender = receiver = LocalChannel(hop + 1)
            elif before == rank:
                sender = Sender(Endpoint(hop, after, tag, "evaluation"), 1, 1, group, meter, timeout)
            elif after == rank:
                receiver = Receiver(Endpoint(hop + 1, before, tag, "evaluation"), 1, group, meter, timeout, device)
            self._ends[hop] = sender, receiver

    def run(self, x: Any, target: Any) -> tuple[Any, Any]:
        """Pass a batch through all stages; return output and target in the process of the last one.

        Args:
            x: input; only read in the process of stage 0.
            target: taken along.
        """
        number, self._number = self._number, self._number + 1
        for stage, block in self._blocks.items():
            if stage > 0:
                receiver = self._ends[stage - 1][1]
                assert receiver is not None
                x, target = receiver.receive(number)
            x, self._states[stage] = block(x, self._states.get(stage, {}))
            if stage < self._last:
                sender = self._ends[stage][0]
                assert sender is not None
                sender.send(number, (x, target))
        return x, target

    def forget(self) -> None:
        """Let stateful layers begin anew."""
        self._states = {}
