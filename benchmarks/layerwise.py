"""What per-tensor rates cost: the step of a ResNet-50 with and without them, step by step in turns.

    python -m benchmarks.layerwise                      (a few minutes; appends to benchmarks/results/layerwise.csv)
    python -m benchmarks.layerwise --table              (the table of docs/large_batch.md)

One fit; every rule has its turn in each round, and the ratio is that of the medians. A step is everything from the start of
a batch to its end: forward, backward with the hooks of the probe, norms, split groups, the update.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.results_file import ResultsFile, load, machine, versions
from lightning_distopt.callbacks import LayerwiseRateScaling
from recipes.resnet import ImageClassifier

RESULTS = ResultsFile(
    Path(__file__).parent / "results" / "layerwise.csv",
    (
        "model",
        "device",
        "threads",
        "batch",
        "probe",
        "rounds",
        "step_ms",
        "ratio",
        "spread",
        "load",
        "machine",
        "versions",
    ),
    ("model", "device", "threads", "batch", "probe"),
)
PROBES = ("none", "micro", "rank")


class Turns(Callback):
    """Puts one probe after the other to work, a step each, and notes the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {probe: [] for probe in PROBES}
        self._scalings = {
            probe: LayerwiseRateScaling(probe=probe, log=False, heat_map=False)  # type: ignore[arg-type]
            for probe in PROBES
            if probe != "none"
        }
        self._start = 0.0

    def _turn(self, batch_idx: int) -> str:
        return PROBES[batch_idx % len(PROBES)]

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        scaling = self._scalings.get(self._turn(batch_idx))
        if scaling is not None:
            scaling.on_fit_start(trainer, module)
            scaling.on_train_start(trainer, module)
        _wait_for(module)
        self._start = time.perf_counter()
        if scaling is not None:
            scaling.on_train_batch_start(trainer, module, batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Any) -> None:
        for scaling in self._scalings.values():
            scaling.on_before_backward(trainer, module, loss)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _wait_for(module)
        turn = self._turn(batch_idx)
        self.seconds[turn].append(time.perf_counter() - self._start)
        if turn in self._scalings:
            self._scalings[turn].teardown(trainer, module, "fit")


def _wait_for(module: Any) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def measure(model: str, batch: int, rounds: int, size: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of every step but the first round, by probe."""
    images = torch.randn(batch, 3, size, size)
    data = TensorDataset(images, torch.randint(0, 1000, (batch,)))
    turns = Turns()
    trainer = pl.Trainer(
        accelerator=device, devices=1, max_epochs=(rounds + 1) * len(PROBES), logger=False, callbacks=[_EveryStep(turns)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = ImageClassifier(model, num_classes=1000, optimizer=_momentum)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(data, batch_size=batch))
    return {probe: seconds[1:] for probe, seconds in turns.seconds.items()}


def _momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=1e-4)


class _EveryStep(Callback):
    """An epoch is one batch, the same each time; its number is that of the epoch."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.on_before_backward = turns.on_before_backward  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.turns.on_train_batch_start(trainer, module, batch, trainer.current_epoch)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.turns.on_train_batch_end(trainer, module, outputs, batch, trainer.current_epoch)


def table() -> str:
    """Return what was measured as Markdown."""
    lines = [
        "| model | device, threads | batch | probe | step | of the step without (middle half of rounds) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['device']}, {row['threads']} | {row['batch']} | {row['probe']} | {row['step_ms']} ms | "
        f"{row['ratio']} ({row['spread']}) |"
        for row in RESULTS.rows()
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layerwise", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a name of recipes.resnet")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each probe that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--table", action="store_true", help="print what was measured as Markdown, and measure nothing")
    options = parser.parse_args()
    if not options.table:
        warnings.simplefilter("ignore")
        torch.set_num_threads(options.threads)
        before = load()
        seconds = measure(options.model, options.batch, options.rounds, options.size, options.device)
        plain = statistics.median(seconds["none"])
        for probe in PROBES:
            ratios = [a / b for a, b in zip(seconds[probe], seconds["none"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            RESULTS.append(
                {
                    "model": options.model, "device": options.device, "threads": options.threads, "batch": options.batch,
                    "probe": probe, "rounds": options.rounds, "step_ms": f"{1e3 * statistics.median(seconds[probe]):.0f}",
                    "ratio": f"{statistics.median(seconds[probe]) / plain:.3f}", "spread": f"{low:.3f} to {high:.3f}",
                    "load": before, "machine": machine(), "versions": versions(),
                }
            )  # fmt: skip
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
