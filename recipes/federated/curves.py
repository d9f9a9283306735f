"""What the study's rows say: each method at its best rate, as a table, a verdict and a picture; needs no data and no Flower.

Rounds to an accuracy are counted on the mean of the last five rounds, for every method alike: a curve that jumps about does not
arrive early by one lucky round, and a run's own final accuracy is reached at its last round at the latest.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.results_file import ResultsFile

__all__ = ["GRIDS", "LAST", "TUNING_SEED", "Curves", "draw", "smoothed"]

GRIDS = {"mnist": (0.01, 0.03, 0.1, 0.3, 1.0), "shakespeare": (0.3, 1.0, 3.0, 10.0)}
"""Client rates of each task, the same for every method; one whose best is at an end is also run one step beyond it."""

LAST = 5
"""Rounds in the mean that is called final."""
TUNING_SEED = 0
"""The seed of the grid."""
_COLOURS = {
    "fedsgd": "#9aa5b1",
    "fedavg": "#4c566a",
    "fedprox": "#8fbcbb",
    "fedavgm": "#d08770",
    "fedadam": "#ebcb8b",
    "fedmom": "#d1495b",
}


def smoothed(curve: Sequence[float]) -> list[float]:
    """Return for each round the mean over it and the four before, as far as there are any."""
    return [statistics.fmean(curve[max(0, at + 1 - LAST) : at + 1]) for at in range(len(curve))]


class Curves:
    """The rows of one task.

    Args:
        task: its name.
        results: the study's file.
        methods: in the order of the table.
        rates: of the grid; default: those of :data:`GRIDS`, or all that the rows of the first seed have.

    Attributes:
        rates: the same.
    """

    def __init__(
        self, task: str, results: ResultsFile, methods: Sequence[str], rates: Sequence[float] | None = None
    ) -> None:
        self.task, self.methods = task, tuple(methods)
        self.rows = [row for row in results.rows() if row["task"] == task]
        tuned = {float(row["rate"]) for row in self.rows if int(row["seed"]) == TUNING_SEED}
        self.rates = tuple(sorted(GRIDS.get(task, tuned) if rates is None else rates))

    def beyond(self, method: str) -> float | None:
        """Return the rate one step beyond the grid's end if the best rate of the grid is there, else ``None``."""
        tuned = self._tuned(method)
        if not set(self.rates) <= set(tuned):
            return None
        best = max(self.rates, key=tuned.__getitem__)
        one = f"{best:e}"[0] == "1"  # rates go 1, 3, 10, 30, ...
        if best == self.rates[-1]:
            return float(f"{best * (3 if one else 10 / 3):.1g}")
        if best == self.rates[0]:
            return float(f"{best * (0.3 if one else 1 / 3):.1g}")
        return None

    def best_rate(self, method: str) -> float | None:
        """Return the rate with the highest final accuracy; ``None`` while the grid is unfinished."""
        tuned, beyond = self._tuned(method), self.beyond(method)
        if not set(self.rates) <= set(tuned) or (beyond is not None and beyond not in tuned):
            return None
        return max(tuned, key=tuned.__getitem__)

    def _tuned(self, method: str) -> dict[float, float]:
        return {
            float(row["rate"]): float(row["final"])
            for row in self.rows
            if row["method"] == method and int(row["seed"]) == TUNING_SEED
        }

    def of(self, method: str) -> dict[int, list[float]]:
        """Return the curves at the best rate, by seed; empty while the grid is unfinished."""
        rate = self.best_rate(method)
        return {
            int(row["seed"]): json.loads(row["accuracies"])
            for row in self.rows
            if row["method"] == method and rate is not None and float(row["rate"]) == rate
        }

    def finals(self, method: str) -> list[float]:
        """Return the mean accuracy over the last rounds, of each seed."""
        return [statistics.fmean(curve[-LAST:]) for curve in self.of(method).values()]

    def rounds_to(self, method: str, accuracy: float) -> dict[int, float]:
        """Return the first round in which the smoothed curve is at an accuracy, by seed; infinity if it never is."""
        return {seed: _first(curve, accuracy) for seed, curve in self.of(method).items()}

    def shares(self, method: str, of: str = "fedavg") -> dict[int, float]:
        """Return, by seed, the rounds to the final accuracy that ``of`` has with the same seed, over those that ``of`` needs."""
        mine, theirs = self.of(method), self.of(of)
        found = {}
        for seed in sorted(mine.keys() & theirs.keys()):
            final = statistics.fmean(theirs[seed][-LAST:])
            found[seed] = _first(mine[seed], final) / max(1.0, _first(theirs[seed], final))
        return found

    def table(self) -> str:
        """Return one row a method, as Markdown."""
        target = max((float(row["target"]) for row in self.rows), default=math.nan)
        lines = [
            f"| method | client rate | accuracy, last {LAST} rounds (range over seeds) | rounds to {target:.0%} | rounds to "
            "FedAvg's final accuracy, over FedAvg's |",
            "|---|---|---|---|---|",
        ]
        for method in self.methods:
            finals, rate = [100 * final for final in self.finals(method)], self.best_rate(method)
            if rate is None or not finals:
                continue
            tuned = self._tuned(method)
            edge = " (the last tried)" if rate in (min(tuned), max(tuned)) else ""
            lines.append(
                f"| {method} | {rate:g}{edge} | {statistics.fmean(finals):.1f} ({min(finals):.1f} to {max(finals):.1f}, "
                f"{len(finals)} seed{'s' * (len(finals) > 1)}) | {_listed(self.rounds_to(method, target).values(), '{:.0f}')} | "
                f"{_listed(self.shares(method).values(), '{:.2f}')} |"
            )
        return "\n".join(lines)

    def verdict(self) -> str:
        """Return what became of the two targets; a line each."""
        if not all(self.of(method) for method in ("fedavg", "fedavgm", "fedmom")):
            return f"{self.task}: FedAvg, FedAvgM and FedMom are not finished."
        shares = self.shares("fedmom")
        median = statistics.median(shares.values())
        ours, theirs = self.finals("fedmom"), self.finals("fedavgm")
        ahead = 100 * (statistics.fmean(ours) - statistics.fmean(theirs))
        overlap = max(ours) >= min(theirs) and max(theirs) >= min(ours)
        return (
            f"{self.task}: FedMom has FedAvg's final accuracy after {median:.2f} of its rounds (median of "
            f"{_listed(shares.values(), '{:.2f}')}, by seed); at most 0.7 was aimed at: "
            f"{'reached' if median <= 0.7 else 'missed'}.\n"
            f"{self.task}: FedMom is {ahead:+.1f} points from FedAvgM at the end (the ranges over seeds "
            f"{'overlap' if overlap else 'are apart'}); at least level was aimed at: "
            f"{'reached' if ahead >= 0 or overlap else 'missed'}."
        )


def draw(tasks: Sequence[Curves], path: Path) -> None:
    """Write the picture: accuracy against rounds, one panel a task; lines are means over seeds, bands their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(tasks), 3.8), layout="constrained", dpi=130)
    for axes, curves in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method in curves.methods:
            runs = [smoothed(curve) for curve in curves.of(method).values()]
            if not runs:
                continue
            rounds, values = range(len(runs[0])), list(zip(*runs, strict=True))
            colour = _COLOURS.get(method, "#000000")
            axes.plot(rounds, [statistics.fmean(v) for v in values], color=colour, label=method, linewidth=1.6)
            axes.fill_between(
                rounds, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0
            )
        axes.set(xlabel="round", ylabel=f"accuracy, mean of {LAST} rounds", title=curves.task)
        axes.grid(True, color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _first(curve: Sequence[float], accuracy: float) -> float:
    return next((float(at) for at, value in enumerate(smoothed(curve)) if value >= accuracy - 1e-12), math.inf)


def _listed(values: Iterable[float], form: str) -> str:
    return ", ".join(form.format(value) if math.isfinite(value) else "-" for value in values)
