"""Ways to train on two processes, for benchmarks: each is made once, then runs some batches in steady state."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules
from torch.utils.checkpoint import checkpoint

from lightning_distopt.exchange import Meter
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.block import Block
from lightning_distopt.model_parallel.connect import connect, settle
from lightning_distopt.model_parallel.stage import Stage
from lightning_distopt.model_parallel.worker import Worker, deposit

__all__ = ["Alone", "Bare", "Flush", "Method", "Sleeping", "Stale", "delay_messages", "timed"]

CPU = torch.device("cpu")


class Method(NamedTuple):
    """One way to train: a plan's name, or a schedule of torch with micro-batches."""

    name: str
    plan: str = ""
    schedule: str = ""
    pieces: int = 0
    again: bool = False  # activation checkpointing
    both: bool = False  # a whole model on each process


class Sleeping(nn.Module):
    """Passes its input on, and sleeps in forward and in backward; a parameter makes it trainable.

    Args:
        forward: seconds.
        backward: seconds.
        slow: share of the runs, drawn at random, that take three times as long.
    """

    def __init__(self, forward: float, backward: float, slow: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds, self.slow, self.draw = (forward, backward), slow, random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        factor = 3.0 if self.slow and self.draw.random() < self.slow else 1.0
        return _Sleep.apply(x * self.weight, self.seconds[0] * factor, self.seconds[1] * factor)  # type: ignore[no-any-return]


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


class Stale:
    """Our engine on this rank, with the stages that the plan gives it; filled at first, never drained between rounds."""

    def __init__(
        self, rank: int, plan: StalenessPlan, blocks: Sequence[Sequence[nn.Module]], loss: Callable[..., Tensor],
        batch: tuple[Tensor, Tensor], tag: int, latency: float = 0.0,
    ) -> None:  # fmt: skip
        last = plan.stages - 1
        stages = {
            k: Stage(
                k,
                plan,
                Block(
                    {f"{k}_{i}": layer for i, layer in enumerate(blocks[k])},
                    loss if k == last and isinstance(loss, nn.Module) else None,
                ),
                (lambda y, t: (loss(y, t), {})) if k == last else None,
            )
            for k in range(plan.stages)
            if plan.placement[k] == rank
        }
        self.stage = next(iter(stages.values()))
        hops = connect(plan, plan.placement, rank, Meter(), 120.0, CPU, latency=latency, first_tag=tag)
        self.worker = Worker(plan, stages, hops)
        self.optimizer = _sgd(*(stage.block for stage in stages.values()))
        self.batch = batch if rank == 0 else None
        self.run(plan.ticks(1))

    def run(self, batches: int) -> None:
        for _ in range(batches):
            updates = self.worker.run_tick(self.batch).updates
            if updates is not None:
                deposit(updates)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.worker.updated()
            if self.worker.plan.timetable == "barrier" and max(self.worker.plan.staleness):
                dist.barrier()

    def close(self) -> None:
        for _ in range(self.worker.drain_ticks()):
            if self.worker.run_tick().updates is not None:
                self.worker.updated()
        settle(self.worker.hops)


class Flush:
    """A schedule of torch on this rank; what the first and the last rank share is kept equal by the sum of its gradients."""

    def __init__(
        self, rank: int, method: Method, blocks: Sequence[Sequence[nn.Module]], loss: Callable[..., Tensor],
        batch: tuple[Tensor, Tensor], shared: Sequence[nn.Parameter] = (),
    ) -> None:  # fmt: skip
        last = rank == len(blocks) - 1
        self.shared = shared if rank == 0 or last else ()
        module = nn.Sequential(*blocks[rank])
        stage = pipelining.PipelineStage(_Again(module) if method.again else module, rank, len(blocks), CPU)
        kind = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}[method.schedule]
        self.schedule = kind(stage, method.pieces, loss_fn=loss)
        self.optimizer = _sgd(module, *((loss,) if last and isinstance(loss, nn.Module) else ()))
        self.inputs = (batch[0],) if rank == 0 else ()
        self.options = {"target": batch[1], "losses": []} if last else {}
        self.run(1)

    def run(self, batches: int) -> None:
        for _ in range(batches):
            if "losses" in self.options:
                self.options["losses"] = []
            self.schedule.step(*self.inputs, **self.options)
            for parameter in self.shared:
                dist.all_reduce(parameter.grad)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> None:
        pass


class _Again(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


class Alone:
    """The whole model on rank 0, as anybody would train it; the other rank does nothing, or trains half of the batches."""

    def __init__(
        self,
        rank: int,
        blocks: Sequence[Sequence[nn.Module]],
        loss: Callable[..., Tensor],
        batch: tuple[Tensor, Tensor],
        both: bool = False,
    ) -> None:
        self.model = nn.Sequential(*(layer for block in blocks for layer in block)) if rank == 0 or both else None
        self.share = 2 if both else 1
        self.loss, self.batch = loss, batch
        parts = (self.model, *((loss,) if isinstance(loss, nn.Module) else ())) if self.model else ()
        self.optimizer = _sgd(*parts) if self.model else None
        self.run(2)

    def run(self, batches: int) -> None:
        if self.model is None or self.optimizer is None:
            return
        for _ in range(batches // self.share):
            self.loss(self.model(self.batch[0]), self.batch[1]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> None:
        pass


def _sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    parameters = dict.fromkeys(p for module in modules for p in module.parameters())
    return torch.optim.SGD(list(parameters), lr=1e-4, momentum=0.9)


def timed(runner: Any, batches: int) -> float:
    """Return seconds a batch: from a common start until the last rank has done its part."""
    dist.barrier()
    start = time.perf_counter()
    runner.run(batches)
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds) / batches


class Bare:
    """The messages of a tick of two stages, with nothing around them: one to the other rank, and its one of the tick before."""

    def __init__(self, rank: int) -> None:
        self.rank, self.peer = rank, 1 - rank
        self.posted: deque[tuple[Any, Tensor]] = deque()
        self.sent: deque[tuple[Any, Tensor]] = deque()
        self.post()
        self.send()

    def post(self) -> None:
        buffer = torch.empty(512, dtype=torch.uint8)
        self.posted.append((dist.irecv(buffer, self.peer, tag=self.peer), buffer))

    def send(self) -> None:
        buffer = torch.zeros(512, dtype=torch.uint8)
        self.sent.append((dist.isend(buffer, self.peer, tag=self.rank), buffer))
        while len(self.sent) > 4:
            self.sent.popleft()[0].wait()

    def receive(self) -> None:
        self.posted.popleft()[0].wait()
        self.post()

    def run(self, batches: int) -> None:
        for _ in range(batches):
            for work in (self.send, self.receive) if self.rank == 0 else (self.receive, self.send):
                work()

    def close(self) -> None:
        self.posted[0][0].wait()
        for work, _ in self.sent:
            work.wait()


class _Late(NamedTuple):
    """A message that counts as arrived ``latency`` seconds after it was sent."""

    work: Any
    sent_at: Tensor
    latency: float

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.latency - (time.monotonic_ns() - int(self.sent_at)) * 1e-9))


def delay_messages(rank: int, latency: float, stamps: Tensor) -> None:
    """Let torch's schedules of two stages on this machine have a latency a hop, as :class:`Receiver` has for ours.

    Args:
        rank: of this process, 0 or 1.
        latency: seconds.
        stamps: (2, messages) of int64 in shared memory: when rank r sent its message i, which is the i-th that 1 - r receives.
    """
    sent, received = itertools.count(), itertools.count()

    def start(op: dist.P2POp) -> Any:
        if op.op is dist.isend:
            stamps[rank, next(sent) % stamps.shape[1]] = time.monotonic_ns()
            return dist.isend(op.tensor, op.peer, op.group, op.tag)
        work = dist.irecv(op.tensor, op.peer, op.group, op.tag)
        return _Late(work, stamps[1 - rank, next(received) % stamps.shape[1]], latency)

    schedules._batch_p2p = lambda ops, desc=None: [start(op) for op in ops]
