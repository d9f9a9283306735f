"""The time to a stated accuracy on hosts with limited links: what a faster step is worth if it learns as much.

A ResNet-8 of width 32 (0.3 million parameters) learns 5,000 images of CIFAR-10, halved to 16 x 16 pixels, half of them on
each of two hosts, for 8 epochs with a cosine schedule. Every method has the same budget: a grid of learning rates, searched
at the first bandwidth with the first seed; its best rate is then run at the other bandwidths and with the other seeds. The
clock counts an epoch as its number of steps times their median duration, so that a disturbance of a few steps counts for no
method and evaluation, which all do alike, for none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from benchmarks.hosts import bits_per_second, enter, network
from benchmarks.methods import METHODS, method, sgd
from benchmarks.network_report import cells
from benchmarks.results_file import ResultsFile, load, machine, versions
from benchmarks.step_time import reason
from lightning_distopt.exchange import Meter
from recipes.resnet import DigitsData, ImageFolderData
from recipes.resnet.data.in_memory import InMemoryImages
from recipes.resnet.models import CifarResNet
from tests.ranks import run_ranks

__all__ = ["BASELINES", "add_arguments", "results", "run"]

COLUMNS = (
    "data", "bandwidth", "method", "lr", "seed", "epochs", "width", "failure", "accuracy", "curve", "load", "versions", "machine",
)  # fmt: skip
KEY = COLUMNS[:7]
BASELINES = ("ddp", "ddp-fp16", "bf16", "ddp-powersgd:1")
RATES = (0.05, 0.1, 0.2)
_BATCH = 32  # images of one host in a step
_SIDE = 16  # pixels: less arithmetic for as many bytes
_HOSTS = 2


class Training(NamedTuple):
    """One run: all that an accuracy depends on, and the bandwidth, on which its time depends."""

    data: str
    bandwidth: str
    method: str
    lr: float
    seed: int
    epochs: int
    width: int

    def row(self) -> dict[str, Any]:
        """Return the columns that tell this run apart."""
        return {**self._asdict(), "lr": f"{self.lr:g}"}


class Curve(NamedTuple):
    """Training seconds since the start and accuracy, after each epoch."""

    seconds: list[float]
    accuracies: list[float]


def results(path: Path) -> ResultsFile:
    """Return the file of the curves."""
    return ResultsFile(path, COLUMNS, KEY)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what concerns `--accuracy`."""
    group = parser.add_argument_group("time to accuracy", __doc__)
    group.add_argument("--accuracy", action="store_true", help="measure this instead of step times, on two hosts")
    group.add_argument("--data", help="unpacked CIFAR-10 image folder with `train` and `test` in it; without: digits")
    group.add_argument("--epochs", type=int, default=8, help="of every run (default: %(default)s)")
    group.add_argument("--rates", default=",".join(map(str, RATES)), help="the grid of rates (default: %(default)s)")
    group.add_argument("--seeds", default="0", help="the first searches the rate (default: %(default)s)")
    group.add_argument(
        "--accuracy-bandwidths",
        default="unshaped,1gbit,100mbit",
        help="the first searches the rate; unshaped links get no column of times (default: %(default)s)",
    )
    group.add_argument("--accuracy-width", type=int, default=32, help="of the model (default: %(default)s)")
    group.add_argument("--run-timeout", type=float, default=900.0, help="seconds of a run (default: %(default)s)")


def run(options: argparse.Namespace, file: ResultsFile, step_times: ResultsFile, console: Console) -> None:
    """Train what is missing of the baselines and the given methods (default: our four with the shortest steps)."""
    train, evaluation = _load(options.data, console)
    methods = options.methods or (*BASELINES, *_fastest(step_times.rows(), 4))
    bandwidths = tuple(options.accuracy_bandwidths.split(","))
    trainings = _plan(options, methods, bandwidths, file)
    facts = {"versions": versions(), "machine": machine()}
    started, made = time.perf_counter(), 0
    for training in trainings:
        if file.find(**training.row()) is not None:
            continue
        before = load()
        row = {**training.row(), "load": before, **facts}
        with network(_HOSTS, bits_per_second(training.bandwidth)) as names:
            try:
                curve = _train_on_hosts(names, training, train, evaluation, options.run_timeout)
            except AssertionError as error:
                row["failure"] = reason(str(error))
            else:
                row["accuracy"] = f"{curve.accuracies[-1]:.4f}"
                row["curve"] = " ".join(f"{s:.2f}:{a:.4f}" for s, a in zip(*curve, strict=True))
        file.append(row)
        made += 1
        each = (time.perf_counter() - started) / made / 60
        left = _left(options, methods, bandwidths, file)
        console.print(
            f"{training.bandwidth:>9}  {training.method:20} lr {training.lr:<5g} seed {training.seed}  "
            f"{row.get('failure') or 'accuracy ' + row['accuracy']}  [dim]{left} runs, about {left * each:.0f} min left[/dim]",
            highlight=False,
        )


def _plan(
    options: argparse.Namespace, methods: Sequence[str], bandwidths: Sequence[str], file: ResultsFile
) -> Iterator[Training]:
    """Yield the grid at the first bandwidth with the first seed, then the best rates everywhere else."""
    data = "cifar10" if options.data else "digits"
    rates = [float(rate) for rate in options.rates.split(",")]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    of = partial(Training, data, epochs=options.epochs, width=options.accuracy_width)
    for rate in rates:
        for name in methods:
            yield of(bandwidths[0], name, rate, seeds[0])
    for seed in seeds:
        for bandwidth in bandwidths:
            for name in methods:
                grid = [of(bandwidths[0], name, rate, seeds[0]) for rate in rates]
                best = best_rate([file.find(**t.row()) for t in grid])
                if best is not None and (seed, bandwidth) != (seeds[0], bandwidths[0]):
                    yield of(bandwidth, name, best, seed)


def _left(options: argparse.Namespace, methods: Sequence[str], bandwidths: Sequence[str], file: ResultsFile) -> int:
    rates, seeds = options.rates.count(",") + 1, options.seeds.count(",") + 1
    data = "cifar10" if options.data else "digits"
    done = [row for row in file.rows() if row["data"] == data and row["method"] in methods]
    return max(0, len(methods) * (rates + len(bandwidths) * seeds - 1) - len(done))


def best_rate(grid: Sequence[dict[str, str] | None]) -> float | None:
    """Return the rate with the highest accuracy at the end; ``None`` if no run of the grid reached its end."""
    ended = [row for row in grid if row is not None and row["accuracy"]]
    return float(max(ended, key=lambda row: float(row["accuracy"]))["lr"]) if ended else None


def _fastest(rows: list[dict[str, str]], number: int) -> list[str]:
    """Return our methods with the shortest steps at the slowest bandwidth that has been measured on two hosts."""
    ours = [cell for cell in cells(rows) if cell.hosts == _HOSTS and METHODS[cell.method].family == "ours"]
    return [cell.method for cell in sorted(ours, key=lambda cell: (cell.bits, cell.median))][:number]


def _load(folder: str | None, console: Console) -> tuple[InMemoryImages, InMemoryImages]:
    if folder is None:
        console.print("No `--data`: scikit-learn's digits instead of CIFAR-10, which tell the methods apart badly.")
        return DigitsData().load()
    data = ImageFolderData(
        folder, val_split="test", image_size=_SIDE, cache=True, limit_per_class=500, limit_eval_per_class=200
    )
    train, evaluation = data.load()
    assert isinstance(train, InMemoryImages)
    assert isinstance(evaluation, InMemoryImages)
    return train, evaluation


def _train_on_hosts(
    names: list[str], training: Training, train: InMemoryImages, evaluation: InMemoryImages, timeout: float
) -> Curve:
    curves: list[Curve] = run_ranks(
        len(names), _train, training, train, evaluation, timeout=timeout, before=partial(enter, names)
    )
    return curves[0]


def _train(rank: int, world: int, training: Training, train: InMemoryImages, evaluation: InMemoryImages) -> Curve:
    torch.manual_seed(training.seed)
    model = CifarResNet(1, 10, in_channels=train.images.shape[1], width=training.width)
    optimizer = sgd(model, training.lr)
    replica = method(training.method).build(model, optimizer, Meter())
    steps = len(train) // (_BATCH * world)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs * steps)
    order = torch.Generator().manual_seed(training.seed)
    torch.manual_seed(1000 * training.seed + rank)  # each host augments its own images
    curve, seconds = Curve([], []), 0.0
    for _ in range(training.epochs):
        chosen = torch.randperm(len(train), generator=order)[: steps * _BATCH * world]
        model.train()
        dist.barrier()
        clock = [time.perf_counter()]
        for indices in chosen.view(steps, world, _BATCH)[:, rank]:
            replica.step(*train.__getitems__(indices.tolist()))
            schedule.step()
            clock.append(time.perf_counter())
        seconds += steps * median(end - begin for begin, end in pairwise(clock))
        curve.seconds.append(seconds)
        curve.accuracies.append(_accuracy(model, evaluation, rank, world))
    return curve


@torch.no_grad()
def _accuracy(model: nn.Module, data: InMemoryImages, rank: int, world: int) -> float:
    """Return the share of images that are classified right; every host looks at its part, with its own BatchNorm."""
    model.eval()
    right = torch.zeros(2)
    for indices in torch.arange(rank, len(data), world).split(100):
        images, labels = data.__getitems__(indices.tolist())
        right += torch.tensor([float((model(images).argmax(1) == labels).sum()), len(labels)])
    dist.all_reduce(right)
    return float(right[0] / right[1])
