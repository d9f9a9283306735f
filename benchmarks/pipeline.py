"""Speed and memory of pipelines on two processes with one thread each, all methods in one run, in turn.

python -m benchmarks.pipeline                     everything: about 12 minutes on a quiet machine
python -m benchmarks.pipeline --quick             small numbers, to see that it works
python -m benchmarks.pipeline --parts latency     one part: speed, latency, straggler, overhead

speed      a chain of equal blocks, and ResNet-56: samples a second of every method, beside the ceiling that the plan allows
latency    stages that sleep instead of compute, messages that come later: what is hidden
straggler  one stage sleeps three times as long in a tenth of the ticks: what its mean speed allows, and what is reached
overhead   empty layers: milliseconds of a tick below the Trainer

Rounds of all methods follow each other, so that a disturbance meets all of them; the medians over rounds are reported.
Results go to ``benchmarks/results/pipeline.csv``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.utils.checkpoint import checkpoint

from benchmarks.results_file import ResultsFile
from lightning_distopt.exchange import Meter
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.block import Block
from lightning_distopt.model_parallel.connect import connect, settle
from lightning_distopt.model_parallel.partition import balance, measure
from lightning_distopt.model_parallel.stage import Stage
from lightning_distopt.model_parallel.timeline import ceiling, flush_ceiling
from lightning_distopt.model_parallel.worker import Worker, deposit
from recipes.resnet.models import CifarResNet
from tests.ranks import run_ranks

__all__ = ["main"]

COLUMNS = (
    "part", "model", "method", "setting", "ms_a_batch", "speedup_over_naive", "ceiling", "share_of_ceiling",
    "inputs", "versions", "rounds", "machine", "versions_of", "load",
)  # fmt: skip
CPU = torch.device("cpu")


class Method(NamedTuple):
    """One way to train: a plan's name, or a schedule of torch with micro-batches."""

    name: str
    plan: str = ""
    schedule: str = ""
    pieces: int = 0
    again: bool = False  # activation checkpointing


METHODS = [
    Method("alone"),
    Method("naive", "naive"),
    *(Method(f"gpipe M={m}", schedule="gpipe", pieces=m) for m in (4, 8)),
    *(Method(f"1f1b M={m}", schedule="1f1b", pieces=m) for m in (4, 8)),
    *(Method(f"1f1b M={m} checkpointed", schedule="1f1b", pieces=m, again=True) for m in (4, 8)),
    Method("ddg", "ddg"),
    Method("features_replay", "features_replay"),
    Method("pipedream", "pipedream"),
    Method("dsp", "dsp"),
]


# ---- models --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two matrices around a shortcut: equal blocks for the chain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.b(torch.relu(self.a(x)))


def chain(blocks: int, width: int) -> list[nn.Module]:
    """Return equal blocks; the last one's output is compared with a target of the same shape."""
    torch.manual_seed(0)
    return [Residual(width) for _ in range(blocks)]


class Head(nn.Module):
    """Mean over positions, then a linear layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mean(dim=(2, 3)))


def resnet(blocks: int) -> list[nn.Module]:
    """Return a CIFAR ResNet of depth ``6 blocks + 2`` as layers."""
    torch.manual_seed(0)
    whole = CifarResNet(blocks, 10)
    return [nn.Sequential(whole.stem, whole.norm, nn.ReLU()), *whole.blocks, Head(whole.head)]


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


# ---- runners: construct once, then run(n) batches in steady state --------------------------------------------------


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
    """The whole model on rank 0, as anybody would train it; the other rank does nothing."""

    def __init__(
        self,
        rank: int,
        blocks: Sequence[Sequence[nn.Module]],
        loss: Callable[..., Tensor],
        batch: tuple[Tensor, Tensor],
    ) -> None:
        self.model = nn.Sequential(*(layer for block in blocks for layer in block)) if rank == 0 else None
        self.loss, self.batch = loss, batch
        parts = (self.model, *((loss,) if isinstance(loss, nn.Module) else ())) if self.model else ()
        self.optimizer = _sgd(*parts) if self.model else None
        self.run(1)

    def run(self, batches: int) -> None:
        if self.model is None or self.optimizer is None:
            return
        for _ in range(batches):
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


# ---- parts ---------------------------------------------------------------------------------------------------------


def _speed(rank: int, world: int, model: str, quick: bool, rounds: int, batches: int) -> Any:
    made: Callable[[], list[nn.Module]]
    if model == "chain":
        width, size = (64, 32) if quick else (512, 256)
        made, loss = (lambda: chain(8, width)), nn.functional.mse_loss
        batch = (torch.randn(size, width), torch.randn(size, width))
    else:
        made, loss = (lambda: resnet(1 if quick else 9)), nn.functional.cross_entropy
        size = 8 if quick else 64
        batch = (torch.randn(size, 3, 32, 32), torch.randint(10, (size,)))
    costs = measure({str(i): layer for i, layer in enumerate(made())}, batch[0], 2) if rank == 0 else []
    cuts = [balance([c.milliseconds for c in costs], world) if rank == 0 else None]
    dist.broadcast_object_list(cuts, 0)
    assert cuts[0] is not None
    edges = (0, *cuts[0], len(made()))
    runners: dict[str, Any] = {}
    for number, method in enumerate(METHODS):
        layers = made()
        blocks = [layers[a:b] for a, b in itertools.pairwise(edges)]
        if method.plan:
            plan = StalenessPlan.preset(method.plan, world)
            runners[method.name] = Stale(rank, plan, blocks, loss, batch, 64 * number)
        elif method.schedule:
            runners[method.name] = Flush(rank, method, blocks, loss, batch)
        else:
            runners[method.name] = Alone(rank, blocks, loss, batch)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            seconds[name].append(timed(runner, batches))
    held = {n: (r.stage.peak, r.stage.stash.peak) for n, r in runners.items() if isinstance(r, Stale)}
    for runner in runners.values():
        runner.close()
    return {name: median(values) for name, values in seconds.items()}, held, list(cuts[0])


def _sleeping(
    rank: int, world: int, plan: StalenessPlan, stage_ms: float, latency_ms: float, slow: float, batches: int
) -> float:
    again = plan.keep == "input" and rank < world - 1
    part = stage_ms * 1e-3 / (4 if again else 3)
    # The last stage runs its layers once; all stages take the same time.
    layer = Sleeping(part, 2 * part, slow if rank == 1 else 0.0)
    x = torch.zeros(4, 4)
    blocks: list[list[nn.Module]] = [[layer] if k == rank else [] for k in range(world)]
    runner = Stale(rank, plan, blocks, nn.functional.mse_loss, (x, x), 0, latency_ms * 1e-3)
    runner.run(2 * max(plan.staleness) + 2)
    seconds = timed(runner, batches)
    runner.close()
    return seconds


def _overhead(rank: int, world: int, batches: int) -> float:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    x = torch.zeros(4, 4)
    blocks: list[list[nn.Module]] = [[Empty()] if k == rank else [] for k in range(world)]
    runner = Stale(rank, StalenessPlan.preset("dsp", world), blocks, nn.functional.mse_loss, (x, x), 0)
    runner.run(50)
    seconds = timed(runner, batches)
    runner.close()
    return seconds


def limit_of(method: Method, stages: int = 2) -> float:
    """Return the greatest speed-up over naive model parallelism."""
    if method.plan:
        return ceiling(StalenessPlan.preset(method.plan, stages))
    if method.schedule:
        return flush_ceiling(stages, method.pieces) * (3 / 4 if method.again else 1)
    return 1.0


def speed(write: Callable[..., None], quick: bool) -> None:
    """All methods on two models."""
    rounds, batches = (2, 4) if quick else (7, 12)
    for model in ("chain", "resnet56"):
        (medians, held, cuts), _ = run_ranks(2, _speed, model, quick, rounds, batches, timeout=1200.0)
        naive = medians["naive"]
        print(f"\n{model}, cut at {cuts}: milliseconds a batch, speed-up over naive, ceiling, share of it")
        for method in METHODS:
            faster, limit = naive / medians[method.name], limit_of(method)
            inputs, versions_held = held.get(method.name, ("", ""))
            print(
                f"  {method.name:<24}{1e3 * medians[method.name]:>8.2f}{faster:>8.2f}{limit:>8.2f}{faster / limit:>8.2f}"
                f"   inputs {inputs or '-'}, versions {versions_held or '-'}"
            )
            write(
                part="speed", model=model, method=method.name, setting="", ms_a_batch=1e3 * medians[method.name],
                speedup_over_naive=faster, ceiling=limit, share_of_ceiling=faster / limit, inputs=inputs,
                versions=versions_held, rounds=rounds,
            )  # fmt: skip


def latency(write: Callable[..., None], quick: bool) -> None:
    """Stages of 25 ms that sleep: what latency costs with which delays."""
    batches, stage = (10, 5.0) if quick else (60, 25.0)
    plans = {
        "pipedream": StalenessPlan.preset("pipedream", 2, keep="input", backward_weights="current"),
        "dsp p=q=1": StalenessPlan.preset("dsp", 2),
        "dsp p=q=2": StalenessPlan.preset("dsp", 2, forward_delays=[2], gradient_delays=[2]),
    }
    print(f"\nstages of {stage:g} ms: milliseconds a batch by latency of a hop")
    for name, plan in plans.items():
        found = {}
        for late in (0.0, 1.0, 5.0, 10.0, 20.0):
            found[late] = 1e3 * max(run_ranks(2, _sleeping, plan, stage, late, 0.0, batches, timeout=300.0))
            write(
                part="latency", model=f"sleeping {stage:g} ms", method=name, setting=f"{late:g} ms a hop",
                ms_a_batch=found[late], share_of_ceiling=found[0.0] / found[late], rounds=1,
            )  # fmt: skip
        shown = "  ".join(f"{late:g} ms: {ms:.2f} ({100 * (ms / found[0.0] - 1):+.1f} %)" for late, ms in found.items())
        print(f"  {name:<12}{shown}")


def straggler(write: Callable[..., None], quick: bool) -> None:
    """One stage three times slower in a tenth of its work: mean speed, and what is reached."""
    batches, stage, slow = (20, 5.0, 0.1) if quick else (200, 25.0, 0.1)
    print(f"\nstages of {stage:g} ms, one of them three times slower in {100 * slow:g} % of its runs")
    for name, plan in (
        ("dsp p=q=1", StalenessPlan.preset("dsp", 2)),
        ("dsp p=q=2", StalenessPlan.preset("dsp", 2, forward_delays=[2], gradient_delays=[2])),
    ):
        even = 1e3 * max(run_ranks(2, _sleeping, plan, stage, 5.0, 0.0, batches, timeout=300.0))
        uneven = 1e3 * max(run_ranks(2, _sleeping, plan, stage, 5.0, slow, batches, timeout=300.0))
        share = even * (1 + 2 * slow) / uneven
        print(f"  {name}: {even:.2f} ms even, {uneven:.2f} ms uneven: {100 * share:.0f} % of what the mean allows")
        write(
            part="straggler", model=f"sleeping {stage:g} ms", method=name, setting="3 x in 10 %", ms_a_batch=uneven,
            share_of_ceiling=share, rounds=1,
        )  # fmt: skip


def overhead(write: Callable[..., None], quick: bool) -> None:
    """Empty layers."""
    ms = 1e3 * max(run_ranks(2, _overhead, 50 if quick else 1000, timeout=120.0))
    print(f"\nempty layers: {ms:.3f} ms a tick")
    write(part="overhead", model="empty", method="dsp", setting="", ms_a_batch=ms, rounds=1)


PARTS = {"speed": speed, "latency": latency, "straggler": straggler, "overhead": overhead}


def main(args: Sequence[str] | None = None) -> int:
    """Run the parts and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/pipeline.csv"))
    given = parser.parse_args(args)
    file = ResultsFile(given.results, COLUMNS, ("part", "model", "method", "setting"))
    write = file.record

    for part in given.parts:
        PARTS[part](write, given.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
