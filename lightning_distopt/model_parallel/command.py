"""``distopt timeline``: what a plan does in which tick, with which weights, at which cost; as text and as a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_distopt.model_parallel.staleness import PRESETS, StalenessPlan
from lightning_distopt.model_parallel.timeline import bubble_fraction, period, play

__all__ = ["Times", "describe", "picture", "run"]


def run(args: Sequence[str]) -> int:
    """Print the timeline of a plan and write its picture."""
    parser = argparse.ArgumentParser(prog="distopt timeline", description=__doc__)
    parser.add_argument("--plan", default="dsp", help=f"{', '.join(PRESETS)}, or dsp(p;m) as in 'dsp(2,2,0;6,3,0)'")
    parser.add_argument("--stages", type=int, help="number of stages; not needed with dsp(p;m)")
    parser.add_argument("--forward-delays", type=_numbers, help="ticks of each hop's activations, as in 1,1")
    parser.add_argument("--gradient-delays", type=_numbers, help="ticks of each hop's gradients, as in 1,1")
    parser.add_argument("--timetable", choices=["free", "barrier"], help="instead of the plan's")
    parser.add_argument("--ticks", type=int, default=10, help="rows of the table (default: 10)")
    parser.add_argument("--forward", type=float, default=1.0, help="time of one stage's forward (default: 1)")
    parser.add_argument("--lengths", type=_lengths, help="instead of --forward: of each stage's forward, as in 3,6,3")
    parser.add_argument("--backward", type=float, default=2.0, help="time of its backward, without recomputation (2)")
    parser.add_argument("--latency", type=float, default=0.0, help="time of one hop (default: 0)")
    parser.add_argument("--png", type=Path, default=Path("timeline.png"), help="where the picture goes")
    given = parser.parse_args(args)
    try:
        stages = given.stages if given.stages or "(" in given.plan else 3
        options = {"timetable": given.timetable} if given.timetable else {}
        plan = StalenessPlan.preset(
            given.plan, stages, forward_delays=given.forward_delays, gradient_delays=given.gradient_delays, **options
        )
        times = Times.of(plan, given.forward, given.backward, given.lengths)
    except ValueError as error:
        print(f"distopt timeline: {error}", file=sys.stderr)
        return 2
    print(describe(plan, given.ticks, times, given.latency))
    try:
        picture(plan, given.png, given.ticks, times, given.latency)
    except ImportError:
        print("\nNo picture: matplotlib is not installed (pip install -e '.[recipes]').")
    else:
        print(f"\nPicture: {given.png}")
    return 0


class Times(NamedTuple):
    """How long the stages' work takes.

    Attributes:
        shown: in words.
        forward: of each stage.
        backward: of each stage, a second forward included where there is one.
        whole: of forward and backward of all layers, nothing run twice.
    """

    shown: str
    forward: list[float]
    backward: list[float]
    whole: float

    @classmethod
    def of(
        cls,
        plan: StalenessPlan,
        forward: float = 1.0,
        backward: float = 2.0,
        lengths: Sequence[float] | None = None,
    ) -> Times:
        """Return the times of stages of equal or given lengths.

        Args:
            plan: says whether layers run twice.
            forward: of one stage.
            backward: of one stage, or in forwards where ``lengths`` are given.
            lengths: of each stage's forward. Then the last stage runs once, as in truth; of equal stages it is as long as the
                others.

        Raises:
            ValueError: if there are not as many as stages, or one is not above 0.
        """
        K, again = plan.stages, plan.keep == "input" and plan.stages > 1
        if lengths is None:
            shown = f"forward {forward:g}, backward {backward:g}"
            return cls(shown, [forward] * K, [backward + forward * again] * K, K * (forward + backward))
        if len(lengths) != K or min(lengths) <= 0:
            raise ValueError(
                f"`lengths` must be one a stage, above 0: got {list(lengths)} for {K} stages. Give as many."
            )
        longer = [length * (backward + (again and k < K - 1)) for k, length in enumerate(lengths)]
        shown = f"forwards {', '.join(f'{length:g}' for length in lengths)}, backwards {backward:g} x"
        return cls(shown, list(lengths), longer, sum(lengths) * (1.0 + backward))


def describe(plan: StalenessPlan, ticks: int, times: Times | None = None, latency: float = 0.0) -> str:
    """Return the table of a plan and what it costs, in words and numbers."""
    times = times or Times.of(plan)
    batch = 4 * max(plan.staleness) + 4
    lines = [str(plan), "", plan.table(ticks), ""]
    lines.append("stage  worker  staleness  first update  stored inputs  weight versions  forward of b reads")
    for k in range(plan.stages):
        late = batch - plan.forward_version(k, batch) * plan.accumulate
        version = f"w{k}[b - {late}]" if late else f"w{k}[b]"
        if plan.accumulate > 1:
            version += f" / {plan.accumulate}"
        cells = (k, plan.placement[k], plan.staleness[k], f"tick {plan.first_update(k)}", plan.stored_inputs(k))
        row = f"{cells[0]:>5}  {cells[1]:>6}  {cells[2]:>9}  {cells[3]:>12}  {cells[4]:>13}  {plan.weight_versions(k):>15}"
        lines.append(f"{row}  {version}")
    time = period(plan, times.forward, times.backward, latency)
    naive = times.whole + 2 * latency * (plan.stages - 1)
    paid = ", recomputation paid" if plan.keep == "input" and plan.stages > 1 else ""
    without = times.whole / period(plan, times.forward, times.backward)
    lines += [
        "",
        f"time a batch: {time:.3g} ({times.shown}{paid}, latency {latency:g}; {plan.timetable} timetable)",
        f"at most {naive / time:.2f} x naive model parallelism on as many devices"
        + (f" ({without:.2f} without latency)" if latency else ""),
        f"idle in a drained run of 100 batches: {100 * bubble_fraction(plan, 100, times.forward, times.backward):.1f} %",
    ]
    return "\n".join(lines)


def picture(
    plan: StalenessPlan, path: Path, batches: int = 8, times: Times | None = None, latency: float = 0.0
) -> None:
    """Draw who works when: one row a worker, one colour a batch, backwards hatched.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    times = times or Times.of(plan)
    spans = play(plan, batches, times.forward, times.backward, latency)
    figure = Figure(
        figsize=(max(6.0, 0.28 * max(s.end for s in spans)), 0.8 + 0.5 * plan.workers), layout="constrained"
    )
    axes = figure.subplots()
    colours = colormaps["tab10"]
    for span in spans:
        row, width = plan.placement[span.stage], span.end - span.start
        hatch = "///" if span.kind == "B" else None
        axes.barh(
            row, width, left=span.start, color=colours(span.batch % 10), hatch=hatch, edgecolor="white", height=0.8
        )
        axes.text(span.start + width / 2, row, f"{span.kind}{span.batch}", ha="center", va="center", fontsize=7)
    axes.set_yticks(range(plan.workers), [f"w{worker}" for worker in range(plan.workers)])
    axes.invert_yaxis()
    axes.set_xlabel("time")
    axes.set_title(f"{plan}, {plan.timetable} timetable")
    figure.savefig(path, dpi=120)


def _lengths(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]
