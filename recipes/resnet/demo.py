"""The demonstration behind `make demo`: train the same module with `ddp` and with `compressed_ddp`, and compare.

distopt fit --config configs/demo.yaml --trainer.strategy=ddp             -> metrics.csv
distopt fit --config configs/demo.yaml --trainer.strategy=compressed_ddp  -> metrics.csv
                                                                          => a table and a picture
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STRATEGIES = ("ddp", "compressed_ddp")
CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
PROJECT = Path(__file__).parents[2]

NOTE = (
    "Loss and accuracy are those of the last epoch; bytes are what one process sends in an optimizer step.\n"
    "Both processes run on this machine, where bytes cost almost nothing: compression pays on a network."
)


@dataclass(frozen=True)
class Run:
    """What one training run logged.

    Attributes:
        strategy: the word given to the Trainer.
        seconds: wall time of the whole command, start of the processes included.
        bytes_per_step: bytes that rank 0 sent in an optimizer step, mean over the run.
        compression_ratio: bytes that ``ddp`` would have sent over bytes sent, as the communication monitor counts them.
        losses: validation loss after each epoch.
        accuracies: validation accuracy after each epoch, 0 to 1.
        bytes_sent: bytes that rank 0 had sent in optimizer steps by the end of each epoch.
    """

    strategy: str
    seconds: float
    bytes_per_step: float
    compression_ratio: float
    losses: list[float]
    accuracies: list[float]
    bytes_sent: list[float]


def train(strategy: str, epochs: int, out: Path, stamp: str) -> Run:
    """Run `distopt fit` in a process of its own, with its progress bar on this terminal, and read what it logged."""
    command = [sys.executable, "-m", "lightning_distopt.cli", "fit", "--config", str(CONFIG)]
    command += [f"--trainer.strategy={strategy}", f"--trainer.max_epochs={epochs}"]
    command += [f"--model.init_args.scheduler.init_args.T_max={epochs}"]
    command += [f"--trainer.logger.init_args.save_dir={out}", f"--trainer.logger.init_args.name={stamp}"]
    command += [f"--trainer.logger.init_args.version={strategy}"]
    start = time.perf_counter()
    subprocess.run(command, cwd=PROJECT, check=True)
    return read_run(out / stamp / strategy / "metrics.csv", strategy, time.perf_counter() - start)


def read_run(metrics: Path, strategy: str, seconds: float) -> Run:
    """Read the CSV logger's file: rows of step metrics, and one row of validation metrics an epoch."""
    losses, accuracies, bytes_sent = [], [], []
    sent, steps, ratio = 0.0, 0, 1.0
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            if row.get("comm/bytes_sent"):  # a mean over the steps since the last such row
                new_steps = int(row["step"]) + 1 - steps
                sent, steps = sent + float(row["comm/bytes_sent"]) * new_steps, steps + new_steps
                ratio = float(row.get("comm/compression_ratio") or ratio)
            if row.get("val/loss"):
                losses.append(float(row["val/loss"]))
                accuracies.append(float(row["val/accuracy"]))
                bytes_sent.append(sent)
    if not losses or not steps:
        raise ValueError(
            f"'{metrics}' holds {len(losses)} validation results and {steps} counted steps: nothing to show."
        )
    return Run(strategy, seconds, sent / steps, ratio, losses, accuracies, bytes_sent)


def print_table(runs: Sequence[Run]) -> None:
    """Print one row a run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"ResNet-20 on digits, 2 processes, {len(runs[0].losses)} epochs")
    table.add_column("strategy", no_wrap=True)
    for column in ("accuracy", "loss", "bytes sent per step", "compression ratio", "seconds"):
        table.add_column(column, justify="right")
    for run in runs:
        numbers = (f"{run.accuracies[-1]:.1%}", f"{run.losses[-1]:.4f}", f"{run.bytes_per_step:,.0f}")
        table.add_row(
            run.strategy, *numbers, f"{runs[0].bytes_per_step / run.bytes_per_step:.1f}", f"{run.seconds:.0f}"
        )
    console = Console()
    console.print(table)
    console.print(NOTE, style="dim", highlight=False)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write the picture: validation loss against epochs, and against the bytes that one process has sent."""
    from matplotlib.figure import Figure  # no pyplot: a Figure of its own needs neither a display nor a backend

    colours, markers = ("#4c566a", "#d1495b", "#00798c", "#edae49"), ("o", "s", "^", "D")
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    by_epoch, by_bytes = figure.subplots(1, 2, sharey=True)
    for run, colour, marker in zip(runs, colours, markers, strict=False):
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.8, "label": run.strategy}
        by_epoch.plot(range(1, len(run.losses) + 1), run.losses, **style)
        by_bytes.plot([sent / 1e6 for sent in run.bytes_sent], run.losses, **style)
    by_epoch.set(xlabel="epoch", ylabel="validation loss (log scale)", yscale="log", title="loss against epochs")
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    by_bytes.set(xlabel="MB sent by one process (log scale)", xscale="log", title="loss against bytes sent")
    for axis in (by_epoch.yaxis, by_bytes.xaxis):
        axis.set_major_formatter("{x:g}")
    by_epoch.legend(frameon=False)
    for axes in (by_epoch, by_bytes):
        axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("ResNet-20 on scikit-learn's digits, two processes", fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(args: Sequence[str] | None = None) -> int:
    """Train, compare, and say where the picture is."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.resnet.demo",
        description="Train ResNet-20 on scikit-learn's digits with two CPU processes, first with `ddp`, then with "
        "`compressed_ddp`, from equal seeds; then print a table and write a picture.",
    )
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each run, at least 1 (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for logs and picture (default: %(default)s)"
    )
    options = parser.parse_args(args)
    if options.epochs < 1:
        parser.error(f"`--epochs` must be at least 1: got {options.epochs}.")
    out, stamp = options.out.resolve(), time.strftime("%Y%m%d-%H%M%S")

    runs = []
    for number, strategy in enumerate(STRATEGIES, start=1):
        print(f"\n=== {number} of {len(STRATEGIES)}: strategy={strategy!r} ===", flush=True)
        try:
            runs.append(train(strategy, options.epochs, out, stamp))
        except subprocess.CalledProcessError as error:
            print(f"Training with strategy={strategy!r} failed; its own message is above.", file=sys.stderr)
            return error.returncode
    picture = out / stamp / "demo.png"
    draw(runs, picture)
    print()
    print_table(runs)
    print(f"\nPicture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
