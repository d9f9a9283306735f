"""Rounds to a target, for six ways to average: stopped and resumed at will.

    python -m recipes.federated.study mnist --data <folder of MNIST> [--runs 10] [--part 1/2]
    python -m recipes.federated.study mnist --data <folder> --table            (Markdown)

First comes the grid of client rates, the same for every method, with the first seed; then, at each method's best rate, the
other seeds. Rows are appended to the CSV at once; what is there is not run again. The clients are those of
:func:`lightning_client_app`, called in this process (``InProcessGrid``); all strategies but FedMom are Flower's own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before Flower is imported

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx, Strategy
from torch.utils.data import Subset, TensorDataset

from benchmarks.results_file import ResultsFile, versions
from lightning_distopt.federated import FedMom, InProcessGrid, Service, lightning_client_app
from lightning_distopt.federated.records import tensors_of, to_record
from recipes.federated.tasks import TASKS, Part, Task

RESULTS = Path(__file__).parents[1] / "studies" / "federated.csv"
COLUMNS = ("task", "method", "rate", "seed", "final", "best", "rounds_to_target", "accuracies", "seconds", "versions")
KEY = ("task", "method", "rate", "seed")
SEEDS = (0, 1, 2)
SHARE = 0.1

Maker = Callable[[int, dict[str, Any]], Strategy]
METHODS: dict[str, Maker] = {
    "fedsgd": lambda seed, options: FedAvg(**options),
    "fedavg": lambda seed, options: FedAvg(**options),
    "fedprox": lambda seed, options: FedProx(proximal_mu=0.01, **options),
    "fedavgm": lambda seed, options: FedAvgM(server_learning_rate=1.0, server_momentum=0.9, **options),
    "fedadam": lambda seed, options: FedAdam(eta=0.01, **options),
    "fedmom": lambda seed, options: FedMom(1.0, 0.9, seed=seed, service=Service(identify=False), **options),
}


class Run(NamedTuple):
    """One federation: where it stands in the study."""

    method: str
    rate: float
    seed: int


def plan(task: Task, results: ResultsFile) -> Iterator[Run]:
    """Yield the runs in order; those at a best rate only once it is known."""
    for rate in task.rates:
        for method in METHODS:
            yield Run(method, rate, SEEDS[0])
    for seed in SEEDS[1:]:
        for method in METHODS:
            rate_of = best_rate(task, method, results)
            if rate_of is not None:
                yield Run(method, rate_of, seed)


def best_rate(task: Task, method: str, results: ResultsFile) -> float | None:
    """Return the rate with the highest mean accuracy over the last five rounds; ``None`` while the grid is unfinished."""
    rows = [
        row for row in results.rows() if (row["task"], row["method"], row["seed"]) == (task.name, method, str(SEEDS[0]))
    ]
    if len(rows) < len(task.rates):
        return None
    return float(max(rows, key=lambda row: float(row["final"]))["rate"])


def federate(task: Task, run: Run, rounds: int) -> list[float]:
    """Return the server's accuracy after each round, from 0."""
    accuracies: list[float] = []

    def module() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            return task.module(run.rate)

    def part(partition: int, partitions: int) -> Part:
        inputs, targets = Subset(task.data, task.parts[partition].tolist())[:]
        return Part(TensorDataset(inputs, targets), len(inputs) if run.method == "fedsgd" else task.batch)

    def judge(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        judged = module()
        judged.load_state_dict({name: tensor.float() for name, tensor in tensors_of(arrays).items()})
        accuracies.append(judged.accuracy(task.test))
        return None

    random.seed(run.seed)  # of which Flower's own strategies draw their cohorts
    clients = len(task.parts)
    options = {
        "fraction_train": SHARE,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": clients,
    }
    grid = InProcessGrid(
        lightning_client_app(
            module, part, local_epochs=1 if run.method == "fedsgd" else task.epochs, trainer={"accelerator": "cpu"}
        ),
        clients,
    )
    METHODS[run.method](run.seed, options).start(
        grid, to_record(module().state_dict()), rounds, train_config=ConfigRecord({"seed": run.seed}), evaluate_fn=judge
    )
    return accuracies


def measure(task: Task, results: ResultsFile, runs: int | None, part: tuple[int, int], rounds: int) -> int:
    """Run what is missing, at most ``runs``; return how many were run."""
    done = 0
    for number, run in enumerate(plan(task, results)):
        if number % part[1] != part[0] or (runs is not None and done >= runs):
            continue
        row = {"task": task.name, "method": run.method, "rate": f"{run.rate:g}", "seed": run.seed}
        if results.find(**row) is not None:
            continue
        begun = time.perf_counter()
        curve = federate(task, run, rounds)
        reached = next((number for number, accuracy in enumerate(curve) if accuracy >= task.target), "")
        results.append(
            {
                **row,
                "final": f"{statistics.mean(curve[-5:]):.4f}",
                "best": f"{max(curve):.4f}",
                "rounds_to_target": reached,
                "accuracies": json.dumps([round(accuracy, 4) for accuracy in curve]),
                "seconds": f"{time.perf_counter() - begun:.1f}",
                "versions": versions(),
            }
        )
        done += 1
        print(
            f"{run.method:8} rate {run.rate:<5g} seed {run.seed}  final {statistics.mean(curve[-5:]):.1%}", flush=True
        )
    return done


def table(task: Task, results: ResultsFile) -> str:
    """Return, as Markdown, each method at its best rate: accuracy of the last five rounds, and rounds to accuracies."""
    kept: dict[str, list[dict[str, str]]] = {}
    for method in METHODS:
        if (rate := best_rate(task, method, results)) is not None:
            wanted = (task.name, method, rate)
            kept[method] = [row for row in results.rows() if (row["task"], row["method"], float(row["rate"])) == wanted]
    fedavg = statistics.mean(float(row["final"]) for row in kept["fedavg"]) if "fedavg" in kept else task.target
    lines = [
        f"| method | client rate | accuracy, last 5 rounds (range over seeds) | rounds to {task.target:.0%} | rounds to FedAvg's "
        f"{fedavg:.1%} |",
        "|---|---|---|---|---|",
    ]
    for method, rows in kept.items():
        finals = [100 * float(row["final"]) for row in rows]
        reached = [_rounds(row, task.target) for row in rows], [_rounds(row, fedavg) for row in rows]
        lines.append(
            f"| {method} | {float(rows[0]['rate']):g} | {statistics.mean(finals):.1f} ({min(finals):.1f} to {max(finals):.1f}) | "
            + " | ".join(", ".join(one) for one in reached)
            + " |"
        )
    return "\n".join(lines)


def _rounds(row: dict[str, str], accuracy: float) -> str:
    return next((str(number) for number, value in enumerate(json.loads(row["accuracies"])) if value >= accuracy), "-")


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.federated.study", description="Rounds to a target, by method."
    )
    parser.add_argument("task", choices=list(TASKS), help="what is learnt")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with MNIST's idx files, or with input.txt(.gz)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="at most so many (default: all that are missing)")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th run, for n processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="of each run (default: the task's)")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    options = parser.parse_args(args)
    for name in ("flwr", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_distopt"):
        logging.getLogger(name).setLevel(logging.ERROR)
    task, results = TASKS[options.task](options.data), ResultsFile(options.results, COLUMNS, KEY)
    if options.table:
        print(table(task, results))
        return 0
    index, parts = (int(number) for number in options.part.split("/"))
    measure(task, results, options.runs, (index - 1, parts), options.rounds or task.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
