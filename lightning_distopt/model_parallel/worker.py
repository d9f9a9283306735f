"""One worker's tick: forwards of its stages, backwards, then one update of all that it has.

    tick t     for k of mine, rising:    F of batch t - P_k           from channel k-1 -> k, to channel k -> k+1
               for k of mine, falling:   B of batch t - P_k - m_k     from channel k+1 -> k, to channel k -> k-1
               U if a B completed a group                             by whoever owns the optimizer

``StalenessPlan.work`` says how F and B mix where a worker has several stages. A worker waits for nothing but the message that
its next piece of work needs. Stages of one worker may share parameters:

    V.grad = sum of the parts that the stages bring in this tick:  head, batch t   +   input, batch t - (K - 1)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_distopt.model_parallel.stage import Stage
from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.model_parallel.transport import Channel

__all__ = ["Hop", "Tick", "Worker"]


class Hop(NamedTuple):
    """The channels between a stage and the next one; each end is there where its stage is."""

    activations_out: Channel | None = None
    activations_in: Channel | None = None
    gradients_out: Channel | None = None
    gradients_in: Channel | None = None


class Tick(NamedTuple):
    """What a tick brought to this worker.

    Attributes:
        figures: loss and further figures by batch, as far as they became known here.
        updates: gradients of the update that is due; ``None`` if there is none.
    """

    figures: dict[int, dict[str, Tensor]]
    updates: dict[nn.Parameter, Tensor] | None


class Worker:
    """The stages of one worker.

    Args:
        plan: what is done in which tick.
        stages: of this worker, by index.
        hops: channels by the index of the stage before them.
        context: entered around computation, for autocast.
        record: told (kind, stage, batch, start, end) of every piece of work, seconds of ``time.perf_counter``.

    Attributes:
        tick: ticks since the last drained state.
        batches: batches that ended before it.
        busy: seconds of forwards and backwards so far.
        brought: the stages whose gradients the last update has.
    """

    def __init__(
        self,
        plan: StalenessPlan,
        stages: Mapping[int, Stage],
        hops: Mapping[int, Hop],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        record: Callable[[str, int, int, float, float], None] | None = None,
    ) -> None:
        self.plan, self.stages, self.hops = plan, dict(sorted(stages.items())), dict(hops)
        self._context, self._record = context, record
        self.tick = 0
        self.batches = 0
        self.busy = 0.0
        self.brought: tuple[int, ...] = ()
        self._limit: int | None = None
        self._fresh: set[int] = set()
        self._due: Sequence[Stage] = ()
        held = {k: {id(p) for p in stage.parameters.values()} for k, stage in self.stages.items()}
        self._ties = {k: [j for j in held if j != k and held[j] & held[k]] for k in held}
        self._work = [work for work in plan.work(plan.placement[min(self.stages)]) if work.stage in self.stages]

    def run_tick(self, batch: tuple[Any, Any] | None = None) -> Tick:
        """Do one tick's forwards and backwards.

        Args:
            batch: input and target of the batch that enters; only read by the worker of stage 0.
        """
        figures: dict[int, dict[str, Tensor]] = {}
        for kind, index in self._work:
            if kind == "F":
                self.forward(index, batch)
            else:
                figures |= self.backward(index)
        return Tick(figures, self.end_tick())

    def forward(self, index: int, batch: tuple[Any, Any] | None = None) -> None:
        """Do the forward of one stage in this tick, if it has one."""
        number = self.plan.forward_batch(index, self.tick)
        if self._runs(number):
            self._forward(index, self.stages[index], number, batch)

    def backward(self, index: int) -> dict[int, dict[str, Tensor]]:
        """Do the backward of one stage in this tick, if it has one; return the figures that came with it, by batch.

        The last stage of a worker hears of a batch first; what its other stages hear later is not told again.
        """
        number = self.plan.backward_batch(index, self.tick)
        if not self._runs(number):
            return {}
        figures = self._backward(index, self.stages[index], number)
        return {self.batches + number: figures} if index == max(self.stages) else {}

    def end_tick(self) -> dict[nn.Parameter, Tensor] | None:
        """Return the gradients of the update that is due, if one is."""
        self.tick += 1
        return self._updates()

    def _runs(self, number: int) -> bool:
        return number >= 0 and (self._limit is None or number < self._limit)

    def _forward(self, index: int, stage: Stage, number: int, batch: tuple[Any, Any] | None) -> None:
        if number in self._fresh:
            stage.states = {}
        if index == 0:
            assert batch is not None
            x, target = batch
        else:
            x, target = self._channel(index - 1, "activations_in").receive(number)
        start = time.perf_counter()
        with self._context():
            y = stage.forward(number, x, target)
        self._worked("F", index, number, start)
        if not stage.last:
            self._channel(index, "activations_out").send(number, (y, target))

    def _backward(self, index: int, stage: Stage, number: int) -> dict[str, Tensor]:
        delta, figures = None, {}
        if not stage.last:
            delta, figures = self._channel(index, "gradients_in").receive(number)
        start = time.perf_counter()
        with self._context():
            below, own = stage.backward(number, delta)
        self._worked("B", index, number, start)
        figures = own or figures
        if index > 0:
            self._channel(index - 1, "gradients_out").send(number, (below, figures))
        return figures

    def _updates(self) -> dict[nn.Parameter, Tensor] | None:
        due = [stage for stage in self.stages.values() if stage.due]
        return self._gathered(due) if due else None

    def _gathered(self, due: Sequence[Stage]) -> dict[nn.Parameter, Tensor]:
        parts: dict[nn.Parameter, list[Tensor]] = {}
        for stage in due:
            for parameter, gradient in stage.take().items():
                parts.setdefault(parameter, []).append(gradient)
        changed = {k for stage in due for k in (stage.index, *self._ties[stage.index])}
        self._due = [stage for k, stage in self.stages.items() if k in changed]
        for stage in self._due:
            stage.make_room()
        self.brought = tuple(stage.index for stage in due)
        return {parameter: self._joined(several) for parameter, several in parts.items()}

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total / len(parts) if self.plan.tied_grad == "mean" and len(parts) > 1 else total

    def updated(self) -> None:
        """Count the update whose gradients the last tick returned."""
        for stage in self._due:
            stage.updated()
        self._due = ()

    @property
    def newest_updated(self) -> bool:
        """Whether the last update has gradients of the worker's last stage, the least stale one."""
        return max(self.stages) in self.brought

    def learned(self) -> dict[int, int]:
        """Return, by stage with an update, the last batch that all its updates have taken in."""
        found = {}
        for index in self.stages:
            newest = min(
                self.plan.backward_batch(index, self.tick - 1),
                self.tick - 1 if self._limit is None else self._limit - 1,
            )
            if newest >= 0:
                found[index] = self.batches + newest
        return found

    # ---- drain ------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> bool:
        """Whether batches have entered that are not yet learned from."""
        return self.tick > 0

    def drain_ticks(self) -> int:
        """Return how many ticks end all batches that have entered; to be followed by as many :meth:`run_tick`."""
        self._limit = self.tick
        return self.plan.ticks(self.tick) - self.tick

    def take_rest(self) -> dict[nn.Parameter, Tensor] | None:
        """Return the gradients of a last group that is not full, over the full number; ``None`` if there is none."""
        rest = [stage for stage in self.stages.values() if stage.count]
        return self._gathered(rest) if rest else None

    def restart(self) -> None:
        """Number ticks from zero again, after a drain."""
        assert all(not len(stage) for stage in self.stages.values())
        self.batches += self._limit or 0
        self.tick, self._limit = 0, None
        self._fresh.clear()
        for stage in self.stages.values():
            stage.restart()
            stage.base = self.batches

    def forget(self) -> None:
        """Let stateful layers begin anew with the next batch that enters, each when that batch comes to it."""
        self._fresh.add(self.tick)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _channel(self, hop: int, end: str) -> Channel:
        channel: Channel | None = getattr(self.hops[hop], end)
        assert channel is not None, (hop, end)
        return channel

    def _worked(self, kind: str, stage: int, number: int, start: float) -> None:
        end = time.perf_counter()
        self.busy += end - start
        if self._record is not None:
            self._record(kind, stage, self.batches + number, start, end)


def deposit(updates: Mapping[nn.Parameter, Tensor]) -> None:
    """Make these the gradients of their parameters, which are then owned by the optimizer."""
    for parameter, gradient in updates.items():
        parameter.grad = gradient.to(parameter.dtype) if gradient.dtype != parameter.dtype else gradient


def finite(updates: Mapping[nn.Parameter, Tensor]) -> bool:
    """Whether all of these gradients are finite (one look at their norms, which overflow only where steps would)."""
    if not updates:
        return True
    norms = torch._foreach_norm([g for g in updates.values() if g.numel()] or [torch.zeros(1)], float("inf"))
    return bool(torch.stack(list(norms)).isfinite().all())
