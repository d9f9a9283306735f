"""The cost model's answers for people: a table, the crossover bandwidths, and a picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_distopt.advice.candidates import CANDIDATES, Candidate
from lightning_distopt.advice.choice import choose
from lightning_distopt.advice.cost_model import (
    CodecSpeed,
    Link,
    Prediction,
    Workload,
    crossover,
    predict,
    rank_methods,
)
from lightning_distopt.exchange.majority_vote import MOST_RANKS

__all__ = ["BASELINE", "draw", "parse_bandwidth", "parse_seconds", "print_table", "show_bandwidth"]

BASELINE = next(candidate for candidate in CANDIDATES if candidate.text == "bf16")
_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_bandwidth(text: str) -> float:
    """Return bytes a second of ``"10gbit"``, ``"100mbit"``.

    Raises:
        ValueError: naming the units.
    """
    return _parse(text, _BITS, "--bandwidth", "10gbit") / 8


def parse_seconds(text: str, argument: str = "--latency") -> float:
    """Return seconds of ``"0.5ms"``, ``"30us"``.

    Raises:
        ValueError: naming the units.
    """
    return _parse(text, _SECONDS, argument, "0.5ms")


def _parse(text: str, units: Mapping[str, float], argument: str, example: str) -> float:
    for unit in sorted(units, key=len, reverse=True):
        if text.lower().endswith(unit):
            try:
                value = float(text[: -len(unit)])
            except ValueError:
                break
            if value > 0:
                return value * units[unit]
    raise ValueError(
        f"`{argument}` must be a positive number and one of {', '.join(units)}: got {text!r}. Write {example}."
    )


def show_bandwidth(bandwidth: float) -> str:
    """Return bytes a second as bits for people: 1.25e8 -> '1 Gbit/s'."""
    if bandwidth >= 1e12:
        return "any"
    bits = 8 * bandwidth
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits / 1e3:.3g} kbit/s" if bits else "never"


def print_table(
    work: Workload,
    link: Link,
    codecs: Mapping[str, CodecSpeed],
    world: int,
    candidates: Sequence[Candidate] = CANDIDATES,
) -> None:
    """Print the ranking, with the reason and the crossover, and the choice."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    predictions = rank_methods(work, link, codecs, world, candidates)
    title = (
        f"{world} ranks, {show_bandwidth(link.bandwidth)}, {1e3 * link.latency:.3g} ms latency, "
        f"{work.numel / 1e6:.3g} M parameters, {1e3 * work.compute:.4g} ms a step without communication"
    )
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.caption = "ms a step, on the network, and in the codec; MB sent by a rank; where it is faster than bf16"
    for column in ("method", "by", "ms", "network", "codec", "MB", "pays", "spent on"):
        table.add_column(column, justify="left" if column in ("method", "by", "spent on") else "right", no_wrap=True)
    for p in predictions:
        limit = crossover(p.candidate, BASELINE, work, link, codecs, world)
        table.add_row(
            p.candidate.name,
            {"all_reduce": "reduce", "all_gather": "gather", "sharded_server": "server"}[p.exchange],
            f"{1e3 * p.seconds:.1f}",
            f"{1e3 * p.network:.1f}",
            f"{1e3 * p.codec:.1f}",
            f"{p.nbytes / 1e6:.2f}",
            "-" if p.candidate is BASELINE else _pays(limit),
            _reason(p, work),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width
    console.print(table)
    chosen = choose(predictions, next(p for p in predictions if p.candidate is BASELINE))
    arguments = chosen.candidate.arguments_with(chosen.exchange, world)
    console.print(f"The choice would be {chosen.candidate.name}: strategy={arguments}", markup=False)


def _pays(limit: float) -> str:
    """Say where a method is faster, going by its :func:`crossover`."""
    if limit < 0:
        return f"> {show_bandwidth(-limit)}"
    return show_bandwidth(limit) if not limit or limit >= 1e12 else f"< {show_bandwidth(limit)}"


def _reason(p: Prediction, work: Workload) -> str:
    """Say what the step spends its time with beyond computing."""
    if p.seconds < 1.05 * work.compute:
        return "compute"
    exposed = p.seconds - work.compute - p.codec
    return "network" if exposed > p.codec else "codec"


def draw(
    path: Path,
    work: Workload,
    link: Link,
    codecs: Mapping[str, CodecSpeed],
    world: int,
    candidates: Sequence[Candidate] = CANDIDATES,
) -> None:
    """Draw step time against bandwidth and against the number of ranks up to 4,096, with the crossovers marked.

    Args:
        path: of the PNG.
        work: the model's part of a step.
        link: its bandwidth is that of the right half; latency and overlap are those of both.
        codecs: by the candidate's name.
        world: number of ranks of the left half.
        candidates: drawn; those that may be chosen without asking with thick lines.

    Raises:
        ImportError: if matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), sharey=True)
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    bandwidths = [1.25e6 * 10 ** (i / 10) for i in range(51)]  # 10 Mbit/s to 1 Tbit/s
    ranks = [2**i for i in range(1, 13)]
    for i, candidate in enumerate(candidates):
        codec = codecs[candidate.name]
        style = {"color": colours[i % len(colours)], "linewidth": 2.0 if candidate.safe else 0.9}
        links = [replace(link, bandwidth=b) for b in bandwidths]
        if candidate.text != "signsgd" or world <= MOST_RANKS:
            line = [predict(candidate, work, there, codec, world).seconds for there in links]
            left.plot([8 * b / 1e9 for b in bandwidths], line, label=candidate.name, **style)
            limit = abs(crossover(candidate, BASELINE, work, link, codecs, world))
            if candidate is not BASELINE and bandwidths[0] < limit < bandwidths[-1]:
                left.axvline(8 * limit / 1e9, linewidth=0.7, linestyle=":", color=style["color"])
        own = [w for w in ranks if candidate.text != "signsgd" or w <= MOST_RANKS]
        right.plot(own, [predict(candidate, work, link, codec, w).seconds for w in own], **style)
    here = show_bandwidth(link.bandwidth)
    left.axvline(8 * link.bandwidth / 1e9, linewidth=0.8, color="grey")
    right.axvline(world, linewidth=0.8, color="grey")
    for axes, label in ((left, f"Gbit/s ({world} ranks; dotted: equal to bf16)"), (right, f"ranks ({here})")):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.axhline(work.compute, linewidth=0.8, color="black")
        axes.grid(visible=True, alpha=0.3)
    left.set_ylabel("seconds a step (black: no communication; thick: may be chosen by itself)")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
