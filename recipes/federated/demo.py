"""The demonstration behind `make federated-demo`: ten clients on digits, FedAvg and FedMom, in Flower's simulation."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before Flower is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

from lightning_distopt.federated import FedMom, lightning_server_app
from lightning_distopt.federated.partition_picture import draw_partitions
from lightning_distopt.federated.partitions import dirichlet
from recipes.federated.app.digits_federation import (
    ALPHA,
    CPU,
    DigitsTest,
    client_app,
    digits,
    make_net,
)

CLIENTS = 10
METHODS = {"FedAvg": 0.0, "FedMom": 0.8}


@dataclass(frozen=True)
class Run:
    """What one federation reached.

    Attributes:
        name: of the method.
        seconds: wall time; the first federation's has the start of Ray's processes in it.
        accuracies: of the server on images that no client holds, after each round from 0.
        clients: accuracy over the clients' own validation images, weighted, in the last round.
        worst: the same over the worst tenth of them.
    """

    name: str
    seconds: float
    accuracies: list[float]
    clients: float
    worst: float


def federations(rounds: int) -> list[Run]:
    """Run one federation a method, half of the clients a round, all in one simulation: Ray takes longest to start."""
    from flwr.simulation import run_simulation

    runs: list[Run] = []
    simulation = ServerApp()

    @simulation.main()
    def main(grid: Grid, context: Context) -> None:
        for number, (name, momentum) in enumerate(METHODS.items(), start=1):
            print(f"=== {number} of {len(METHODS)}: {name} ===", flush=True)
            runs.append(federation(name, momentum, rounds, grid, context))

    resources = {
        "client_resources": {"num_cpus": 1},
        "init_args": {"num_cpus": 2, "log_to_driver": False, "logging_level": "ERROR"},
    }
    run_simulation(simulation, client_app, CLIENTS, backend_config=resources)
    return runs


def federation(name: str, momentum: float, rounds: int, grid: Grid, context: Context) -> Run:
    """Run one federation."""
    results: list[Result] = []
    begun = time.perf_counter()
    app = lightning_server_app(
        make_net,
        lambda _: FedMom(momentum=momentum, fraction_train=0.5, min_available_nodes=CLIENTS),
        rounds,
        datamodule_factory=DigitsTest,
        on_end=results.append,
        trainer=CPU,
    )
    app(grid, context)
    server, clients = results[0].evaluate_metrics_serverapp, results[0].evaluate_metrics_clientapp
    last = clients[max(clients)]
    return Run(
        name,
        time.perf_counter() - begun,
        [float(server[number]["server/val/accuracy"]) for number in sorted(server)],
        float(last["val/accuracy"]),
        float(last["val/accuracy/worst_10"]),
    )


def print_table(runs: Sequence[Run]) -> None:
    """Print one row a federation."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Digits over {CLIENTS} clients, Dirichlet({ALPHA}), {len(runs[0].accuracies) - 1} rounds of 5 clients"
    )
    table.add_column("method", no_wrap=True)
    for column in ("server accuracy", "clients' accuracy", "worst client", "rounds to 85 %", "seconds"):
        table.add_column(column, justify="right")
    for run in runs:
        reached = next((str(n) for n, accuracy in enumerate(run.accuracies) if accuracy >= 0.85), "-")
        numbers = (f"{run.accuracies[-1]:.1%}", f"{run.clients:.1%}", f"{run.worst:.1%}", reached, f"{run.seconds:.0f}")
        table.add_row(run.name, *numbers)
    Console().print(table)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write the picture: accuracy on the server against rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained", dpi=150)
    axes = figure.subplots()
    for run, colour in zip(runs, ("#4c566a", "#d1495b"), strict=True):
        axes.plot(range(len(run.accuracies)), run.accuracies, color=colour, marker="o", markersize=3, label=run.name)
    axes.set(xlabel="round", ylabel="accuracy on the server", ylim=(0, 1), title=f"Digits over {CLIENTS} clients")
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(args: Sequence[str] | None = None) -> int:
    """Run the federations, compare, and say where the pictures are."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.federated.demo",
        description="Ten clients with different mixtures of digits learn together, by FedAvg and by FedMom, in Flower's "
        "simulation on this machine.",
    )
    parser.add_argument("--rounds", type=int, default=10, help="of each federation, at least 1 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/federated-demo"), help="folder (default: %(default)s)")
    options = parser.parse_args(args)
    if options.rounds < 1:
        parser.error(f"`--rounds` must be at least 1: got {options.rounds}.")
    for name in ("flwr", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    out = options.out.resolve()
    labels = digits()[0].tensors[1].numpy()
    draw_partitions(dirichlet(labels, CLIENTS, ALPHA, seed=1), labels, out / "who_has_what.png", f"Dirichlet({ALPHA})")
    print("Ray starts ...", flush=True)
    runs = federations(options.rounds)
    draw(runs, out / "accuracy.png")
    print_table(runs)
    print(f"\nPictures: {out / 'accuracy.png'}, {out / 'who_has_what.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
