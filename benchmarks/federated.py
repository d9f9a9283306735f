"""Rounds per second in Flower's simulation: our strategy and Flower's FedAvg, in turn, with the same clients.

    python -m benchmarks.federated [--rounds 10] [--repeats 3]

The ratio is what is aimed at (at least 0.9); the start of Ray is not counted. Prints, and records nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before Flower is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from lightning_distopt.federated import FedMom
from lightning_distopt.federated.records import to_record
from recipes.federated.app.digits_federation import client_app, make_net

CLIENTS = 10
OPTIONS = {"fraction_train": 0.5, "min_available_nodes": CLIENTS}


def measure(rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return rounds per second of each repetition by strategy; they take turns, after a round that warms up."""
    from flwr.simulation import run_simulation

    speeds: dict[str, list[float]] = {"FedAvg of Flower": [], "FedMom": []}
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = to_record(make_net().state_dict())
        FedAvg(**OPTIONS).start(grid, arrays, 1)
        for _ in range(repeats):
            for name, strategy in (("FedAvg of Flower", FedAvg(**OPTIONS)), ("FedMom", FedMom(**OPTIONS))):
                begun = time.perf_counter()
                strategy.start(grid, arrays, rounds)
                speeds[name].append(rounds / (time.perf_counter() - begun))

    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2, "log_to_driver": False}}
    run_simulation(app, client_app, CLIENTS, backend_config=resources)
    return speeds


def main(args: Sequence[str] | None = None) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="of each repetition (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each strategy (default: %(default)s)")
    options = parser.parse_args(args)
    for name in ("flwr", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    speeds = measure(options.rounds, options.repeats)
    for name, values in speeds.items():
        print(f"{name:18} {statistics.median(values):6.2f} rounds/s  ({', '.join(f'{value:.2f}' for value in values)})")
    ours, theirs = (statistics.median(speeds[name]) for name in ("FedMom", "FedAvg of Flower"))
    print(f"ratio              {ours / theirs:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
