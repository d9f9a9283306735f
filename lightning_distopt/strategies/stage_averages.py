"""Lightning's ``WeightAveraging`` in a pipeline: each stage averages its own weights, by its own count of updates.

The callback holds a copy of the whole model, which it averages after each batch, swaps in for validation, saves and, at the
end, leaves in the model. Here the first of these is done for it, stage by stage::

    after update v of stage k:   if should_update(step_idx=v - 1):   average_k <- f(average_k, w_k[v])
    epoch e learned from:        if should_update(epoch_idx=e):      the same

So nothing is averaged while a pipeline fills, and all updates of a drain are. The rest stays the callback's; for files and for
the end of a fit, owners broadcast their averages as they do their weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_distopt.model_parallel.block import Block
from lightning_distopt.strategies.compat import average_of

__all__ = ["StageAverages"]


class StageAverages:
    """The averages that one callback has in this process.

    Args:
        callback: that was set up for a fit; it says on which device averages lie.
        blocks: of this process, by stage. What several of them share belongs to the last of them.
        every: blocks of all stages.
        alone: whether :meth:`updated` says when to average; otherwise the callback does, after each batch, for all stages.

    Attributes:
        every: blocks of the averaged model for all stages, to be shared like those of the model.
    """

    def __init__(
        self,
        callback: WeightAveraging,
        blocks: Mapping[int, Block],
        every: Mapping[int, Block],
        alone: bool,
    ) -> None:
        self._callback, self._whole = callback, average_of(callback)
        model: Any = self._whole.module
        self.every = {k: _counterpart(block, model) for k, block in every.items()}
        self._parts: dict[int, _Part] = {}
        known: set[int] = set()
        for k, block in sorted(blocks.items(), reverse=True):
            shared = {name for name, p in block.named_parameters() if id(p) in known}
            known |= {id(p) for p in block.parameters()}
            self._parts[k] = _Part(self._whole, self.every[k], block, shared)
        self._ends: list[int] = []
        vars(self._whole)["update_parameters"] = _leave if alone else self._take_all

    def begin(self, updates: int, epochs: int) -> None:
        """Go on counting from here."""
        self._ends = []
        for part in self._parts.values():
            part.updates, part.epochs, part.passed = updates, epochs, 0

    def epoch_ends_with(self, batch: int) -> None:
        """Note the last batch of the epoch."""
        self._ends.append(batch)

    def updated(self, learned: Mapping[int, int]) -> None:
        """Average what is due after an update.

        Args:
            learned: by stage that took part, the last batch that it has learned from.
        """
        for stage, batch in learned.items():
            part = self._parts[stage]
            part.updates += 1
            if self._callback.should_update(step_idx=part.updates - 1):
                part.take()
            for end in self._ends[part.passed :]:
                if end <= batch:
                    if self._callback.should_update(epoch_idx=part.epochs):
                        part.take()
                    part.passed, part.epochs = part.passed + 1, part.epochs + 1

    def settle(self) -> None:
        """Let the callback know how often was averaged; in a drained pipeline all stages have done so as often."""
        self._whole.n_averaged.copy_(next(iter(self._parts.values())).count)

    def _take_all(self, model: nn.Module) -> None:
        for part in self._parts.values():
            part.take()


class _Part:
    """One stage's average."""

    def __init__(self, whole: AveragedModel, average: Block, block: Block, shared: Collection[str]) -> None:
        self._now = _View(block, shared)
        self._average = _Average(
            nn.Module(), whole.n_averaged.device, whole.avg_fn, whole.multi_avg_fn, whole.use_buffers
        )
        self._average.module = _View(average, shared)
        self.count.copy_(whole.n_averaged)
        if not self.count:  # replicas began with weights of their own when the callback made its copy
            average.load_state_dict(block.state_dict())
        self.updates = self.epochs = self.passed = 0

    @property
    def count(self) -> torch.Tensor:
        """How often was averaged."""
        return self._average.n_averaged

    def take(self) -> None:
        """Take the weights of now into the average."""
        self._average.update_parameters(self._now)


class _Average(AveragedModel):
    """Of a view."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.module.parameters()


class _View(nn.Module):
    """A block without some of its parameters."""

    def __init__(self, block: Block, without: Collection[str]) -> None:
        super().__init__()
        self.block, self._without = block, set(without)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return (p for name, p in self.block.named_parameters() if name not in self._without)


def _counterpart(block: Block, model: Any) -> Block:
    """Return the block of the same layers of another copy of the model."""
    layers = {name: model.layers.get_submodule(name) for name in block.layers}
    return Block(layers, model.loss if hasattr(block, "loss") else None)


def _leave(model: nn.Module) -> None:
    """Average nothing."""
