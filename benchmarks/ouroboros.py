"""Speed of a language model with tied embeddings on two processes with one thread each: Ouroboros, K = 3, and what else there is.

python -m benchmarks.ouroboros                    everything: about 15 minutes on a quiet machine
python -m benchmarks.ouroboros --quick            small numbers, to see that it works
python -m benchmarks.ouroboros --model transformer_xl

order    stages that sleep instead of compute, 3 : 6 : 3 long: what the order of work alone reaches of the ceiling
speed    tokens a second of naive model parallelism, 1F1B and Ouroboros, in turn, beside the ceiling of each timetable: that of
         the plan played with the measured lengths of the stages (``lightning_distopt.model_parallel.timeline``)
network  `ddp` and Ouroboros over a link of 1 Gbit/s between two namespaces: bytes a step and tokens a second; needs root

Rounds of all methods follow each other, so that a disturbance meets all of them; the medians over rounds are reported. All
train on the same batch; `ddp` has half of its rows on each rank. Results go to ``benchmarks/results/ouroboros.csv``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.hosts import HostsError, bits_per_second, counters, enter, network
from benchmarks.language import MODELS, Model, Size, blocks_of, build, parameters_of
from benchmarks.pipeline_runners import Alone, Flush, Method, Sleeping, Stale, timed
from benchmarks.results_file import ResultsFile
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.ends import Head, authors_split, balance_ends
from lightning_distopt.model_parallel.partition import balance
from lightning_distopt.model_parallel.timeline import ceiling, flush_ceiling, period
from tests.ranks import run_ranks

__all__ = ["main"]

COLUMNS = (
    "part", "model", "method", "setting", "tokens_a_second", "ms_a_batch", "speedup_over_naive", "ceiling",
    "share_of_ceiling", "bytes_a_step", "rounds", "machine", "versions_of", "load",
)  # fmt: skip
GRAPH = {"keep": "graph", "backward_weights": "stashed"}
PLANS = {
    "naive": StalenessPlan((0, 0), (0, 0), timetable="barrier", placement=(0, 1, 0), **GRAPH),  # type: ignore[arg-type]
    "ouroboros": StalenessPlan.preset("ouroboros", 3),
    "ouroboros barrier": StalenessPlan.preset("ouroboros", 3, timetable="barrier"),
    "ouroboros graph": StalenessPlan.preset("ouroboros", 3, **GRAPH),
}
SPEED = ("alone", "naive", "1f1b M=4", "1f1b M=8", *list(PLANS)[1:])
NETWORK = ("ddp", "ouroboros")
PARTS = ("order", "speed", "network")


class Job(NamedTuple):
    """What is raced.

    Attributes:
        model: its name.
        size: of it.
        rows: of a batch.
        split: how Ouroboros cuts, "balanced" or "authors".
        methods: in turn.
        rounds: of all of them.
        batches: a method and round.
    """

    model: str
    size: Size
    rows: int
    split: str
    methods: Sequence[str]
    rounds: int
    batches: int


class Replicas:
    """The whole model on each rank, with its share of the rows, under torch's DDP."""

    def __init__(self, rank: int, world: int, model: Model, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = tuple(part.chunk(world)[rank] for part in batch)
        self.model = DistributedDataParallel(_Whole(model))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.run(2)  # buckets are built again after the first

    def run(self, batches: int) -> None:
        for _ in range(batches):
            self.model(*self.batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> None:
        pass


class _Whole(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*model.layers), model.head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.layers(x), y)  # type: ignore[no-any-return]


def lengths_of(model: Model, batch: tuple[Tensor, Tensor], repeats: int) -> list[tuple[float, float]]:
    """Return the seconds of each layer's forward and backward, the head's last: the least of several runs."""

    def once(run: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> tuple[float, float]:
        start = time.perf_counter()
        with torch.no_grad():
            run(x)
        middle = time.perf_counter()
        x = x.detach().requires_grad_(x.is_floating_point())
        y = run(x)
        torch.autograd.grad(y, [*parameters, *([x] if x.requires_grad else [])], torch.ones_like(y), allow_unused=True)
        forward = middle - start
        return forward, time.perf_counter() - middle - forward

    found, x = [], batch[0]
    runs: list[tuple[Callable[[Tensor], Tensor], nn.Module]] = [(layer, layer) for layer in model.layers]
    runs.append((lambda h: model.head(h, batch[1]), model.head))
    for run, module in runs:
        parameters = list(module.parameters())
        seen = [once(run, x, parameters) for _ in range(repeats + 1)][1:]
        found.append((min(f for f, _ in seen), max(0.0, min(b for _, b in seen))))
        with torch.no_grad():
            x = run(x)
    return found


def stage_lengths(lengths: Sequence[tuple[float, float]], cuts: Sequence[int]) -> list[tuple[float, float]]:
    """Return forward and backward of each stage, the head in the last one."""
    edges = (0, *cuts, len(lengths))
    return [(sum(f for f, _ in lengths[a:b]), sum(g for _, g in lengths[a:b])) for a, b in pairwise(edges)]


def ceiling_of(method: str, lengths: Sequence[tuple[float, float]], cuts: Sequence[int]) -> float:
    """Return the greatest speed-up over naive model parallelism with stages of these lengths."""
    if method in PLANS:
        plan, parts = PLANS[method], stage_lengths(lengths, cuts)
        last = plan.stages - 1
        again = [plan.keep == "input" and k < last for k in range(plan.stages)]
        forward, backward = [f for f, _ in parts], [g + f * a for (f, g), a in zip(parts, again, strict=True)]
        return sum(f + g for f, g in parts) / period(plan, forward, backward)
    return flush_ceiling(2, int(method.rpartition("=")[2])) if "=" in method else 1.0


def _race(rank: int, world: int, job: Job, counted: bool) -> Any:
    """Run all methods in turn; return seconds and bytes a batch of each, the lengths of layers, and the cuts."""
    batch = _batch(job)
    lengths = [lengths_of(build(job.model, job.size), batch, 3) if rank == 0 else None]
    dist.broadcast_object_list(lengths, 0)
    assert lengths[0] is not None
    costs = [f + g for f, g in lengths[0]]
    *layers, head = costs
    kinds = [type(layer).__name__ for layer in build(job.model, job.size).layers]
    cuts = authors_split(kinds, world) if job.split == "authors" else balance_ends(layers, world + 1, Head(head))
    halves = balance([*layers[:-1], layers[-1] + head], world)
    runners: dict[str, Any] = {}
    for number, method in enumerate(job.methods):
        model = build(job.model, job.size)
        if method in PLANS:
            tag = 64 * (number + 1)  # torch's schedules use the first tags
            runner: Any = Stale(rank, PLANS[method], blocks_of(model.layers, cuts), model.head, batch, tag)
        elif "=" in method:
            schedule = Method(method, schedule="1f1b", pieces=int(method.rpartition("=")[2]))
            tied = [p for p in parameters_of(*model.layers) if any(p is q for q in model.head.parameters())]
            runner = Flush(rank, schedule, blocks_of(model.layers, halves), model.head, batch, tied)
        elif method == "ddp":
            runner = Replicas(rank, world, model, batch)
        else:
            runner = Alone(rank, [model.layers], model.head, batch)
        runners[method] = runner
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    sent: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(job.rounds):
        for name, runner in runners.items():
            before = counters() if counted else (0, 0)
            seconds[name].append(timed(runner, job.batches))
            sent[name].append(sum(b - a for a, b in zip(before, counters() if counted else before, strict=True)))
    for runner in runners.values():
        runner.close()
    medians = {name: (median(seconds[name]), median(sent[name]) / job.batches) for name in runners}
    return medians, lengths[0], list(cuts)


def _batch(job: Job) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(job.size.vocabulary, (job.rows, job.size.length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _sleep(rank: int, world: int, plan: StalenessPlan, seconds: Sequence[float], batches: int) -> float:
    layers = [[Sleeping(length, 2 * length)] for length in seconds]
    x = torch.zeros(4, 4)
    runner = Stale(rank, plan, layers, nn.functional.mse_loss, (x, x), 0)
    runner.run(4)
    found = timed(runner, batches)
    runner.close()
    return found


def order(write: Callable[..., None], quick: bool) -> None:
    """Stages that sleep."""
    unit, batches = (2e-3, 8) if quick else (10e-3, 40)
    lengths = (3 * unit, 6 * unit, 3 * unit)
    found = {name: max(run_ranks(2, _sleep, plan, lengths, batches, timeout=300.0)) for name, plan in PLANS.items()}
    print(f"\nforwards that sleep {', '.join(f'{1e3 * s:g}' for s in lengths)} ms, backwards twice as long")
    for name, seconds in found.items():
        limit, faster = ceiling(PLANS[name], lengths=lengths), found["naive"] / seconds
        print(f"  {name:<20}{1e3 * seconds:>10.1f}{faster:>10.2f}{limit:>10.2f}{faster / limit:>8.2f}")
        write(
            part="order", model="sleeping", method=name, setting="3 : 6 : 3", ms_a_batch=1e3 * seconds,
            speedup_over_naive=faster, ceiling=limit, share_of_ceiling=faster / limit, rounds=1,
        )  # fmt: skip


def speed(write: Callable[..., None], job: Job) -> None:
    """All methods on this machine."""
    (medians, lengths, cuts), _ = run_ranks(2, _race, job, False, timeout=3600.0)
    naive = medians["naive"][0]
    parts = stage_lengths(lengths, cuts)
    shown = ", ".join(f"{1e3 * f:.0f}+{1e3 * g:.0f}" for f, g in parts)
    print(f"\n{job.model}, 3 modules cut at {cuts}, ms forward+backward: {shown}")
    print(f"  {'':<20}{'tokens/s':>10}{'ms':>10}{'x naive':>10}{'ceiling':>10}{'share':>8}")
    for method, (seconds, _) in medians.items():
        limit, faster = ceiling_of(method, lengths, cuts), naive / seconds
        tokens = job.rows * job.size.length / seconds
        print(f"  {method:<20}{tokens:>10.0f}{1e3 * seconds:>10.1f}{faster:>10.2f}{limit:>10.2f}{faster / limit:>8.2f}")
        write(
            part="speed", model=job.model, method=method, setting=f"cuts {cuts}", tokens_a_second=tokens,
            ms_a_batch=1e3 * seconds, speedup_over_naive=faster, ceiling=limit, share_of_ceiling=faster / limit,
            rounds=job.rounds,
        )  # fmt: skip


def over_the_network(write: Callable[..., None], job: Job, bandwidth: str) -> None:
    """`ddp` and Ouroboros over one link."""
    try:
        with network(2, bits_per_second(bandwidth)) as names:
            results = run_ranks(2, _race, job, True, timeout=3600.0, before=partial(enter, names))
    except HostsError as error:
        print(f"\nnetwork: left out. {error}", file=sys.stderr)
        return
    print(
        f"\n{job.model} over {bandwidth}: tokens a second, ms a step, bytes a step (both ways, protocol headers included)"
    )
    for method in job.methods:
        seconds, sent = results[0][0][method]
        tokens = job.rows * job.size.length / seconds
        print(f"  {method:<20}{tokens:>10.0f}{1e3 * seconds:>10.1f}{sent:>14,.0f}")
        write(
            part="network", model=job.model, method=method, setting=bandwidth, tokens_a_second=tokens,
            ms_a_batch=1e3 * seconds, bytes_a_step=sent, rounds=job.rounds,
        )  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
    """Run the parts and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--split", choices=("balanced", "authors"), default="balanced")
    parser.add_argument("--bandwidth", default="1gbit", help="of the link, as in 100mbit (default: 1gbit)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/ouroboros.csv"))
    given = parser.parse_args(args)
    file = ResultsFile(given.results, COLUMNS, ("part", "model", "method", "setting"))
    write = file.record

    size, rows, rounds, batches = (Size(256, 8, 256, 128), 16, 7, 6)
    if given.quick:
        size, rows, rounds, batches = (Size(64, 4, 32, 16), 8, 2, 2)
    job = Job(given.model, size, rows, given.split, SPEED, rounds, batches)
    if "order" in given.parts:
        order(write, given.quick)
    if "speed" in given.parts:
        speed(write, job)
    if "network" in given.parts:
        over_the_network(write, job._replace(methods=NETWORK), given.bandwidth)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
