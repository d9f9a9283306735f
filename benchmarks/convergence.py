"""What a method reaches for the bytes it sends: the measurements behind the defaults of `compressed_ddp`.

    python -m benchmarks.convergence defaults-digits
    python -m benchmarks.convergence defaults-cifar10 --data <CIFAR-10 image folder>
    python -m benchmarks.convergence gradients-cifar10 --data <CIFAR-10 image folder>
    python -m benchmarks.convergence adam-digits
    python -m benchmarks.convergence --table            (the tables of docs/compressed_ddp.md and docs/advice.md)

Every method of a study gets the same model, data, epochs and learning-rate grid (one seed); its best rate is then
repeated with the other seeds. Runs are two CPU processes over Gloo, interleaved over methods, and appended to
`benchmarks/results/convergence.csv`; what is there already is not run again, so a study may be stopped and resumed.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_distopt import CompressedDDPStrategy
from lightning_distopt.callbacks import CommunicationMonitor
from recipes.resnet import DigitsData, ImageClassifier, ImageFolderData

RESULTS = Path(__file__).parent / "results" / "convergence.csv"
COLUMNS = (
    "study", "method", "lr", "seed", "accuracy", "loss", "train_loss",  "ratio", "seconds", "versions",
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Methods that are compared under equal conditions.

    Args:
        methods: label and arguments of the strategy (``None``: plain ``ddp``).
        rates: the learning-rate grid, searched with the first seed.
        seeds: of initial weights, data order and augmentation.
        epochs: of every run, with a cosine schedule to 0.
        width: maps in the first stage of the ResNet-20.
        optimizer: torch optimizer class and arguments but the rate.
        data: makes the data module from ``--data``.
    """

    methods: dict[str, dict[str, Any] | None]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    width: int
    optimizer: Callable[..., torch.optim.Optimizer]
    data: Callable[[str | None], pl.LightningDataModule]


def _digits(folder: str | None) -> pl.LightningDataModule:
    return DigitsData(batch_size=32)


def _cifar10(folder: str | None) -> pl.LightningDataModule:
    if folder is None:
        raise SystemExit("`--data` must name an unpacked CIFAR-10 image folder with `train` and `test` in it.")
    return ImageFolderData(
        folder,
        val_split="test",
        image_size=32,
        batch_size=64,
        cache=True,
        limit_per_class=500,
        limit_eval_per_class=200,
    )


_SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)

# Every compressed row but the 16-bit baseline sends 1/32 of ddp's gradient bytes, averaging and places included:
# sign n/8; top-k 8 rho n + 4 n / p with rho = (1/8 - 4/p) / 8; random block 4 n / 32.
_EQUAL_VOLUME: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "16-bit all-reduce": {"compressor": "bf16", "error_feedback": "none"},
    "sign, step ahead": {"compressor": "sign"},
    "sign, local": {"compressor": "sign", "error_feedback": "local"},
    "top-k 0.78 % + averaging 64, step ahead": {"compressor": "topk:0.0078125", "averaging_period": 64},
    "top-k 1.56 %, step ahead": {"compressor": "topk:0.015625", "averaging_period": 0},
    "top-k 1.56 %, local": {"compressor": "topk:0.015625", "averaging_period": 0, "error_feedback": "local"},
    "random block 1/32, step ahead": {"compressor": "random_block:0.03125"},
}
_FOR_ADAM: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "16-bit all-reduce": {"compressor": "bf16", "error_feedback": "none"},
    "uncompressed updates": {"compressor": "fp32"},
    "sign, step ahead": {"compressor": "sign"},
    "top-k 1.56 %, step ahead": {"compressor": "topk:0.015625", "averaging_period": 0},
}
# What `compressed_ddp_auto` may choose from, at whatever volume it sends: beside the rows of `defaults-cifar10`.
_INSIDE_BACKWARD: dict[str, dict[str, Any] | None] = {
    "PowerSGD, rank 2": {"compressor": "powersgd:2", "error_feedback": "gradient"},
    "QSGD-9": {"compressor": "qsgd:9", "error_feedback": "none"},
    "ORQ-9": {"compressor": "orq:9", "error_feedback": "none"},
    "BinGrad-b, feedback": {"compressor": "bingrad_b", "error_feedback": "gradient"},
    "sign, feedback": {"compressor": "sign", "error_feedback": "gradient"},
}
STUDIES = {
    "defaults-digits": Study(_EQUAL_VOLUME, (0.02, 0.05), (0, 1), 12, 16, _SGD, _digits),
    "defaults-cifar10": Study(_EQUAL_VOLUME, (0.05, 0.1), (0, 1), 8, 8, _SGD, _cifar10),
    "gradients-cifar10": Study(_INSIDE_BACKWARD, (0.05, 0.1), (0, 1), 8, 8, _SGD, _cifar10),
    "adam-digits": Study(_FOR_ADAM, (0.001, 0.003), (0, 1), 12, 16, torch.optim.Adam, _digits),
}


def run(study: Study, method: str, rate: float, seed: int, folder: str | None) -> dict[str, Any]:
    """Train once with two processes and return the figures of the last epoch."""
    pl.seed_everything(seed, verbose=False)
    arguments = study.methods[method]
    strategy = (
        DDPStrategy(start_method="fork")
        if arguments is None
        else CompressedDDPStrategy(start_method="fork", **arguments)
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=study.epochs, logger=False, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=study.epochs, callbacks=[CommunicationMonitor(table=False)],
    )  # fmt: skip
    data = study.data(folder)
    model = ImageClassifier(
        "resnet20",
        in_channels=1 if isinstance(data, DigitsData) else 3,
        width=study.width,
        optimizer=partial(study.optimizer, lr=rate),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=study.epochs),
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {
        "accuracy": metrics["val/accuracy"],
        "loss": metrics["val/loss"],
        "train_loss": metrics["train/loss"],
        "ratio": metrics["comm/compression_ratio"],
        "seconds": time.perf_counter() - start,
    }


def read() -> list[dict[str, str]]:
    """Return what has been measured."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def append(row: dict[str, Any]) -> None:
    """Add one run to the results."""
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def best_rate(name: str, method: str) -> float:
    """Return the rate of the grid with the highest accuracy, the lowest loss deciding between equals."""
    rows = [
        row
        for row in read()
        if (row["study"], row["method"]) == (name, method) and int(row["seed"]) == STUDIES[name].seeds[0]
    ]
    best = max(rows, key=lambda row: (float(row["accuracy"]), -float(row["loss"])))
    return float(best["lr"])


def plan(name: str) -> Iterator[tuple[str, float, int]]:
    """Yield the runs of a study: the grid with the first seed, then the best rates with the others."""
    study = STUDIES[name]
    for rate in study.rates:
        for method in study.methods:
            yield method, rate, study.seeds[0]
    for seed in study.seeds[1:]:
        for method in study.methods:
            yield method, best_rate(name, method), seed


def measure(name: str, folder: str | None) -> None:
    """Run what is missing of a study."""
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    for method, rate, seed in plan(name):
        key = (name, method, f"{rate:g}", str(seed))
        if any((row["study"], row["method"], row["lr"], row["seed"]) == key for row in read()):
            continue
        figures = run(STUDIES[name], method, rate, seed, folder)
        rounded = {k: f"{v:.5g}" for k, v in figures.items()}
        append({"study": name, "method": method, "lr": key[2], "seed": seed, **rounded, "versions": versions})
        print(
            f"{name:17} {method:42} lr {rate:<6g} seed {seed}  accuracy {figures['accuracy']:.4f}  {figures['seconds']:.0f} s",
            flush=True,
        )


def table(name: str) -> str:
    """Return a study as a Markdown table: mean and spread over seeds at each method's best rate."""
    lines = [
        f"`{name}`",
        "",
        "| method | best rate | accuracy, mean (lowest to highest) | validation loss | bytes of `ddp` / bytes sent |",
        "|---|---|---|---|---|",
    ]
    for method in STUDIES[name].methods:
        mine = [row for row in read() if (row["study"], row["method"]) == (name, method)]
        if not mine:
            continue
        rate = best_rate(name, method)
        rows = [row for row in mine if float(row["lr"]) == rate]
        accuracies = [100 * float(row["accuracy"]) for row in rows]
        loss = statistics.mean(float(row["loss"]) for row in rows)
        lines.append(
            f"| {method} | {rate:g} | {statistics.mean(accuracies):.2f} % ({min(accuracies):.1f} to {max(accuracies):.1f}, "
            f"{len(rows)} seeds) | {loss:.4f} | {float(rows[0]['ratio']):.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure one study, or print all tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("study", nargs="?", choices=list(STUDIES), help="which comparison to run")
    parser.add_argument("--data", help="unpacked CIFAR-10 image folder")
    parser.add_argument("--table", action="store_true", help="print what has been measured as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.study:
        measure(options.study, options.data)
    if options.table or not options.study:
        print("\n\n".join(table(name) for name in STUDIES if any(row["study"] == name for row in read())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
