"""Speed and memory of pipelines on two processes with one thread each, all methods in one run, in turn.

python -m benchmarks.pipeline                     everything: about 12 minutes on a quiet machine
python -m benchmarks.pipeline --quick             small numbers, to see that it works
python -m benchmarks.pipeline --parts latency     one part: speed, latency, straggler, overhead

speed      a chain of equal blocks, and ResNet-56: samples a second of every method, beside the ceiling that the plan allows;
           "both at once" trains a whole model on each process without a word between them: what two busy cores of this
           machine, which share its memory, can do at all
latency    stages that sleep instead of compute, messages that come later: what is hidden
straggler  one stage sleeps three times as long in a tenth of the ticks: what its mean speed allows, and what is reached
overhead   empty layers: milliseconds of a tick below the Trainer, and of the bare messages of a tick without the machinery

Rounds of all methods follow each other, so that a disturbance meets all of them; the medians over rounds are reported.
Results go to ``benchmarks/results/pipeline.csv``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.pipeline_runners import Alone, Bare, Flush, Method, Sleeping, Stale, delay_messages, timed
from benchmarks.results_file import ResultsFile
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.partition import balance, measure
from lightning_distopt.model_parallel.timeline import ceiling, flush_ceiling
from recipes.resnet.models import CifarResNet
from tests.ranks import run_ranks

__all__ = ["main"]

COLUMNS = (
    "part", "model", "method", "setting", "ms_a_batch", "speedup_over_naive", "ceiling", "share_of_ceiling",
    "inputs", "versions", "rounds", "machine", "versions_of", "load",
)  # fmt: skip

METHODS = [
    Method("alone"),
    Method("both at once", both=True),
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
            runners[method.name] = Alone(rank, blocks, loss, batch, method.both)
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


def _sleeping_flush(
    rank: int, world: int, pieces: int, stage_ms: float, latency_ms: float, stamps: str, batches: int
) -> float:
    """1F1B of the same model, which runs no layer twice: 7/4 of a stage's time are left for two stages."""
    part = stage_ms * 1e-3 * 7 / 8 / 3 / pieces
    layer = Sleeping(part, 2 * part)
    x = torch.zeros(4 * pieces, 4)
    blocks: list[list[nn.Module]] = [[layer] if k == rank else [] for k in range(world)]
    shared = torch.from_file(stamps, shared=True, size=2 * 4096, dtype=torch.int64).view(2, 4096)
    delay_messages(rank, latency_ms * 1e-3, shared)
    runner = Flush(rank, Method("1f1b", schedule="1f1b", pieces=pieces), blocks, nn.functional.mse_loss, (x, x))
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


def _bare(rank: int, world: int, batches: int) -> float:
    runner = Bare(rank)
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
    return 2.0 if method.both else 1.0


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
    """Stages of 25 ms that sleep: what latency costs with which delays, and when 1F1B falls behind."""
    batches, stage = (10, 5.0) if quick else (60, 25.0)
    plans = {
        "pipedream": StalenessPlan.preset("pipedream", 2, keep="input", backward_weights="current"),
        "dsp p=q=1": StalenessPlan.preset("dsp", 2),
        "dsp p=q=2": StalenessPlan.preset("dsp", 2, forward_delays=[2], gradient_delays=[2]),
    }
    with tempfile.NamedTemporaryFile() as stamps:
        stamps.truncate(2 * 4096 * 8)
        runs: dict[str, Callable[[float], float]] = {
            name: lambda late, plan=plan: max(
                run_ranks(2, _sleeping, plan, stage, late, 0.0, batches, timeout=300.0)
            )
            for name, plan in plans.items()
        }  # fmt: skip
        for pieces in (4, 8):
            runs[f"1f1b M={pieces}"] = lambda late, pieces=pieces: max(
                run_ranks(2, _sleeping_flush, pieces, stage, late, stamps.name, batches, timeout=300.0)
            )
        print(
            f"\nstages of {stage:g} ms (1f1b: the same work less the second forward): milliseconds a batch by latency of a hop"
        )
        for name, run in runs.items():
            found = {}
            for late in (0.0, 1.0, 2.0, 5.0, 10.0, 20.0):
                found[late] = 1e3 * run(late)
                write(
                    part="latency", model=f"sleeping {stage:g} ms", method=name, setting=f"{late:g} ms a hop",
                    ms_a_batch=found[late], share_of_ceiling=found[0.0] / found[late], rounds=1,
                )  # fmt: skip
            shown = "  ".join(
                f"{late:g} ms: {ms:.2f} ({100 * (ms / found[0.0] - 1):+.1f} %)" for late, ms in found.items()
            )
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
    """Empty layers, and messages without the machinery, in turn."""
    rounds, batches = (1, 50) if quick else (5, 1000)
    found: dict[str, list[float]] = {"dsp": [], "bare messages": []}
    for _ in range(rounds):
        for name, run in (("dsp", _overhead), ("bare messages", _bare)):
            found[name].append(1e3 * max(run_ranks(2, run, batches, timeout=120.0)))
    print()
    for name, ms in found.items():
        print(f"empty layers, {name}: {median(ms):.3f} ms a tick ({min(ms):.3f} to {max(ms):.3f})")
        write(part="overhead", model="empty", method=name, setting="", ms_a_batch=median(ms), rounds=rounds)


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
