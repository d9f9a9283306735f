"""Does the cost model predict what is measured? Its step times beside those of hosts with limited links.

    sudo python -m benchmarks.advice_check                                    beside benchmarks/results/network.csv
    sudo python -m benchmarks.advice_check --hosts 2,4,8 --bandwidth 50mbit   beside runs made now; adds to advice.csv
    python -m benchmarks.advice_check --table                                 what advice.csv holds, as Markdown

On each network the hosts first do what ``compressed_ddp_auto`` does at the start of a fit: some steps in 16 bit, then the
link and all compressors. The predictions made of that are compared with step times that :mod:`benchmarks.step_time` finds.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.hosts import bits_per_second, enter, network
from benchmarks.methods import Auto, sgd
from benchmarks.results_file import machine, versions
from benchmarks.step_time import Job, data, measure, model, parameters
from lightning_distopt.advice import CANDIDATES, Candidate, predict
from lightning_distopt.advice.auto_sync import TIMED_TO, Figures
from lightning_distopt.compressors import Compressor
from lightning_distopt.data_parallel.exchanges import choose_exchange
from lightning_distopt.exchange import Meter
from tests.ranks import run_ranks

__all__ = ["main"]

FOLDER = Path(__file__).parent / "results"
COLUMNS = (
    "bandwidth", "hosts", "width", "batch", "method", "measured_ms", "predicted_ms", "link_mbit", "latency_ms", "overlap",
    "compute_ms", "parameters", "versions", "machine",
)  # fmt: skip
# What benchmarks.network measures beside the candidates.
_ALL = (
    *CANDIDATES,
    Candidate("PowerSGD-1", "powersgd:1", "gradients", residual=True),
    Candidate("top-k 0.1 %, feedback", "topk:0.001", "gradients", residual=True),
    Candidate("top-k 0.1 %, ahead", "topk:0.001", "updates"),
)
# benchmarks.network's names
METHODS = {
    "ddp": "fp32 (ddp)",
    "bf16": "bf16",
    "fp16": "fp16",
    "qsgd:5": "QSGD-5",
    "orq:5": "ORQ-5",
    "terngrad": "TernGrad",
    "powersgd:1": "PowerSGD-1",
    "powersgd:2": "PowerSGD-2",
    "feedback:sign": "sign, feedback",
    "feedback:bingrad_b": "BinGrad-b, feedback",
    "feedback:topk:0.01": "top-k 1 %, feedback",
    "feedback:topk:0.001": "top-k 0.1 %, feedback",
    "sign": "sign, ahead",
    "topk:0.01": "top-k 1 %, ahead",
    "topk:0.001": "top-k 0.1 %, ahead",
    "random_block:0.01": "block 1 %, ahead",
    "bingrad_b": "BinGrad-b, ahead",
}
NOW = ("ddp", "bf16", "qsgd:5", "powersgd:2", "sign", "topk:0.01")


def main(args: Sequence[str] | None = None) -> int:
    """Compare, print, and write down what was measured now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "network.csv", help="of benchmarks.network")
    parser.add_argument("--hosts", default="", help="numbers of hosts to measure now, for example 2,4,8")
    parser.add_argument("--bandwidth", default="50mbit", help="of each link, with --hosts")
    parser.add_argument("--methods", default=",".join(NOW), help="to measure, with --hosts")
    parser.add_argument("--width", type=int, default=32, help="of the model, with --hosts (32: 1.1 M parameters)")
    parser.add_argument("--batch", type=int, default=2, help="images of a host, with --hosts")
    parser.add_argument("--table", action="store_true", help="print advice.csv")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.table:
        _table(FOLDER / "advice.csv")
    elif options.hosts:
        for hosts in map(int, options.hosts.split(",")):
            _now(options, hosts)
    else:
        _beside(options.results)
    return 0


def _figures(rank: int, world: int, job: Job, names: Sequence[str]) -> Figures:
    """Do what happens at the start of a fit, but measure these candidates."""
    torch.manual_seed(job.seed)
    net = model(job.width)
    replica = Auto(net, sgd(net, 0.01), Meter())
    replica.auto.candidates = [candidate for candidate in _ALL if candidate.name in names]
    batches = data(job, rank)
    for i in range(TIMED_TO):
        replica.step(*batches[i % len(batches)])
    return replica.auto.measure()


def _predicted(names: Sequence[str], job: Job, methods: Sequence[str]) -> tuple[Figures, dict[str, float]]:
    """Return what the hosts measure, and seconds of a step by the name in benchmarks.network."""
    figures: Figures = run_ranks(
        len(names), _figures, job, [METHODS[m] for m in methods], timeout=150.0, before=partial(enter, names)
    )[0]
    work, _, link, codecs = figures
    found = {candidate.name: candidate for candidate in _ALL}
    seconds = {
        method: predict(found[name], work, link, codecs[name], len(names), _exchange(found[name], len(names))).seconds
        for method, name in METHODS.items()
        if method in methods
    }
    return figures, seconds


def _exchange(candidate: Candidate, world: int) -> str | None:
    """Return the exchange that benchmarks.methods takes."""
    scheme = candidate.compressor
    return choose_exchange(scheme, world) if isinstance(scheme, Compressor) else None


def _beside(path: Path) -> None:
    """Compare with the runs of benchmarks.network."""
    for (bandwidth, hosts, width, batch), cell in sorted(_measured(path).items()):
        with network(hosts, bits_per_second(bandwidth)) as names:
            figures, predicted = _predicted(names, Job("auto", batch, 0, 0.0, 0, width), list(METHODS))
        _show(f"{bandwidth}, {hosts} hosts", figures, cell, predicted)


def _now(options: argparse.Namespace, hosts: int) -> None:
    """Compare with runs made now, and append them to advice.csv."""
    measured, methods = {}, [name for name in options.methods.split(",") if name in METHODS]
    with network(hosts, bits_per_second(options.bandwidth)) as names:
        figures, predicted = _predicted(names, Job("auto", options.batch, 0, 0.0, 0, options.width), methods)
        for method in methods:
            job = Job(method, options.batch, 8, 3.0, 0, options.width)
            measured[method] = median(measure(names, job, 120.0).steps)
    _show(f"{options.bandwidth}, {hosts} hosts", figures, measured, predicted)
    facts = {
        "bandwidth": options.bandwidth, "hosts": hosts, "width": options.width, "batch": options.batch,
        "link_mbit": f"{8e-6 * figures.link.bandwidth:.1f}", "latency_ms": f"{1e3 * figures.link.latency:.3f}",
        "overlap": f"{figures.link.overlap:.2f}", "compute_ms": f"{1e3 * figures.work.compute:.1f}",
        "parameters": parameters(options.width), "versions": versions(), "machine": machine(),
    }  # fmt: skip
    path = FOLDER / "advice.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for method, seconds in measured.items():
            times = {"measured_ms": f"{1e3 * seconds:.1f}", "predicted_ms": f"{1e3 * predicted[method]:.1f}"}
            writer.writerow({**facts, "method": method, **times})


def _show(what: str, figures: Figures, measured: dict[str, float], predicted: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    link, work = figures.link, figures.work
    title = (
        f"{what}: found {8e-6 * link.bandwidth:.4g} Mbit/s, {1e3 * link.latency:.3g} ms, overlap {link.overlap:.2f}; "
        f"{1e3 * work.forward:.0f} + {1e3 * work.backward:.0f} ms without communication"
    )
    table = Table(title=title, title_justify="left")
    for column in ("method", "measured ms", "predicted ms", "error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    errors = []
    for method in METHODS:
        if method in measured:
            errors.append(predicted[method] / measured[method] - 1)
            times = f"{1e3 * measured[method]:.0f}", f"{1e3 * predicted[method]:.0f}", f"{100 * errors[-1]:+.0f} %"
            table.add_row(method, *times)
    console = Console(width=130)
    console.print(table)
    within = sum(abs(error) <= 0.25 for error in errors)
    largest = 100 * max(map(abs, errors), default=0.0)
    console.print(f"{within} of {len(errors)} within 25 %; the largest error is {largest:.0f} %.")


def _measured(path: Path) -> dict[tuple[str, int, int, int], dict[str, float]]:
    """Return the median seconds of a step, by (bandwidth, hosts, width, batch) and method."""
    steps: dict[tuple[str, int, int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        for row in csv.DictReader(file):
            if not row["failure"]:
                key = row["bandwidth"], int(row["hosts"]), int(row["width"]), int(row["batch"])
                steps[key][row["method"]] += [float(value) / 1e3 for value in row["step_ms"].split()]
    return {cell: {name: median(values) for name, values in found.items()} for cell, found in steps.items()}


def _table(path: Path) -> None:
    """Print measured and predicted times by network and method."""
    rows: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            measured, predicted = float(row["measured_ms"]), float(row["predicted_ms"])
            text = f"{measured:,.0f} / {predicted:,.0f} ({100 * (predicted / measured - 1):+.0f} %)"
            rows[row["bandwidth"], row["hosts"]][row["method"]] = text
    methods = list(dict.fromkeys(method for row in rows.values() for method in row))
    print("| link | hosts | " + " | ".join(f"`{method}`" for method in methods) + " |")
    print("|---|---|" + "---|" * len(methods))
    for (bandwidth, hosts), row in rows.items():
        print(f"| {bandwidth} | {hosts} | " + " | ".join(row.get(method, "") for method in methods) + " |")


if __name__ == "__main__":
    raise SystemExit(main())
