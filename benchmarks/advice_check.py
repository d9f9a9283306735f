"""Does ``distopt advise`` predict what was measured? Its step times beside those of ``benchmarks.network``.

    python -m benchmarks.advice_check            # after benchmarks.network, on the same quiet machine

Compressors are measured now; the step without communication, and the measured steps, come from
``benchmarks/results/network.csv``. The link is what ``tc`` was told, less the headers of Ethernet, IP and TCP.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from lightning_distopt.advice import CANDIDATES, Candidate, Link, Workload, measure_codec, predict
from lightning_distopt.advice.report import parse_bandwidth

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results" / "network.csv"
_PAYLOAD = 1448 / 1514  # of a full Ethernet frame
_LATENCY = 1e-4  # of a message between two namespaces
# benchmarks.network's names
_METHODS = {
    "ddp": "fp32 (ddp)",
    "bf16": "bf16",
    "sign": "sign, ahead",
    "topk:0.01": "top-k 1 %, ahead",
    "random_block:0.01": "block 1 %, ahead",
    "bingrad_b": "BinGrad-b, ahead",
    "qsgd:5": "QSGD-5",
    "orq:5": "ORQ-5",
}


def main(args: Sequence[str] | None = None) -> int:
    """Print measured and predicted milliseconds of a step, and how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    measured, numel = _measured(options.results)
    codecs = {c.name: measure_codec(c, torch.device("cpu"), 1 << 23) for c in CANDIDATES}

    from rich.console import Console
    from rich.table import Table

    table = Table(title="Milliseconds of a step", title_justify="left")
    for column in ("link", "hosts", "method", "measured", "predicted", "error"):
        table.add_column(column, justify="left" if column in ("link", "method") else "right")
    errors = []
    for (bandwidth, hosts), cell in sorted(measured.items()):
        if bandwidth == "unshaped" or "none" not in cell:
            continue
        # a forward takes about a third; DistributedDataParallel cut this model into 3 buckets
        work = Workload(numel, cell["none"] / 3, cell["none"] * 2 / 3, buckets=3)
        link = Link(parse_bandwidth(bandwidth) * _PAYLOAD, _LATENCY)
        for method, name in _METHODS.items():
            if method in cell:
                candidate: Candidate = next(c for c in CANDIDATES if c.name == name)
                seconds = predict(candidate, work, link, codecs[name], hosts).seconds
                errors.append(seconds / cell[method] - 1)
                figures = f"{1e3 * cell[method]:.0f}", f"{1e3 * seconds:.0f}", f"{100 * errors[-1]:+.0f} %"
                table.add_row(bandwidth, str(hosts), method, *figures)
    console = Console()
    console.print(table)
    if errors:
        within = sum(abs(error) <= 0.25 for error in errors)
        console.print(
            f"{within} of {len(errors)} within 25 %; the largest error is {100 * max(map(abs, errors)):.0f} %."
        )
    return 0


def _measured(path: Path) -> tuple[dict[tuple[str, int], dict[str, float]], int]:
    """Return the median seconds of a step, by (bandwidth, hosts) and method, and the model's parameters."""
    steps: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    numel = 0
    with path.open() as file:
        for row in csv.DictReader(file):
            if not row["failure"]:
                numel = int(row["parameters"])
                times = [float(value) / 1e3 for value in row["step_ms"].split()]
                steps[row["bandwidth"], int(row["hosts"])][row["method"]] += times
    return {cell: {name: median(values) for name, values in found.items()} for cell, found in steps.items()}, numel


if __name__ == "__main__":
    raise SystemExit(main())
