"""What `benchmarks.network` measured, as a picture and as the tables of `docs/performance.md`.

The tables are written between two markers of the page; the prose around them stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from rich.console import Console

from benchmarks.hosts import bits_per_second
from benchmarks.methods import METHODS, method

__all__ = ["Cell", "cells", "write"]

BEGIN, END = "<!-- written by benchmarks.network: begin -->", "<!-- written by benchmarks.network: end -->"
UNSHAPED_AT = 4e10  # where the picture puts links without a limit, bit/s
SPREAD_MS, DISTURBED_MS = (
    10.0,
    25.0,
)  # waits for a core, a step: within a cell's repeats; of all, a host's own threads cause less
_LIMIT, _BASELINE, _RIVAL = "none", "bf16", "ddp-powersgd:1"

Row = dict[str, str]


class Cell(NamedTuple):
    """All repeats of one method on one network.

    Args:
        bandwidth: as a text.
        bits: the same as a number a second; of unshaped links, where the picture puts them.
        hosts: number of them.
        method: name.
        steps: milliseconds of every timed step of all repeats.
        sent: bytes a host and step, median of the repeats, as the next four.
        codec: milliseconds a step of encoding and decoding; 0 for foreign methods, which do not say.
        exposed: milliseconds a step of waiting for the network; the same.
        cpu: milliseconds a step of processor time of all threads of a host.
        delayed: milliseconds a step in which the training thread waited for a core.
        repeats: runs behind these figures.
        failure: why a run failed, empty if none did.
    """

    bandwidth: str
    bits: float
    hosts: int
    method: str
    steps: list[float]
    sent: float
    codec: float
    exposed: float
    cpu: float
    delayed: float
    repeats: int
    failure: str

    @property
    def median(self) -> float:
        """Of the steps; infinite if there are none."""
        return median(self.steps) if self.steps else float("inf")

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the steps: a quarter of them is shorter, a quarter longer."""
        low, _, high = quantiles(self.steps, n=4, method="inclusive") if len(self.steps) > 1 else self.steps * 3
        return low, high

    @property
    def disturbed(self) -> bool:
        """Whether other programs took the cores away even from the calmest run."""
        return self.delayed > DISTURBED_MS


def cells(rows: Sequence[Row]) -> list[Cell]:
    """Gather the repeats of the latest batch and width, in order of hosts, bandwidth and the table of methods."""
    rows = [row for row in rows if (row["batch"], row["width"]) == (rows[-1]["batch"], rows[-1]["width"])]
    places = {name: place for place, name in enumerate(METHODS)}
    groups: dict[tuple[int, float, int, str, str], list[Row]] = {}
    for row in rows:
        bits = bits_per_second(row["bandwidth"]) or UNSHAPED_AT
        place = places.get(row["method"], len(places))
        groups.setdefault((int(row["hosts"]), bits, place, row["method"], row["bandwidth"]), []).append(row)
    return [
        _cell(hosts, bits, name, bandwidth, group)
        for (hosts, bits, _, name, bandwidth), group in sorted(groups.items())
    ]


def _cell(hosts: int, bits: float, name: str, bandwidth: str, rows: Sequence[Row]) -> Cell:
    good = calm([row for row in rows if not row["failure"]])
    steps = [float(step) for row in good for step in row["step_ms"].split()]
    columns = ("sent_bytes", "codec_ms", "exposed_ms", "cpu_ms", "delayed_ms")
    figures = [median(float(row[column]) for row in good) if good else float("nan") for column in columns]
    failure = next((row["failure"] for row in rows if row["failure"]), "")
    return Cell(bandwidth, bits, hosts, name, steps, *figures, len(good), failure)


def calm(rows: Sequence[Row]) -> list[Row]:
    """Leave out repeats in which a step waited for a core over 10 ms longer than in the calmest one."""
    calmest = min((float(row["delayed_ms"]) for row in rows), default=0.0)
    return [row for row in rows if float(row["delayed_ms"]) <= calmest + SPREAD_MS]


def write(rows: Sequence[Row], accuracies: Sequence[Row], docs: Path, console: Console) -> None:
    """Write picture and page; say so, or that there is nothing to show."""
    if not rows and not accuracies:
        console.print("Nothing has been measured yet.")
        return
    parts = []
    if rows:
        found = cells(rows)
        draw(found, docs / "network.png")
        parts += [_conditions(rows), "![Step time against bandwidth](network.png)", *_tables(found), *_verdicts(found)]
    if accuracies:
        parts += _accuracy_tables(accuracies)
    page = docs / "performance.md"
    before = page.read_text() if page.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    head, _, rest = before.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{tail}")
    console.print(f"Written: {page}" + (f" and {docs / 'network.png'}" if rows else ""))


# ---- tables ----------------------------------------------------------------------------------------------------------


def _conditions(rows: Sequence[Row]) -> str:
    last = rows[-1]
    found = cells(rows)
    used, disturbed = sum(cell.repeats for cell in found), any(cell.disturbed for cell in found)
    calmness = (
        f"{used} of {len(rows)} runs count: without repeats in which a step waited for a core {SPREAD_MS:.0f} ms longer than in "
        "the calmest one."
    )
    if disturbed:
        calmness += (
            f" **~ marks figures that other programs disturbed in every repeat** (a step waited over {DISTURBED_MS:.0f} ms for "
            "a core): they are too high, and compare only roughly."
        )
    return (
        f"One machine for all hosts ({last['machine']}), one thread a host; {last['versions']}. ResNet-20 of width "
        f"{last['width']} ({int(last['parameters']) / 1e6:.1f} M parameters), batch {last['batch']} a host, seed "
        f"{last['seed']}. More hosts than cores share the cores. {calmness}"
    )


def _tables(found: Sequence[Cell]) -> list[str]:
    parts = []
    for hosts in sorted({cell.hosts for cell in found}):
        mine = [cell for cell in found if cell.hosts == hosts]
        links = list(dict.fromkeys(cell.bandwidth for cell in mine))
        names = list(dict.fromkeys(cell.method for cell in sorted(mine, key=lambda cell: _place(cell.method))))
        at = {(cell.method, cell.bandwidth): cell for cell in mine}
        parts.append(f"### {hosts} hosts")
        lines = [[f"`{name}`", *(_step(at.get((name, link))) for link in links)] for name in names]
        parts.append(
            "Milliseconds of a step: median (quartiles) of all steps of all calm repeats.\n\n"
            + _table(["method", *links], lines)
        )
        parts.append(
            "What a step costs, a host: bytes that its interface sends, and milliseconds: processor time of all threads; waiting "
            "for a core; encoding and decoding; then, for each bandwidth, waiting for the network that nothing hides (foreign "
            "methods: step less that without communication).\n\n" + _costs(names, links, at)
        )
    return parts


def _costs(names: Sequence[str], links: Sequence[str], at: dict[tuple[str, str], Cell]) -> str:
    lines = []
    for name in names:
        mine = [at[name, link] for link in links if (name, link) in at and at[name, link].steps]
        if not mine:
            continue
        timed = _is_timed(name)
        exposed = []
        for link in links:
            cell, limit = at.get((name, link)), at.get((_LIMIT, link))
            if cell is None or not cell.steps or (not timed and (limit is None or not limit.steps)):
                exposed.append("")
            else:
                exposed.append(f"{cell.exposed if timed or limit is None else cell.median - limit.median:,.0f}")
        sent, cpu, delayed, codec = map(median, zip(*((c.sent, c.cpu, c.delayed, c.codec) for c in mine), strict=True))
        lines.append(
            [
                f"`{name}`",
                f"{sent / 1e6:,.3f} MB",
                f"{cpu:,.0f}",
                f"{delayed:,.0f}",
                f"{codec:,.0f}" if timed else "",
                *exposed,
            ]
        )
    return _table(["method", "sent", "processor", "no core", "codec", *(f"exposed, {link}" for link in links)], lines)


def _is_timed(name: str) -> bool:
    """Whether our meter times the method."""
    return method(name).family in ("16 bit", "ours")


def _verdicts(found: Sequence[Cell]) -> list[str]:
    """Say for each network what won, and which of our methods cost more than they saved."""
    lines = []
    for hosts, link in dict.fromkeys((cell.hosts, cell.bandwidth) for cell in found):
        here = [cell for cell in found if (cell.hosts, cell.bandwidth) == (hosts, link) and cell.steps]
        mine = {cell.method: cell for cell in here if not cell.disturbed}
        ours = [cell for cell in mine.values() if method(cell.method).family == "ours"]
        if not ours or _BASELINE not in mine:
            lines.append(f"- **{link}, {hosts} hosts**: no verdict, too few runs were undisturbed.")
            continue
        best, base = min(ours, key=lambda cell: cell.median), mine[_BASELINE]
        losers = sorted((c for c in ours if c.median > base.median), key=lambda c: c.median)
        against = [
            f"{best.median / mine[name].median:.2f} of `{name}`" for name in (_LIMIT, _BASELINE, _RIVAL) if name in mine
        ]
        text = f"- **{link}, {hosts} hosts**: fastest of ours `{best.method}`, {best.median:,.0f} ms: {', '.join(against)}. "
        if losers:
            text += "Slower than the 16-bit all-reduce: " + ", ".join(
                f"`{cell.method}` ({cell.median / base.median:.2f}x)" for cell in losers
            )
            text += "."
        else:
            text += "All others of ours that were not disturbed are faster than the 16-bit all-reduce."
        lines.append(text)
    failed = [f"- `{c.method}`, {c.bandwidth}, {c.hosts} hosts: {c.failure}" for c in found if c.failure]
    parts = ["### Where compression pays, and where it loses\n\n" + "\n".join(lines)] if lines else []
    return parts + (["### Failed\n\n" + "\n".join(failed)] if failed else [])


def _accuracy_tables(rows: Sequence[Row]) -> list[str]:
    """Return, per data set, the seconds until accuracies that most methods reach."""
    parts = ["### Time to accuracy"]
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data and not row["failure"]]
        if not mine:
            continue
        best: dict[str, str] = {}
        for name in dict.fromkeys(row["method"] for row in mine):
            best[name] = max((row for row in mine if row["method"] == name), key=lambda row: float(row["accuracy"]))[
                "lr"
            ]
        chosen = [row for row in mine if row["lr"] == best[row["method"]]]
        peaks = sorted(max(a for _, a in _curve(row)) for row in chosen)
        target = int(100 * peaks[len(peaks) // 4]) / 100  # three quarters of the runs get there
        links = [link for link in dict.fromkeys(row["bandwidth"] for row in chosen) if bits_per_second(link)]
        lines = []
        for name in sorted(best, key=_place):
            runs = [row for row in chosen if row["method"] == name]
            final = [float(row["accuracy"]) for row in runs]
            line = [f"`{name}`", best[name], f"{min(final):.1%} to {max(final):.1%}"]
            for link in links:
                times = [_reached(row, target) for row in runs if row["bandwidth"] == link]
                line.append(", ".join("never" if t is None else f"{t:.0f} s" for t in times))
            lines.append(line)
        last = mine[-1]
        parts.append(
            f"{data}: seconds of training until {target:.0%} accuracy (the three best quarters of the runs reach it), two "
            f"hosts, {last['epochs']} epochs, seeds {', '.join(sorted({row['seed'] for row in chosen}))}; {last['machine']}; "
            f"{last['versions']}.\n\n" + _table(["method", "best rate", "accuracy at the end", *links], lines)
        )
    return parts


def _curve(row: Row) -> list[tuple[float, float]]:
    pairs = (point.split(":") for point in row["curve"].split())
    return [(float(seconds), float(accuracy)) for seconds, accuracy in pairs]


def _reached(row: Row, target: float) -> float | None:
    return next((seconds for seconds, accuracy in _curve(row) if accuracy >= target), None)


def _step(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if not cell.steps:
        return "failed"
    low, high = cell.quartiles
    return f"{'~' if cell.disturbed else ''}{cell.median:,.0f} ({low:,.0f} to {high:,.0f})"


def _place(name: str) -> int:
    return list(METHODS).index(name) if name in METHODS else len(METHODS)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


# ---- picture ---------------------------------------------------------------------------------------------------------

_STYLES = {"limit": ("#222222", ":"), "PyTorch": (None, "--"), "16 bit": (None, "-."), "ours": (None, "-")}
_COLOURS = (
    "#d1495b", "#00798c", "#edae49", "#5b8e7d", "#8a5082", "#bc4b51", "#1d3557", "#6a994e", "#f28482", "#457b9d", "#9c6644",
    "#7b2cbf", "#2a9d8f", "#e76f51", "#adb5bd", "#495057", "#b5838d", "#80b918", "#0077b6", "#6d6875",
)  # fmt: skip


def draw(found: Sequence[Cell], path: Path) -> None:
    """Write the picture: step time against bandwidth, one line a method, one panel a number of hosts."""
    from matplotlib.figure import Figure  # no pyplot: a Figure of its own needs neither a display nor a backend

    counts = sorted({cell.hosts for cell in found})
    names = sorted({cell.method for cell in found}, key=_place)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(5.2 * len(counts) + 2.6, 5.6), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, hosts in zip(panels, counts, strict=True):
        for name in names:
            mine = sorted((c for c in found if (c.hosts, c.method) == (hosts, name) and c.steps), key=lambda c: c.bits)
            if not mine:
                continue
            colour, dashes = _STYLES[method(name).family]
            middle = [cell.median for cell in mine]
            low = [cell.median - cell.quartiles[0] for cell in mine]
            high = [cell.quartiles[1] - cell.median for cell in mine]
            axes.errorbar(
                [cell.bits for cell in mine], middle, yerr=(low, high), label=name, color=colour or colours[name],
                linestyle=dashes, marker="o", markersize=3.5, linewidth=1.6, elinewidth=0.8, capsize=2,
            )  # fmt: skip
        links = {cell.bits: cell.bandwidth for cell in found if cell.hosts == hosts}
        axes.set(xscale="log", yscale="log", xlabel="link, each direction", title=f"{hosts} hosts")
        axes.set_xticks(list(links), list(links.values()))
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(True, which="both", axis="y", color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("milliseconds of a step (median, quartiles)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
