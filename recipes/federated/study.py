"""Rounds to a target, for six ways to average: stopped and resumed at will.

    python -m recipes.federated.study mnist --data <folder of MNIST> [--runs 10] [--part 1/2]
    python -m recipes.federated.study --table [--picture docs/federated.png]     (Markdown, from the rows alone)

First comes the grid of client rates, the same for every method, with the first seed, and one rate beyond it where a method's best
is at its end; then, at each method's best rate, the other seeds. Rows are appended to the CSV at once; what is there is not run
again. The clients are those of :func:`lightning_client_app`, called in this process (``InProcessGrid``); all strategies but
FedMom are Flower's own.
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
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.federated import FedMom, InProcessGrid, Service, lightning_client_app
from lightning_distopt.federated.records import tensors_of, to_record
from recipes.federated.curves import LAST, TUNING_SEED, Curves, draw
from recipes.federated.tasks import TASKS, Part, Task

RESULTS = Path(__file__).parents[1] / "studies" / "federated.csv"
COLUMNS = ("task", "method", "rate", "seed", "target", "final", "best", "accuracies", "seconds", "versions")
KEY = ("task", "method", "rate", "seed")
SEEDS = (TUNING_SEED, 1, 2)
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
            yield Run(method, rate, TUNING_SEED)
    for method in METHODS:
        if (beyond := _curves(task, results).beyond(method)) is not None:
            yield Run(method, beyond, TUNING_SEED)
    for seed in SEEDS[1:]:
        for method in METHODS:
            if (best := _curves(task, results).best_rate(method)) is not None:
                yield Run(method, best, seed)


def _curves(task: Task, results: ResultsFile) -> Curves:
    return Curves(task.name, results, tuple(METHODS), task.rates)


def federate(task: Task, run: Run, rounds: int) -> list[float]:
    """Return the server's accuracy after each round, from 0; zeros after a round that would make the model infinite."""
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
    strategy = METHODS[run.method](run.seed, options)
    try:
        strategy.start(
            grid,
            to_record(module().state_dict()),
            rounds,
            train_config=ConfigRecord({"seed": run.seed}),
            evaluate_fn=judge,
        )
    except NonFiniteError:  # FedMom ends a federation that diverges; Flower's go on with NaN
        accuracies += [0.0] * (rounds + 1 - len(accuracies))
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
        results.append(
            {
                **row,
                "target": task.target,
                "final": f"{statistics.fmean(curve[-LAST:]):.4f}",
                "best": f"{max(curve):.4f}",
                "accuracies": json.dumps([round(accuracy, 4) for accuracy in curve]),
                "seconds": f"{time.perf_counter() - begun:.1f}",
                "versions": versions(),
            }
        )
        done += 1
        final = statistics.fmean(curve[-LAST:])
        print(f"{task.name} {run.method:8} rate {run.rate:<5g} seed {run.seed}  final {final:.1%}", flush=True)
    return done


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.federated.study", description="Rounds to a target, by method."
    )
    parser.add_argument("task", nargs="?", choices=list(TASKS), help="what is learnt (not needed for the table)")
    parser.add_argument("--data", type=Path, help="folder with MNIST's idx files, or with input.txt(.gz)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="at most so many (default: all that are missing)")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th run, for n processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="of each run (default: the task's)")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--picture", type=Path, help="with --table: write the curves to this file")
    options = parser.parse_args(args)
    results = ResultsFile(options.results, COLUMNS, KEY)
    if options.table:
        tasks = [Curves(name, results, tuple(METHODS)) for name in TASKS if options.task in (None, name)]
        tasks = [curves for curves in tasks if curves.rows]
        for curves in tasks:
            print(f"{curves.task}\n\n{curves.table()}\n\n{curves.verdict()}\n")
        if options.picture is not None and tasks:
            draw(tasks, options.picture)
        return 0
    if options.task is None or options.data is None:
        parser.error("a task and `--data` are needed to run: mnist --data <folder>; or use `--table`.")
    for name in ("flwr", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_distopt"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    task = TASKS[options.task](options.data)
    index, parts = (int(number) for number in options.part.split("/"))
    measure(task, results, options.runs, (index - 1, parts), options.rounds or task.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
