"""Does compression pay on your network? Step time and time to accuracy on hosts with limited links, all on this machine.

    sudo python -m benchmarks.network                                    every method, 4 bandwidths, 2 and 4 hosts
    sudo python -m benchmarks.network --bandwidths 1gbit --hosts 2 --methods none,ddp,bf16,sign --repeats 3
    sudo python -m benchmarks.network --methods none,bf16,updates:topk:0.05      any compressor, by its text
    sudo python -m benchmarks.network --accuracy --data <CIFAR-10 image folder>  time to a stated accuracy
    python -m benchmarks.network --report                                redraw docs/network.png and docs/performance.md

Each host is a network namespace with one process of one thread; links are veth pairs that `tc tbf` holds to the stated
speed. All methods train the same model from the same seed on the same data. A run builds everything anew, takes a few
steps to warm up, and times the following ones; methods take turns, so that a disturbance hits all of them alike, and this
is repeated. Every finished run is a row of benchmarks/results/network.csv at once, and a run that is there is not made
again: stop with Ctrl-C and start again at will. A method that fails or hangs is a row with its reason.

The engines of `lightning_distopt.data_parallel` are driven by a plain loop, not by Lightning's Trainer: the Trainer adds
the same few milliseconds of Python to each method, which here would only blur the differences.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn

import torch
from rich.console import Console

from benchmarks import network_report, time_to_accuracy
from benchmarks.hosts import HostsError, bits_per_second, network, why_not
from benchmarks.methods import METHODS, method
from benchmarks.results_file import ResultsFile, load, machine, versions, wait_for_quiet
from benchmarks.step_time import WIDTH, Job, Sample, calibrate, measure, parameters, reason

COLUMNS = (
    "bandwidth", "hosts", "method", "repeat", "batch", "seed", "width", "failure", "step_ms", "sent_bytes", "codec_ms",
    "exposed_ms", "cpu_ms", "delayed_ms", "resent", "load", "parameters", "versions", "machine",
)  # fmt: skip
KEY = COLUMNS[:7]
TARGET_SECONDS = 0.1  # of a step without communication


class Cell(NamedTuple):
    """One run of the plan."""

    bandwidth: str
    hosts: int
    method: str
    repeat: int


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        bandwidths: as texts, see :func:`benchmarks.hosts.bits_per_second`.
        hosts: numbers of them.
        methods: names.
        repeats: runs of each method, taking turns.
        steps: timed in a run, at most.
        seconds: that the timed steps of a run take, about and at most.
        timeout: seconds after which a run has failed.
        batch: images of one host in a step; 0: such that a step without communication takes 100 ms.
        seed: of weights and data.
        width: of the model.
        retry: make runs again that failed.
        patience: seconds that a run waits, at most, for other programs to leave the cores alone.
    """

    bandwidths: tuple[str, ...]
    hosts: tuple[int, ...]
    methods: tuple[str, ...]
    repeats: int
    steps: int
    seconds: float
    timeout: float
    batch: int
    seed: int
    width: int
    retry: bool = False
    patience: float = 0.0

    def missing(self, row: dict[str, str] | None) -> bool:
        """Whether a run is to be made, going by its row."""
        return row is None or (self.retry and bool(row["failure"]))

    def rounds(self, bandwidth: str, hosts: int) -> Iterator[Cell]:
        """Yield the runs on one network: methods take turns, as often as there are repeats."""
        for repeat in range(self.repeats):
            for name in self.methods:
                yield Cell(bandwidth, hosts, name, repeat)


def results(path: Path) -> ResultsFile:
    """Return the file of the step times."""
    return ResultsFile(path, COLUMNS, KEY)


def run(plan: Plan, file: ResultsFile, console: Console) -> None:
    """Measure what is missing of a plan."""
    batch = plan.batch or _batch(plan, file, console)
    identity = {"batch": batch, "seed": plan.seed, "width": plan.width}
    networks = [(bandwidth, hosts) for hosts in plan.hosts for bandwidth in plan.bandwidths]
    todo = [
        [cell for cell in plan.rounds(*link) if plan.missing(file.find(**cell._asdict(), **identity))]
        for link in networks
    ]
    clock = _Clock([cell for cells in todo for cell in cells])
    facts = {"parameters": parameters(plan.width), "versions": versions(), "machine": machine()}
    for (bandwidth, hosts), cells in zip(networks, todo, strict=True):
        if not cells:
            continue
        with network(hosts, bits_per_second(bandwidth)) as names:
            for cell in cells:
                wait_for_quiet(plan.patience)
                before, start = load(), time.perf_counter()
                job = Job(cell.method, batch, plan.steps, plan.seconds, plan.seed, plan.width)
                figures = _figures(names, job, plan.timeout)
                file.append({**cell._asdict(), **identity, **figures, "load": before, **facts})
                clock.done(cell, time.perf_counter() - start)
                console.print(_line(cell, figures, clock), highlight=False)


def _batch(plan: Plan, file: ResultsFile, console: Console) -> int:
    """Return the batch of earlier runs with this model, or find one."""
    for row in reversed(file.rows()):
        if row["width"] == str(plan.width):
            return int(row["batch"])
    with network(2) as names:
        batch = calibrate(names, TARGET_SECONDS, plan.seed, plan.width)
    console.print(f"A step without communication takes about {TARGET_SECONDS * 1e3:.0f} ms with batch {batch}.")
    return batch


def _figures(names: list[str], job: Job, timeout: float) -> dict[str, Any]:
    """Return the columns that a run fills: its figures, or why there are none."""
    try:
        sample = measure(names, job, timeout)
    except AssertionError as error:
        return {"failure": reason(str(error))}
    return _columns(sample)


def _columns(sample: Sample) -> dict[str, Any]:
    return {
        "step_ms": " ".join(f"{seconds * 1e3:.1f}" for seconds in sample.steps),
        "sent_bytes": round(sample.sent),
        "codec_ms": f"{sample.codec * 1e3:.2f}",
        "exposed_ms": f"{sample.exposed * 1e3:.2f}",
        "cpu_ms": f"{sample.cpu * 1e3:.1f}",
        "delayed_ms": f"{sample.delayed * 1e3:.1f}",
        "resent": sample.resent,
    }


class _Clock:
    """How long the rest will take, going by the runs so far."""

    def __init__(self, cells: list[Cell]) -> None:
        self.left, self.total = list(cells), len(cells)
        self._seconds: dict[tuple[str, int, str], float] = {}

    def done(self, cell: Cell, seconds: float) -> None:
        self.left.remove(cell)
        self._seconds[cell[:3]] = seconds

    def __str__(self) -> str:
        usual = sum(self._seconds.values()) / len(self._seconds)
        minutes = sum(self._seconds.get(cell[:3], usual) for cell in self.left) / 60
        return f"{self.total - len(self.left)} of {self.total}, about {minutes:.0f} min left"


def _line(cell: Cell, figures: dict[str, Any], clock: _Clock) -> str:
    what = f"{cell.bandwidth:>9}  {cell.hosts} hosts  {cell.method:24}"
    if "failure" in figures:
        return f"{what} [red]failed[/red]: {figures['failure']}  [dim]{clock}[/dim]"
    step = median(map(float, figures["step_ms"].split()))
    return (
        f"{what} {step:7.0f} ms  {figures['sent_bytes'] / 1e6:8.3f} MB  codec {float(figures['codec_ms']):6.1f} ms  "
        f"exposed {float(figures['exposed_ms']):7.1f} ms  [dim]{clock}[/dim]"
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    known = "\n".join(f"  {name:20} {row.family:8} {row.about}" for name, row in METHODS.items())
    it = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description=__doc__,
        epilog=f"methods:\n{known}\n  gradients:<compressor>, updates:<compressor>: any other compressor, e.g. updates:topk:0.05",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    it.add_argument(
        "--bandwidths",
        type=_words,
        default=("100mbit", "1gbit", "10gbit", "unshaped"),
        help="speed of every link in each direction, with commas; 'unshaped': as fast as the machine is (default: all four)",
    )
    it.add_argument("--hosts", type=_words, default=("2", "4"), help="numbers of hosts (default: 2,4)")
    it.add_argument("--methods", type=_words, help="names from the list below (default: all of them)")
    it.add_argument("--repeats", type=int, default=3, help="runs of each method, taking turns (default: %(default)s)")
    it.add_argument("--steps", type=int, default=20, help="timed steps of a run, at most (default: %(default)s)")
    it.add_argument(
        "--seconds",
        type=float,
        default=6.0,
        help="a slow method times fewer steps, at least 3, so that they take about this long (default: %(default)s)",
    )
    it.add_argument(
        "--timeout", type=float, default=90.0, help="seconds after which a run has failed (default: %(default)s)"
    )
    it.add_argument(
        "--batch",
        default="auto",
        help="images of one host in a step; 'auto': that of earlier runs, else such that a step without communication takes "
        "about 100 ms (default: auto)",
    )
    it.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    it.add_argument("--width", type=int, default=WIDTH, help="of the model (default: %(default)s, 8.1 M parameters)")
    it.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the CSV files (default: benchmarks/results)",
    )
    it.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs", help="folder of page and picture")
    it.add_argument(
        "--patience",
        type=float,
        default=0.0,
        help="on a shared machine: seconds that a run waits, at most, for other programs to be idle (default: %(default)s)",
    )
    it.add_argument("--retry", action="store_true", help="make runs again that failed")
    it.add_argument("--report", action="store_true", help="measure nothing, write page and picture from the CSV files")
    time_to_accuracy.add_arguments(it)
    return it


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, then write page and picture."""
    it = parser()
    options = it.parse_args(arguments)
    console = Console(soft_wrap=True)
    file = results(options.results / "network.csv")
    accuracies = time_to_accuracy.results(options.results / "time_to_accuracy.csv")
    try:
        options.hosts = tuple(int(count) for count in options.hosts)
        options.batch = 0 if options.batch == "auto" else int(options.batch)
        for bandwidth in options.bandwidths:
            bits_per_second(bandwidth)
        for name in options.methods or ():
            method(name)
        if min(options.hosts) < 2:
            raise ValueError(f"`hosts` must be at least 2: got {min(options.hosts)}.")
    except ValueError as error:
        it.error(str(error))
    if not options.report:
        if why_not() is not None:
            it.exit(2, f"The benchmark cannot run here: {why_not()}.\n")
        torch.set_num_threads(1)  # before the processes are forked: they cannot inherit a pool of threads
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            if options.accuracy:
                time_to_accuracy.run(options, accuracies, file, console)
            else:
                run(_plan(options), file, console)
        except HostsError as error:
            it.exit(2, f"{error}\n")
        except KeyboardInterrupt:
            console.print("Stopped; the finished runs are kept, and the same command goes on.")
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)
    network_report.write(file.rows(), accuracies.rows(), options.docs, console)
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    names = (
        "bandwidths",
        "hosts",
        "repeats",
        "steps",
        "seconds",
        "timeout",
        "batch",
        "seed",
        "width",
        "retry",
        "patience",
    )
    return Plan(methods=options.methods or tuple(METHODS), **{name: getattr(options, name) for name in names})


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt  # what is open is closed: processes end, namespaces go


if __name__ == "__main__":
    sys.exit(main())
