"""DiLoCo against `ddp` on the character model: loss at equal tokens, and at equal bytes; stopped and resumed at will.

    python -m recipes.text.study_diloco [--runs 3] [--only DiLoCo]       (runs what is missing)
    python -m recipes.text.study_diloco --table                          (Markdown)

Two processes over Gloo, AdamW inside, the same tokens, model and grid of inner rates for every method; its best rate is then
repeated with the other seeds. Rows are appended to `recipes/studies/diloco_text.csv` at once; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.results_file import ResultsFile, versions
from lightning_distopt import LocalUpdateStrategy
from lightning_distopt.data_parallel import FedMom
from lightning_distopt.exchange.meter import ring_all_reduce_bytes
from recipes.text import CharModel, StandardLibraryText

RESULTS = Path(__file__).parents[1] / "studies" / "diloco_text.csv"
COLUMNS = ("method", "lr", "seed", "steps", "tokens", "bytes", "peak_bytes", "loss", "curve", "versions")
METHODS: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "local SGD, H = 20": {"sync_every": 20},
    "DiLoCo, H = 20": {"sync_every": 20, "outer_optimizer": FedMom(0.7, 0.9)},
    "DiLoCo, H = 100": {"sync_every": 100, "outer_optimizer": FedMom(0.7, 0.9)},
    "DiLoCo, H = 20, sign with residual": {
        "sync_every": 20,
        "outer_optimizer": FedMom(0.7, 0.9),
        "compressor": "sign",
    },
    "Streaming DiLoCo, H = 20, 4 fragments, delay 1, mix 0.5": {
        "sync_every": 20,
        "outer_optimizer": FedMom(0.7, 0.9),
        "fragments": 4,
        "delay": 1,
        "mix": 0.5,
    },
}
RATES = (0.003, 0.01, 0.03)
SEEDS = (0, 1)
WORLD, STEPS, LOOKS = 2, 600, 6
WIDTH, LENGTH, BATCH = 64, 64, 16


class Curve(Callback):
    """Writes the validation loss against steps and bytes sent by rank 0, and the most bytes of one step, to a file.

    Args:
        path: of the file, JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: list[tuple[int, int, float]] = []
        self._sent = self._peak = 0

    def bytes_sent(self, trainer: pl.Trainer) -> int:
        """Return what rank 0 sent in optimizer steps; of ``ddp`` by the formula of a ring."""
        meter = getattr(trainer.strategy, "meter", None)
        if meter is not None:
            return int(meter.step_bytes_sent)
        parameters = sum(p.nbytes for p in trainer.lightning_module.parameters())
        return trainer.global_step * ring_all_reduce_bytes(parameters, trainer.world_size)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        sent = self.bytes_sent(trainer)
        self._peak, self._sent = max(self._peak, sent - self._sent), sent

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        self.points.append((trainer.global_step, self.bytes_sent(trainer), loss))
        if trainer.is_global_zero:
            self.path.write_text(json.dumps({"curve": self.points, "peak": self._peak}))


def train(method: str, lr: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train once and return a row."""
    arguments = METHODS[method]
    pl.seed_everything(seed, verbose=False)
    strategy: Any = "ddp_fork"
    if arguments is not None:
        strategy = LocalUpdateStrategy(weighting="uniform", start_method="fork", **arguments)
    model = CharModel(WIDTH, lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.1))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curve.json"
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=WORLD,
            strategy=strategy,
            max_steps=steps,
            val_check_interval=max(1, steps // LOOKS),
            check_val_every_n_epoch=None,
            limit_val_batches=16,
            gradient_clip_val=1.0,
            callbacks=[Curve(file)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, StandardLibraryText(length=LENGTH, batch_size=BATCH))
        seen = json.loads(file.read_text())
    step, sent, loss = seen["curve"][-1]
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": step,
        "tokens": step * WORLD * BATCH * LENGTH,
        "bytes": sent,
        "peak_bytes": seen["peak"],
        "loss": f"{loss:.5g}",
        "curve": " ".join(f"{s}:{b}:{value:.4g}" for s, b, value in seen["curve"]),
        "versions": versions(),
    }


def best_rate(results: ResultsFile, method: str) -> float | None:
    """Return the inner rate with the lowest loss; ``None`` while the grid is unfinished."""
    rows = [row for row in results.rows() if (row["method"], row["seed"]) == (method, str(SEEDS[0]))]
    return None if len(rows) < len(RATES) else float(min(rows, key=lambda row: float(row["loss"]))["lr"])


def plan(results: ResultsFile) -> Iterator[tuple[str, float, int]]:
    """Yield the runs in order; those of more seeds once a method's best rate is known."""
    for lr in RATES:
        for method in METHODS:
            yield method, lr, SEEDS[0]
    for seed in SEEDS[1:]:
        for method in METHODS:
            lr_ = best_rate(results, method)
            if lr_ is not None:
                yield method, lr_, seed


def measure(results: ResultsFile, runs: int | None = None, only: str = "", steps: int = STEPS) -> int:
    """Run what is missing, at most ``runs``; return how many were run."""
    done = 0
    for method, lr, seed in plan(results):
        if runs is not None and done >= runs:
            break
        if not method.startswith(only) or results.find(method=method, lr=lr, seed=seed) is not None:
            continue
        row = train(method, lr, seed, steps)
        results.append(row)
        done += 1
        print(f"{method:56} lr {lr:<6g} seed {seed}  loss {row['loss']}  {row['bytes']} B", flush=True)
    return done


def table(results: ResultsFile) -> str:
    """Return, as Markdown, losses at equal tokens, and what `ddp` has reached with the same bytes."""
    lines = [
        "| method | best inner rate | loss at equal tokens | bytes of `ddp` / bytes sent | most bytes in a step | loss of `ddp` after as many bytes |",  # noqa: E501
        "|---|---|---|---|---|---|",
    ]
    finals = {method: _finals(results, method) for method in METHODS}
    for method, rows in finals.items():
        if not rows or not finals["ddp"]:
            continue
        losses = [float(row["loss"]) for row in rows]
        spread = f" ({min(losses):.3f} to {max(losses):.3f}, {len(losses)} seeds)" if len(losses) > 1 else " (1 seed)"
        sent = int(rows[0]["bytes"])
        ratio = int(finals["ddp"][0]["bytes"]) / sent
        lines.append(
            f"| {method} | {rows[0]['lr']} | {statistics.mean(losses):.3f}{spread} | {ratio:.1f} | "
            f"{int(rows[0]['peak_bytes']):,} | {_after(finals['ddp'], sent)} |"
        )
    return "\n".join(lines)


def _finals(results: ResultsFile, method: str) -> list[dict[str, str]]:
    best = best_rate(results, method)
    return [row for row in results.rows() if row["method"] == method and best is not None and float(row["lr"]) == best]


def _after(rows: list[dict[str, str]], sent: int) -> str:
    """Return the loss of `ddp` at its last look before it had sent so many bytes."""
    found = []
    for row in rows:
        points = [point.split(":") for point in row["curve"].split()]
        before = [float(loss) for _, nbytes, loss in points if int(nbytes) <= sent]
        if not before:
            step, nbytes, loss = points[0]
            return f"above {loss} (its step {step}, {int(nbytes) / sent:.1f} times the bytes)"
        found.append(before[-1])
    return f"{statistics.mean(found):.3f}"


def main(args: list[str] | None = None) -> int:
    """Measure, and show what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.text.study_diloco", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--runs", type=int, help="stop after so many runs")
    parser.add_argument("--only", default="", help="methods whose name begins so")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file")
    parser.add_argument("--table", action="store_true", help="print what was measured as Markdown, and run nothing")
    options = parser.parse_args(args)
    results = ResultsFile(options.results, COLUMNS, ("method", "lr", "seed"))
    if not options.table:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        measure(results, options.runs, options.only)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
