"""All workers of a pipeline in one process, tick by tick: the engine without a network, for tests and for looking at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distopt.model_parallel.block import as_block
from lightning_distopt.model_parallel.stage import BnUpdate, Stage
from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.model_parallel.ties import refuse_ties
from lightning_distopt.model_parallel.transport import LocalChannel
from lightning_distopt.model_parallel.worker import Hop, Worker, deposit

__all__ = ["InProcessPipeline"]


class InProcessPipeline:
    """Workers that take turns; every channel is a queue.

    Args:
        modules: one a stage; layers of an ``nn.Sequential`` may be stateful.
        loss_fn: ``(output, target) -> scalar``.
        plan: delays and weights.
        optimizer: called with the parameters of each worker.
        seed: of random numbers in layers.
        bn_update: see :class:`~lightning_distopt.model_parallel.stage.Stage`.
        scheduler: called with each worker's optimizer; stepped after each update that its last stage takes part in.
        clip: largest 2-norm of a worker's gradient, each by itself.

    Attributes:
        log: what was done: (tick, stage, "F" or "B", batch).
        depths: most messages in each channel between ticks, by (stage before the hop, "activations" or "gradients").
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        loss_fn: Callable[[Any, Any], Tensor],
        plan: StalenessPlan,
        optimizer: Callable[[Any], Optimizer],
        seed: int = 0,
        bn_update: BnUpdate = "forward",
        scheduler: Callable[[Optimizer], Any] | None = None,
        clip: float | None = None,
    ) -> None:
        self.plan, self.clip = plan, clip
        self.log: list[tuple[int, int, str, int]] = []
        self.depths: dict[tuple[int, str], int] = {}
        self._tick = 0
        self._losses: dict[int, float] = {}
        last = plan.stages - 1
        loss = loss_fn if isinstance(loss_fn, nn.Module) else None
        self.stages = [
            Stage(
                k,
                plan,
                as_block(module, str(k), loss if k == last else None),
                (lambda y, target: (loss_fn(y, target), {})) if k == last else None,
                seed,
                bn_update,
            )
            for k, module in enumerate(modules)
        ]
        refuse_ties(plan, [stage.parameters for stage in self.stages])
        self.channels = [(LocalChannel(k + 1), LocalChannel(k)) for k in range(last)]
        hops = {k: Hop(a, a, g, g) for k, (a, g) in enumerate(self.channels)}
        self.workers = []
        for rank in range(plan.workers):
            mine = {k: self.stages[k] for k in range(plan.stages) if plan.placement[k] == rank}
            self.workers.append(Worker(plan, mine, hops, record=self._note))
        self.optimizers = [
            optimizer(list(dict.fromkeys(p for s in w.stages.values() for p in s.block.parameters())))
            for w in self.workers
        ]
        self.schedulers = [scheduler(o) for o in self.optimizers] if scheduler else []

    def run(self, batches: Iterable[tuple[Any, Any]]) -> list[float]:
        """Train on these batches, drain, and return their losses."""
        before = self.workers[0].batches
        for batch in batches:
            self._all(batch)
        for _ in range(max(worker.drain_ticks() for worker in self.workers)):
            self._all(None)
        for rank, worker in enumerate(self.workers):
            self._update(rank, worker.take_rest())
            worker.restart()
        return [self._losses.pop(b) for b in range(before, self.workers[0].batches)]

    def _all(self, batch: tuple[Any, Any] | None) -> None:
        # A hop of delay 0 is passed inside of the tick: down the whole chain, then up again.
        of = [self.workers[rank] for rank in self.plan.placement]
        for k, worker in enumerate(of):
            worker.forward(k, batch)
        for k, worker in reversed(list(enumerate(of))):
            self._losses.update({b: float(found["loss"]) for b, found in worker.backward(k).items()})
        for rank, worker in enumerate(self.workers):
            self._update(rank, worker.end_tick())
        for k, pair in enumerate(self.channels):
            for name, channel in zip(("activations", "gradients"), pair, strict=True):
                self.depths[k, name] = max(self.depths.get((k, name), 0), channel.depth())
        self._tick += 1

    def _update(self, rank: int, updates: dict[nn.Parameter, Tensor] | None) -> None:
        if updates is None:
            return
        worker, optimizer = self.workers[rank], self.optimizers[rank]
        deposit(updates)
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.clip)
        optimizer.step()
        optimizer.zero_grad()
        worker.updated()
        if self.schedulers and worker.newest_updated:
            self.schedulers[rank].step()

    def forget(self) -> None:
        """Let stateful layers begin anew with the next batch."""
        for worker in self.workers:
            worker.forget()

    def _note(self, kind: str, stage: int, batch: int, start: float, end: float) -> None:
        self.log.append((self._tick, stage, kind, batch))
