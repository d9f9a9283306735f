"""What staleness costs in accuracy: ResNet-20 of half width on CIFAR-10, cut into 3, back-propagation against stale plans.

python -m benchmarks.pipeline_accuracy --data <CIFAR-10 image folder>

10,000 training images, 10 epochs, SGD with momentum 0.9 and a cosine schedule by epoch. Every plan gets the same grid of
learning rates (seed 0); its best rate is repeated with the other seeds. The engine runs in one process, which learns bit for
bit what processes learn. Rows go to ``benchmarks/results/pipeline_accuracy.csv``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.results_file import ResultsFile, versions
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.in_process import InProcessPipeline
from lightning_distopt.model_parallel.partition import balance
from recipes.resnet import ImageFolderData, LayeredClassifier

__all__ = ["main", "train"]

COLUMNS = ("plan", "batch", "lr", "seed", "accuracy", "losses", "seconds", "versions")
STAGES = 3


def train(
    plan: StalenessPlan, batch: int, lr: float, seed: int, folder: str, epochs: int, per_class: int
) -> tuple[float, list[float]]:
    """Return the accuracy on the test images, and the mean loss of each epoch."""
    torch.manual_seed(seed)
    module = LayeredClassifier("resnet20", width=8)
    cuts = balance([1.0] * len(module.layers), STAGES)
    edges = [0, *cuts, len(module.layers)]
    modules = [module.layers[a:b] for a, b in itertools.pairwise(edges)]
    data = ImageFolderData(
        folder, val_split="test", image_size=32, batch_size=batch, cache=True, limit_per_class=per_class, seed=seed
    )
    data.setup("fit")
    make = partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4)
    engine = InProcessPipeline(modules, nn.functional.cross_entropy, plan, make, seed=seed)
    losses = []
    for epoch in range(epochs):
        rate = 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))
        for optimizer in engine.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        found = engine.run((x, y) for x, y in data.train_dataloader() if len(y) == batch)
        losses.append(statistics.mean(found))
    module.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in data.val_dataloader():
            right += int((module.layers(x).argmax(1) == y).sum())
            total += len(y)
    return right / total, losses


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--plans", nargs="+", default=["naive", "dsp"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/pipeline_accuracy.csv"))
    given = parser.parse_args(args)
    file = ResultsFile(given.results, COLUMNS, ("plan", "batch", "lr", "seed"))

    def once(name: str, lr: float, seed: int) -> dict[str, str]:
        row = file.find(plan=name, batch=given.batch_size, lr=lr, seed=seed)
        if row is None:
            start = time.perf_counter()
            plan = StalenessPlan.preset(name, STAGES)
            accuracy, losses = train(plan, given.batch_size, lr, seed, given.data, given.epochs, given.per_class)
            made: dict[str, Any] = {
                "plan": name, "batch": given.batch_size, "lr": lr, "seed": seed, "accuracy": f"{100 * accuracy:.2f}",
                "losses": " ".join(f"{loss:.3f}" for loss in losses),
                "seconds": f"{time.perf_counter() - start:.0f}", "versions": versions(),
            }  # fmt: skip
            file.append(made)
            row = {key: str(value) for key, value in made.items()}
        print(row["plan"], row["batch"], row["lr"], row["seed"], row["accuracy"], row["losses"], flush=True)
        return row

    for name in given.plans:
        best = max(given.rates, key=lambda lr: float(once(name, lr, 0)["accuracy"]))
        found = [float(once(name, best, seed)["accuracy"]) for seed in range(given.seeds)]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{name}: rate {best:g}, {statistics.mean(found):.2f} +- {spread:.2f} %")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
