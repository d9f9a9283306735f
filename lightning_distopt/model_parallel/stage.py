"""One stage: forwards a batch, keeps what its backward needs, and back-propagates it later.

    F   x -> y = F_k(x; w)            keep (b, x, states), or the graph; random numbers are those of (seed, k, b)
    B   take (b, x) again, y' = F_k(x; w'), with the weights of now or of then; gradients by w' and x from delta

Gradients are added up in ``sums`` by parameter; nothing here steps an optimizer or talks to a neighbour.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_distopt.errors import PipelineError
from lightning_distopt.model_parallel.block import Block, States
from lightning_distopt.model_parallel.randomness import keyed_random
from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.model_parallel.stash import WeightStash
from lightning_distopt.model_parallel.structure import Spec, flatten, map_tensors, unflatten

__all__ = ["BnUpdate", "Finish", "Stage"]

BnUpdate = Literal["forward", "backward", "both"]
Finish: TypeAlias = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]
"""What the last stage adds: (output, target) -> loss and further figures."""


@dataclass
class _Kept:
    """What the backward of one batch needs."""

    batch: int
    version: int
    x: Any
    states: States
    target: Any = None
    inputs: list[Tensor] | None = None  # with a graph: its leaves and ends
    leaves: dict[str, Tensor] | None = None
    outputs: list[Tensor] | None = None
    spec: Spec = None


class Stage:
    """The work of stage ``index`` on its block.

    Args:
        index: of the stage.
        plan: whose weights a batch is forwarded and back-propagated with, and what is kept meanwhile.
        block: the layers.
        finish: for the last stage: loss and further figures.
        seed: of random numbers in layers.
        bn_update: whose run changes buffers such as running statistics: the first "forward", the second in the
            "backward", or "both". Normalisation itself always uses the batch at hand.
        device: of the block, for its random numbers.

    Attributes:
        parameters: of the block, by name.
        sums: gradients since the last update, by parameter.
        count: batches in ``sums``.
        states: newest state of stateful layers.
        peak: most inputs or graphs that were kept at once.
    """

    def __init__(
        self,
        index: int,
        plan: StalenessPlan,
        block: Block,
        finish: Finish | None = None,
        seed: int = 0,
        bn_update: BnUpdate = "forward",
        device: torch.device | None = None,
    ) -> None:
        self.index, self.plan, self.block, self.finish = index, plan, block, finish
        self.seed, self.bn_update, self.device = seed, bn_update, device
        self.last = index == plan.stages - 1
        self.parameters = dict(block.named_parameters())
        self.stash = WeightStash(self.parameters)
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.count = 0
        self.states: States = {}
        self.base = 0
        self.peak = 0
        self._kept: deque[_Kept] = deque()
        self._graphs = plan.keep == "graph" and not self.last

    # ---- F ----------------------------------------------------------------------------------------------------------

    def forward(self, batch: int, x: Any, target: Any = None) -> Any:
        """Run the layers on a batch and return what the next stage needs; ``None`` in the last stage, whose B runs them.

        Args:
            batch: number since the last drained state.
            x: input; owned by the stage from here on.
            target: kept by the last stage.
        """
        version = self._newest(batch)
        kept = _Kept(batch, version, x, self.states, target)
        y = None
        if self._graphs:
            y = self._forward_with_graph(kept)
        elif not self.last:
            with torch.no_grad(), self._random(batch):
                weights = {} if version == self.stash.live else self.stash.leaves(version)
                buffers = self._copies() if self.bn_update == "backward" else {}
                y, self.states = _call(self.block, {**weights, **buffers}, x, kept.states)
        self._kept.append(kept)
        self.peak = max(self.peak, len(self._kept))
        return y

    def _forward_with_graph(self, kept: _Kept) -> Any:
        spec, tensors = flatten(kept.x)
        kept.inputs = [t.detach().requires_grad_(self.index > 0 and t.is_floating_point()) for t in tensors]
        kept.leaves = self.stash.leaves(kept.version)
        with torch.enable_grad(), self._random(kept.batch):
            y, states = _call(self.block, kept.leaves, unflatten(spec, kept.inputs), kept.states)
        self.states = map_tensors(Tensor.detach, states)
        kept.x = None
        kept.spec, kept.outputs = flatten(y)
        return y

    # ---- B ----------------------------------------------------------------------------------------------------------

    def backward(
        self, batch: int, delta: list[Tensor | None] | None = None
    ) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Back-propagate the oldest batch; add its gradients to ``sums``.

        Args:
            batch: which must be the oldest one.
            delta: gradient of the loss by each floating-point output, ``None`` for those without; nothing in the last stage.

        Returns:
            The gradient by each floating-point input, and, in the last stage, the loss and further figures.
        """
        kept = self._kept.popleft()
        assert kept.batch == batch, (kept.batch, batch)
        figures: dict[str, Tensor] = {}
        if self._graphs:
            assert kept.inputs is not None
            assert kept.leaves is not None
            assert kept.outputs is not None
            inputs, leaves, outputs = kept.inputs, kept.leaves, kept.outputs
        else:
            inputs, leaves, outputs, figures = self._again(kept)
        trained = [(self.parameters[name], leaf) for name, leaf in leaves.items() if leaf.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        floating = [o for o in outputs if o.is_floating_point()]
        heads: list[Tensor | None] = [None] * len(floating) if delta is None else delta
        self._check(batch, floating, heads)
        ends = [
            (o, h) for o, h in zip(floating, heads, strict=True) if o.requires_grad and (self.last or h is not None)
        ]
        found: list[Tensor | None] = [None] * (len(wanted) + len(trained))
        if ends and found:
            found = list(
                torch.autograd.grad(
                    [o for o, _ in ends],
                    wanted + [leaf for _, leaf in trained],
                    [h for _, h in ends],
                    allow_unused=True,
                )
            )
        gradients = iter(found)
        below = [next(gradients) if t.requires_grad else None for t in inputs if t.is_floating_point()]
        for parameter, gradient in zip((p for p, _ in trained), gradients, strict=True):
            if gradient is not None:
                held = self.sums.get(parameter)
                self.sums[parameter] = gradient if held is None else held + gradient
        self.count += 1
        return below, figures

    def _again(self, kept: _Kept) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
        """Run the layers again, with a graph; in the last stage for the first time, and the loss after them."""
        spec, tensors = flatten(kept.x)
        inputs = [t.detach().requires_grad_(self.index > 0 and t.is_floating_point()) for t in tensors]
        version = self.stash.live if self.plan.backward_weights == "current" else kept.version
        live = version == self.stash.live
        leaves: dict[str, Tensor] = {**self.parameters} if live else self.stash.leaves(version)
        first = self.last or self.bn_update != "forward"
        replaced = {**({} if live else leaves), **({} if first else self._copies())}
        figures: dict[str, Tensor] = {}
        with torch.enable_grad(), self._random(kept.batch, again=not self.last):
            y, states = _call(self.block, replaced, unflatten(spec, inputs), kept.states)
            if self.last:
                self.states = states
                assert self.finish is not None
                loss, figures = self.finish(y, kept.target)
                figures = {"loss": loss.detach(), **figures}
                return inputs, leaves, [loss], figures
        return inputs, leaves, flatten(y)[1], figures

    def _check(self, batch: int, outputs: list[Tensor], heads: list[Tensor | None]) -> None:
        ours = [(tuple(o.shape), o.dtype) for o in outputs]
        theirs = [o if h is None else (tuple(h.shape), h.dtype) for o, h in zip(ours, heads, strict=False)]
        if len(outputs) != len(heads) or ours != theirs:
            raise PipelineError(
                f"Stage {self.index} got gradients {theirs} for the outputs {ours} of batch {batch}. Layers must return as many "
                "tensors of the same shapes each time they see a batch.",
                self.index,
                self.index + 1,
                batch,
            )

    # ---- U ----------------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether as many batches are in ``sums`` as make an update."""
        return self.count >= self.plan.accumulate

    def take(self) -> dict[nn.Parameter, Tensor]:
        """Return the mean gradients of the update that is due."""
        a = self.plan.accumulate
        gradients = {p: g / a if a > 1 else g for p, g in self.sums.items()}
        self.sums, self.count = {}, 0
        return gradients

    def make_room(self) -> None:
        """Keep what is needed of the weights that are about to be updated, by this stage or by one that shares some of them."""
        if self.plan.backward_weights == "stashed":
            self.stash.before_update(self._oldest())

    def updated(self) -> None:
        """Count the update."""
        self.stash.after_update()

    def _newest(self, batch: int) -> int:
        """Return the version that a forward reads; only the stash can count where others update shared weights, too."""
        return self.stash.live if self.plan.versions == "newest" else self.plan.forward_version(self.index, batch)

    def _oldest(self) -> int | None:
        """Return the lowest version that will be read again, but for the next one."""
        needed = [kept.version for kept in self._kept]
        if self.plan.versions != "newest":
            # What the next batch to arrive will read; batches arrive one a tick.
            needed.append(self.plan.forward_version(self.index, self._next_batch()))
        return min(needed, default=None)

    def _next_batch(self) -> int:
        return self._kept[-1].batch + 1 if self._kept else self.stash.live * self.plan.accumulate + self.plan.accumulate

    def restart(self) -> None:
        """Number batches and versions from zero again: the run is drained."""
        self.stash.restart()

    def __len__(self) -> int:
        return len(self._kept)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _random(self, batch: int, again: bool = False) -> AbstractContextManager[None]:
        if not self.block.training:
            return nullcontext()
        stream = self.index + (self.plan.stages if again and not self.plan.repeatable_dropout else 0)
        return keyed_random(self.seed, stream, self.base + batch, self.device)

    def _copies(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.block.named_buffers()}


def _call(block: Block, replaced: dict[str, Tensor], x: Any, states: States) -> tuple[Any, States]:
    result: tuple[Any, States] = functional_call(block, replaced, (x, states)) if replaced else block(x, states)
    return result
