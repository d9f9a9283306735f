"""The time of a training step on hosts with a limited link: one run of one method, measured on every host.

The model is a CIFAR ResNet-20, wide enough for about 8 million parameters in 59 tensors, on images of 8 x 8 pixels: many
parameters for little arithmetic, as where communication hurts. Images and labels are random numbers drawn once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.hosts import counters, enter, sent_twice
from benchmarks.methods import method, sgd
from lightning_distopt.exchange import Meter
from recipes.resnet.models import CifarResNet
from tests.ranks import run_ranks

__all__ = ["WIDTH", "Job", "Sample", "calibrate", "data", "measure", "model", "parameters", "reason"]

WIDTH = 88  # 8.1 million parameters
_SIDE = 8
_BATCHES = 4
_FEWEST = 3  # steps that are timed, however slow they are


class Job(NamedTuple):
    """One run.

    Args:
        method: a name that :func:`benchmarks.methods.method` knows.
        batch: images of one host in a step.
        steps: timed steps, at most.
        seconds: the timed steps take about this long at most (but are at least three).
        seed: of the initial weights and the data.
        width: of the model.
    """

    method: str
    batch: int
    steps: int
    seconds: float
    seed: int = 0
    width: int = WIDTH


class Sample(NamedTuple):
    """What a run measured: means over the hosts.

    Args:
        steps: wall-clock seconds of each timed step.
        sent: bytes that a host's interface sent, a step; headers included.
        codec: seconds of encoding and decoding, a step; as our meter times them, so 0 for foreign methods.
        exposed: seconds of waiting for the network, a step; the same.
        cpu: seconds of processor time of all threads of a host, a step.
        delayed: seconds in which the training thread could have run but had no core, a step: how disturbed the run was, by
            other programs and by the host's own network threads.
        resent: segments that TCP sent again in all timed steps, all hosts together.
    """

    steps: list[float]
    sent: float
    codec: float
    exposed: float
    cpu: float
    delayed: float
    resent: int


def measure(names: Sequence[str], job: Job, timeout: float) -> Sample:
    """Run a job with one process on each host.

    Raises:
        AssertionError: with the traceback of the host that failed first, or that hosts were still running after
            ``timeout`` seconds, and where.
    """
    samples: list[Sample] = run_ranks(len(names), _train, job, timeout=timeout, before=partial(enter, names))
    steps = [mean(times) for times in zip(*(sample.steps for sample in samples), strict=True)]
    sums = [[float(sample[i]) for sample in samples] for i in range(1, 6)]
    return Sample(steps, *map(mean, sums), resent=sum(sample.resent for sample in samples))


def reason(error: str) -> str:
    """Return one line that says why a run failed: the error at the end of a traceback, or that it took too long."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    line = lines[0] if "still ran after" in lines[0] else lines[-1]
    return line[:200]


def calibrate(names: Sequence[str], seconds: float, seed: int, width: int) -> int:
    """Return the batch with which a step without communication takes about ``seconds``.

    It goes by processor time, which is the wall-clock time of a machine that nobody else uses, and right on others too.
    """
    small, large = 2, 12
    times = [measure(names, Job("none", n, 12, 10.0, seed, width), 120.0).cpu for n in (small, large)]
    each = max((times[1] - times[0]) / (large - small), 1e-6)
    return min(512, max(1, round((seconds - times[0]) / each) + small))


def parameters(width: int) -> int:
    """Return the number of the model's parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model(width).parameters())


def model(width: int) -> CifarResNet:
    """Return the model that all methods train."""
    return CifarResNet(3, 10, in_channels=1, width=width)


def _train(rank: int, world: int, job: Job) -> Sample:
    torch.manual_seed(job.seed)
    net, meter = model(job.width), Meter()
    replica = method(job.method).build(net, sgd(net, 0.01), meter)
    batches = data(job, rank)
    for i in range(replica.warm_up):
        start = time.perf_counter()
        replica.step(*batches[i % _BATCHES])
    number = _steps(job, time.perf_counter() - start)
    dist.barrier()

    before = _figures(meter)
    times = [time.perf_counter()]
    for i in range(number):
        replica.step(*batches[i % _BATCHES])
        times.append(time.perf_counter())
    after = _figures(meter)

    *each, resent = [new - old for new, old in zip(after, before, strict=True)]
    steps = [end - begin for begin, end in pairwise(times)]
    return Sample(steps, *(figure / number for figure in each), resent=int(resent))


def data(job: Job, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of a host."""
    draw = torch.Generator().manual_seed(job.seed * 1000 + rank)
    return [
        (
            torch.randn(job.batch, 1, _SIDE, _SIDE, generator=draw),
            torch.randint(10, (job.batch,), generator=draw),
        )
        for _ in range(_BATCHES)
    ]


def _steps(job: Job, expected: float) -> int:
    """Return how many steps to time, the same on all hosts."""
    slowest = torch.tensor(expected)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return min(job.steps, max(_FEWEST, int(job.seconds / float(slowest))))


def _figures(meter: Meter) -> tuple[float, ...]:
    """Return the running counters behind a :class:`Sample`, in its order."""
    codec, exposed = meter.seconds["encode"], meter.seconds["exchange"]
    return counters()[0], codec, exposed, time.process_time(), _waited_for_a_core(), sent_twice()


def _waited_for_a_core() -> float:
    """Seconds that this thread has been runnable without running; 0 where the kernel does not say."""
    path = Path("/proc/thread-self/schedstat")
    return int(path.read_text().split()[1]) * 1e-9 if path.exists() else 0.0
