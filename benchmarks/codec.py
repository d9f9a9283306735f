"""How fast compressors encode and decode, as multiples of a copy measured in the same run.

    python -m benchmarks.codec                       # 25 M float32 elements, one thread, every compressor
    python -m benchmarks.codec --device cuda
    python -m benchmarks.codec --names sign,topk:0.01 --reference

One round measures, for each compressor in turn, ``Tensor.copy_`` into a preallocated tensor, then ``compress_`` (encode and
leave the residual), then ``decompress_add_``; the table shows medians over rounds of the ratios to the copy of the same
round, and their quartiles. ``add`` is what it costs to add the residual to a gradient first, where that is not fused.

The title gives the bandwidth of the copy: 8 bytes an element, read and written. The shares compare with it the bytes that
encoding cannot do without (read the values, leave the residual, write the payload) and decoding (read the payload, read and
write what it names), each over its median time. On a GPU, times lie between two events on its stream: gaps in which it waits
for the next launch count, for the copy and for the rest alike.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles

import torch

from lightning_distopt.advice.measure import timed
from lightning_distopt.compressors import Compressor, parse
from lightning_distopt.compressors.kernels import kernels_of, reference_only

__all__ = ["main", "measure"]

RESULTS = Path(__file__).parent / "results" / "codec.csv"
# compressor: (encode with residual, decode and accumulate), at most, in copies
TARGETS: dict[str, tuple[float, float]] = {
    "sign": (3.0, 1.5),
    "bingrad_b": (6.0, 1.5),
    "bingrad_pb": (6.0, 1.5),
    "orq:5": (15.0, 2.5),
    "qsgd:5": (6.0, 2.0),
    "terngrad": (6.0, 2.0),
    "topk:0.01": (6.0, 0.25),
}
# On a GPU: of the bandwidth of a copy, at least, to encode with residual.
SHARES = dict.fromkeys(("sign", "bingrad_b", "bingrad_pb", "qsgd:5"), 0.5)
NAMES = (*TARGETS, "orq:3", "orq:9", "qsgd:9", "linear:5", "onebit", "random_block:0.01", "bf16", "fp16")


def measure(name: str, numel: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return seconds by round of "copy", "add", "encode" and "decode"."""
    compressor = parse(name)
    assert isinstance(compressor, Compressor)
    source = torch.randn(numel, device=device) * 1e-3
    target, buffer = torch.empty_like(source), torch.empty_like(source)
    seconds: dict[str, list[float]] = {"copy": [], "add": [], "encode": [], "decode": []}
    for number in range(rounds + 1):
        buffer.copy_(source)
        found = []
        took = {
            "copy": _timed(lambda: target.copy_(source), device),
            "add": _timed(lambda: target.add_(source), device),
            "encode": _timed(lambda: found.append(compressor.compress_(buffer, 1, assume_finite=True)), device),  # noqa: B023
        }
        payload = found[0]
        took["decode"] = _timed(lambda: compressor.decompress_add_(payload, target, 0.5), device)  # noqa: B023
        if number:  # the first one compiles and warms up
            for what, value in took.items():
                seconds[what].append(value)
    return seconds


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``run`` takes; on a GPU without the start of the first kernel and the wait for the last."""
    if device.type != "cuda":
        return timed(run, device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def necessary_bytes(name: str, numel: int) -> tuple[int, int]:
    """Return the bytes that must be read and written at least: to encode with residual, to decode and add."""
    compressor = parse(name)
    assert isinstance(compressor, Compressor)
    payload = compressor.nbytes(numel)
    named = next((field.numel for field in compressor.layout(numel, torch.float32) if field.name == "values"), numel)
    looked_at = named if compressor.shared_randomness else numel
    return 4 * looked_at + 4 * named + payload, 8 * named + payload


def main(args: Sequence[str] | None = None) -> int:
    """Measure, print the table, append the rows to ``benchmarks/results/codec.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default=",".join(NAMES), help="compressors, separated by commas")
    parser.add_argument("--numel", type=float, default=25e6, help="elements (default 25e6)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--reference", action="store_true", help="measure the plain code instead of the kernels")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="append rows here")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    device, numel = torch.device(options.device), int(options.numel)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)

    from rich.console import Console
    from rich.table import Table

    console = Console()
    with reference_only() if options.reference else nullcontext():
        library = kernels_of(device)
        table = Table()
        for column in (
            "compressor",
            "GB/s",
            "encode",
            "(quartiles)",
            "target",
            "share",
            "decode",
            "(quartiles)",
            "target",
            "share",
            "add",
        ):
            table.add_column(column, justify="left" if column == "compressor" else "right")
        rows, copies = [], []
        for name in options.names.split(","):
            with console.status(f"measuring {name}"):
                seconds = measure(name, numel, options.rounds, device)
            ratios = {
                what: [value / copy for value, copy in zip(values, seconds["copy"], strict=True)]
                for what, values in seconds.items()
            }
            copies += seconds["copy"]
            encode, decode = (None, None) if on_gpu else TARGETS.get(name, (None, None))  # those are of one CPU thread
            shares = [
                nbytes / median(seconds[what]) / (8 * numel / median(seconds["copy"]))
                for what, nbytes in zip(("encode", "decode"), necessary_bytes(name, numel), strict=True)
            ]
            least = SHARES.get(name) if on_gpu else None
            verdict = "" if least is None else f" ≥ {least:.0%} {'yes' if shares[0] >= least else 'NO'}"
            gigabytes = 4 * numel / median(seconds["encode"]) / 1e9
            table.add_row(
                name,
                f"{gigabytes:.2f}",
                *_shown(ratios["encode"], encode),
                f"{shares[0]:.0%}{verdict}",
                *_shown(ratios["decode"], decode),
                f"{shares[1]:.0%}",
                f"{median(ratios['add']):.2f}",
            )
            rows.append([_machine(device), torch.__version__, library, numel, options.rounds, name, f"{gigabytes:.3f}"])
            rows[-1] += [f"{q:.3f}" for what in ("encode", "decode", "add") for q in _quartiles(ratios[what])]
    bandwidth = 8 * numel / median(copies) / 1e9
    table.title = (
        f"{numel / 1e6:g} M float32 on {device}, kernels: {library}; in copies of a round, at {bandwidth:.1f} GB/s"
    )
    console.print(table)
    _append(options.csv, rows)
    return 0


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _shown(values: list[float], target: float | None) -> tuple[str, str, str]:
    low, middle, high = _quartiles(values)
    verdict = "" if target is None else f"≤ {target:g} {'yes' if middle <= target else 'NO'}"
    return f"{middle:.2f}", f"{low:.2f} – {high:.2f}", verdict


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, 1 thread"


_COLUMNS = ["machine", "torch", "kernels", "numel", "rounds", "compressor", "encode GB/s"]
_COLUMNS += [f"{what} {q}" for what in ("encode", "decode", "add") for q in ("25 %", "median", "75 %")]


def _append(path: Path, rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(main())
