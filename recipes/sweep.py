"""Run a study: every method at every setting, the same grid for each, then more seeds; stopped and resumed at will.

    python -m recipes.sweep recipes/studies/large_batch.yaml --data <folder> [--runs 10] [--part 1/2]
    python -m recipes.sweep recipes/studies/large_batch.yaml --table        (Markdown)
    python -m recipes.sweep recipes/studies/large_batch.yaml --figure docs/large_batch.png

A study is a YAML file of LightningCLI configs, and a run is `distopt fit` with some of them:

    distopt fit --config <configs> --config <the method's configs> <the setting's flags> <rate flag>=<rate * multiplier> ...

First comes the grid of multipliers with the first seed, then, at each method's best, the other seeds. Rows are appended to the
CSV beside the study, at once; what is there is not run again. `--part i/n` takes every n-th run, for n processes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback

from benchmarks.results_file import ResultsFile, versions
from lightning_distopt.cli import DistoptCLI
from lightning_distopt.errors import DistoptError

COLUMNS = (
    "setting",
    "method",
    "multiplier",
    "seed",
    "accuracy",
    "loss",
    "train_losses",
    "steps",
    "seconds",
    "versions",
)
KEY = ("setting", "method", "multiplier", "seed")


class Run(NamedTuple):
    """One training: where it stands in the study."""

    setting: str
    method: str
    multiplier: float
    seed: int


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        configs: of every run, relative to the current folder.
        settings: flags of each setting (a batch size, ...), by name.
        methods: configs, flags, base rate, and optionally the settings it takes part in, by name.
        rate_flag: takes the learning rate.
        multipliers: of each method's base rate: the grid.
        seeds: the first searches the grid.
        data_flag: takes ``--data``; empty: the data need no folder.
        results: the CSV file.
    """

    configs: tuple[str, ...]
    settings: Mapping[str, tuple[str, ...]]
    methods: Mapping[str, Mapping[str, Any]]
    rate_flag: str
    multipliers: tuple[float, ...]
    seeds: tuple[int, ...]
    data_flag: str
    results: ResultsFile

    def plan(self) -> Iterator[Run]:
        """Yield the runs in order; those at a best rate only once it is known."""
        chosen = [
            (setting, method)
            for setting in self.settings
            for method, about in self.methods.items()
            if setting in about.get("settings", self.settings)
        ]
        for multiplier in self.multipliers:
            for setting, method in chosen:
                yield Run(setting, method, multiplier, self.seeds[0])
        for seed in self.seeds[1:]:
            for setting, method in chosen:
                best = self.best(setting, method)
                if best is not None:
                    yield Run(setting, method, best, seed)

    def arguments(self, run: Run, data: str | None) -> list[str]:
        """Return the arguments of ``distopt`` for one run."""
        method = self.methods[run.method]
        words = ["fit"]
        words += [f"--config={path}" for path in (*self.configs, *method.get("configs", ()))]
        words += [*self.settings[run.setting], *method.get("flags", ())]
        words += [f"{self.rate_flag}={float(method['rate']) * run.multiplier:g}", f"--seed_everything={run.seed}"]
        if self.data_flag:
            if data is None:
                raise SystemExit(
                    f"`--data` must name the folder of the data: this study passes it to {self.data_flag}."
                )
            words.append(f"{self.data_flag}={data}")
        return [*words, *_QUIET]

    def best(self, setting: str, method: str) -> float | None:
        """Return the multiplier of the highest accuracy, the lowest loss deciding; ``None`` while the grid is unfinished."""
        rows = [
            row
            for row in self.results.rows()
            if (row["setting"], row["method"], row["seed"]) == (setting, method, str(self.seeds[0]))
        ]
        if len(rows) < len(self.multipliers):
            return None
        return float(max(rows, key=lambda row: (float(row["accuracy"]), -_finite(row["loss"])))["multiplier"])

    def finals(self, setting: str, method: str) -> list[dict[str, str]]:
        """Return the rows of a method at its best multiplier, one a seed."""
        best = self.best(setting, method)
        return [
            row
            for row in self.results.rows()
            if (row["setting"], row["method"]) == (setting, method)
            and best is not None
            and float(row["multiplier"]) == best
        ]


_QUIET = (
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
)


def read(path: Path) -> Study:
    """Return the study of a YAML file.

    Raises:
        KeyError: naming an entry that is missing.
    """
    about = yaml.safe_load(path.read_text())
    return Study(
        configs=tuple(about["configs"]),
        settings={str(name): tuple(flags or ()) for name, flags in about["settings"].items()},
        methods={
            name: {**method, **({"settings": [str(s) for s in method["settings"]]} if "settings" in method else {})}
            for name, method in about["methods"].items()
        },
        rate_flag=about["rate_flag"],
        multipliers=tuple(float(value) for value in about["multipliers"]),
        seeds=tuple(int(seed) for seed in about["seeds"]),
        data_flag=about.get("data_flag", ""),
        results=ResultsFile(path.with_suffix(".csv"), COLUMNS, KEY),
    )


class Losses(Callback):
    """The mean training loss of every epoch; a fit whose loss is no longer finite is ended."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self._batches: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self._batches.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if not math.isfinite(self._batches[-1]):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.epochs.append(statistics.mean(self._batches))
        self._batches = []


class _CLI(DistoptCLI):
    """LightningCLI that hands a callback to the Trainer and then fits, as its base class does by itself."""

    losses: Losses  # of the last run

    def before_fit(self) -> None:
        self.trainer.callbacks.append(_CLI.losses)  # type: ignore[attr-defined]


def train(arguments: list[str]) -> dict[str, Any]:
    """Run ``distopt`` with these arguments and return the figures of the last epoch."""
    start = time.perf_counter()
    _CLI.losses = Losses()
    try:
        trainer = _CLI(arguments).trainer
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        steps = trainer.global_step
    except DistoptError as error:  # a compressor in a residual scheme has met a NaN
        print(f"failed: {error}", flush=True)
        metrics, steps = {}, 0
    return {
        "accuracy": f"{metrics.get('val/accuracy', 0.0):.5g}",
        "loss": f"{metrics.get('val/loss', math.nan):.5g}",
        "train_losses": " ".join(f"{loss:.4g}" for loss in _CLI.losses.epochs),
        "steps": steps,
        "seconds": f"{time.perf_counter() - start:.1f}",
    }


def measure(study: Study, data: str | None, runs: int | None, part: tuple[int, int], only: str | None = None) -> int:
    """Run what is missing, at most ``runs``; return how many were run."""
    done = 0
    for number, run in enumerate(study.plan()):
        if number % part[1] != part[0] or (only is not None and not f"{run.setting} {run.method}".startswith(only)):
            continue
        if runs is not None and done >= runs:
            break
        row = {**run._asdict(), "multiplier": f"{run.multiplier:g}"}
        if study.results.find(**row) is not None:
            continue
        figures = train(study.arguments(run, data))
        study.results.append({**row, **figures, "versions": versions()})
        done += 1
        print(
            f"{run.setting:8} {run.method:24} x{run.multiplier:<6g} seed {run.seed}  "
            f"accuracy {figures['accuracy']}  {figures['seconds']} s",
            flush=True,
        )
    return done


def table(study: Study) -> str:
    """Return the accuracies at each method's best rate as Markdown: mean and range over seeds."""
    settings = list(study.settings)
    lines = ["| method | " + " | ".join(settings) + " |", "|---|" + "---|" * len(settings)]
    for method in study.methods:
        cells = []
        for setting in settings:
            rows = study.finals(setting, method)
            accuracies = [100 * float(row["accuracy"]) for row in rows]
            if not rows:
                cells.append("")
                continue
            mean, low, high = statistics.mean(accuracies), min(accuracies), max(accuracies)
            cells.append(f"{mean:.1f} ({low:.1f} to {high:.1f}; x{float(rows[0]['multiplier']):g})")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept(study: Study) -> str:
    """Return, as Markdown, what each method reaches with the multiplier that was best in the first setting: no tuning again."""
    settings = list(study.settings)
    lines = ["| method, rate of the first setting | " + " | ".join(settings) + " |", "|---|" + "---|" * len(settings)]
    for method in study.methods:
        best = study.best(settings[0], method)
        rows = [
            study.results.find(setting=s, method=method, multiplier=f"{best:g}", seed=study.seeds[0])
            for s in settings
            if best is not None
        ]
        cells = ["" if row is None else f"{100 * float(row['accuracy']):.1f}" for row in rows]
        lines.append(f"| {method} | " + " | ".join(cells or [""] * len(settings)) + " |")
    return "\n".join(lines)


def early(study: Study, epochs: int = 3) -> str:
    """Return the training loss over the first epochs at each method's best rate, as Markdown."""
    lines = [f"| method | setting | training loss, epochs 1 to {epochs} | final accuracy |", "|---|---|---|---|"]
    for setting in study.settings:
        for method in study.methods:
            rows = study.finals(setting, method)
            if rows:
                columns = zip(
                    *([float(word) for word in row["train_losses"].split()[:epochs]] for row in rows), strict=False
                )
                losses = " ".join(f"{statistics.mean(column):.3f}" for column in columns)
                accuracy = 100 * statistics.mean(float(row["accuracy"]) for row in rows)
                lines.append(f"| {method} | {setting} | {losses} | {accuracy:.1f} % ({len(rows)} seeds) |")
    return "\n".join(lines)


def figure(study: Study, path: str) -> None:
    """Draw accuracy over the settings, a line a method, with the range over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for method in study.methods:
        points = [(s, [100 * float(r["accuracy"]) for r in study.finals(s, method)]) for s in study.settings]
        points = [(setting, values) for setting, values in points if values]
        means = [statistics.mean(values) for _, values in points]
        spread = [[m - min(v) for m, (_, v) in zip(means, points, strict=True)]]
        spread += [[max(v) - m for m, (_, v) in zip(means, points, strict=True)]]
        axes.errorbar([s for s, _ in points], means, yerr=spread, marker="o", capsize=3, label=method)
    axes.set_xlabel("samples a step")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=120)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.inf


def main(args: list[str] | None = None) -> int:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(prog="python -m recipes.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path, help="a YAML file, for example recipes/studies/large_batch.yaml")
    parser.add_argument("--data", help="folder of the data, where the study needs one")
    parser.add_argument("--runs", type=int, help="stop after so many runs")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th run, from the i-th")
    parser.add_argument("--only", help="runs whose '<setting> <method>' begins so")
    parser.add_argument("--table", action="store_true", help="print what was measured as Markdown, and run nothing")
    parser.add_argument("--figure", help="draw what was measured, and run nothing")
    options = parser.parse_args(args)
    study = read(options.study)
    if not options.table and not options.figure:
        warnings.simplefilter("ignore")
        index, parts = (int(word) for word in options.part.split("/"))
        measure(study, options.data, options.runs, (index - 1, parts), options.only)
    print(table(study), kept(study), early(study), sep="\n\n")
    if options.figure:
        figure(study, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
