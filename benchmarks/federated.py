"""What a federation's server costs: rounds per second beside Flower's own FedAvg, and memory.

    python -m benchmarks.federated [--rounds 15] [--repeats 3]       (appends to benchmarks/results/federated.csv)
    python -m benchmarks.federated --table

Rounds: FedMom and Flower's FedAvg in turn, with the same Lightning clients, in one simulation of Flower's; the start of Ray and
one round that warms up are not counted. At least 0.9 of Flower's pace is aimed at.

Memory: the most that the server's process takes beyond what it had before, in copies of the model (float32), while all of the
clients answer, in two rounds. It is a process of its own with one client at work at a time, so one reply is in it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before Flower is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.results_file import ResultsFile
from lightning_distopt.federated import FedMom, InProcessGrid
from lightning_distopt.federated.records import to_record
from recipes.federated.app.digits_federation import client_app, make_net

RESULTS = Path(__file__).parent / "results" / "federated.csv"
COLUMNS = ("what", "strategy", "clients", "parameters", "repeat", "value", "unit", "machine", "versions_of", "load")
KEY = ("what", "strategy", "clients", "parameters", "repeat")
STRATEGIES: dict[str, Any] = {"FedAvg of Flower": FedAvg, "FedMom": FedMom}
KNOWN = "FedMom, once it knows a typical norm"  # it holds 16 updates back before
CLIENTS = 10
COHORTS = (20, 100)
PARAMETERS = (1_000_000, 4_000_000)


def paces(rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return rounds per second of each repetition by strategy; they take turns, after a round that warms up."""
    from flwr.simulation import run_simulation

    speeds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        options: dict[str, Any] = {"fraction_train": 0.5, "min_available_nodes": CLIENTS}
        arrays = to_record(make_net().state_dict())
        FedAvg(**options).start(grid, arrays, 1)
        for _ in range(repeats):
            for name, strategy in STRATEGIES.items():
                begun = time.perf_counter()
                strategy(**options).start(grid, arrays, rounds)
                speeds[name].append(rounds / (time.perf_counter() - begun))

    resources: dict[str, Any] = {
        "client_resources": {"num_cpus": 1},
        "init_args": {"num_cpus": 2, "log_to_driver": False},
    }
    run_simulation(app, client_app, CLIENTS, backend_config=resources)
    return speeds


def copies_of_the_model(strategy: str, clients: int, parameters: int) -> float:
    """Return the greatest growth of a server's process in two rounds, over the bytes of the model."""
    context = multiprocessing.get_context("fork")  # so the libraries are in memory before, and not counted
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, strategy, clients, parameters))
    process.start()
    theirs.close()
    grown = int(ours.recv())
    process.join()
    return grown / (4 * parameters)


def _serve(pipe: Any, strategy: str, clients: int, parameters: int) -> None:
    torch.set_num_threads(1)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sent = message.content.array_records["arrays"]
        arrays = ArrayRecord(  # a layer at a time, as a client with little memory would
            {name: to_record({name: torch.from_numpy(array.numpy()) - 0.1})[name] for name, array in sent.items()}
        )
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    grid = InProcessGrid(app, clients)
    layers = {f"layer{number}": torch.zeros(parameters // 10) for number in range(10)}
    before = _memory("VmRSS")
    server = STRATEGIES[strategy.partition(",")[0]](fraction_evaluate=0.0, min_available_nodes=clients)
    if strategy == KNOWN:
        server.history.norms.append(0.1 * parameters**0.5)  # what every client's update has
    server.start(grid, to_record(layers), 2)
    pipe.send(_memory("VmHWM") - before)
    pipe.close()


def _memory(field: str) -> int:
    """Return a figure of this process in bytes: resident memory now, or at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(results: ResultsFile, rounds: int, repeats: int) -> None:
    """Measure both, and record them; memory that is recorded is not measured again."""
    for name, clients, parameters in itertools.product((*STRATEGIES, KNOWN), COHORTS, PARAMETERS):
        run = {"what": "memory", "strategy": name, "clients": clients, "parameters": parameters, "repeat": 0}
        if results.find(**run) is None:
            results.record(**run, value=copies_of_the_model(name, clients, parameters), unit="models")
    if not repeats:
        return
    size = sum(tensor.numel() for tensor in make_net().state_dict().values())
    for name, values in paces(rounds, repeats).items():
        for repeat, value in enumerate(values):
            results.record(
                what="pace",
                strategy=name,
                clients=CLIENTS,
                parameters=size,
                repeat=repeat,
                value=value,
                unit="rounds/s",
            )


def tables(results: ResultsFile) -> str:
    """Return both as Markdown."""
    rows = results.rows()
    values: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        values.setdefault((row["what"], row["strategy"], row["clients"], row["parameters"]), []).append(
            float(row["value"])
        )
    paces_of = {key[1]: found for key, found in values.items() if key[0] == "pace"}
    theirs = statistics.median(paces_of["FedAvg of Flower"]) if paces_of else 1.0
    lines = ["| strategy | rounds/s, median (repeats) | over Flower's |", "|---|---|---|"]
    for name, found in paces_of.items():
        each = ", ".join(f"{value:.2f}" for value in found)
        lines.append(f"| {name} | {statistics.median(found):.2f} ({each}) | {statistics.median(found) / theirs:.2f} |")
    lines += ["", "| strategy | parameters | clients in the round | copies of the model |", "|---|---|---|---|"]
    for key, found in values.items():
        if key[0] == "memory":
            lines.append(f"| {key[1]} | {int(key[3]):,} | {key[2]} | {found[0]:.1f} |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Measure, record, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.federated",
        description="What a federation's server costs: rounds per second, memory.",
    )
    parser.add_argument("--rounds", type=int, default=15, help="of each repetition (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each strategy; 0: memory only (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    options = parser.parse_args(args)
    for name in ("flwr", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results = ResultsFile(options.results, COLUMNS, KEY)
    if not options.table:
        measure(results, options.rounds, options.repeats)
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
