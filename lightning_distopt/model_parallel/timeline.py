"""When every stage does what: a plan played with given durations, its period, its ceiling and its idle time.

One worker runs its list ``F(t - P_k), B(t - P_k - m_k), U`` in order (``StalenessPlan.work``); an activation or a gradient
arrives ``latency`` after it is sent. In steady state, with equal stages (``f`` forward, ``g`` backward, recomputation included,
``c`` latency a hop):

    timetable "free":     T = max over k <= j of  [ (j - k + 1)(f + g) + 2 c (j - k) ] / (m_k - m_j + 1)
    timetable "barrier":  T = K f + g                                        (p = 0, q = 1, c = 0)

With several stages a worker, all of a worker's tick ends before its next one begins, since they update together. Ouroboros, K
stages of different lengths on K - 1 workers:

    T = max( max(f_0 + g_0, f_0 + ... + f_{K-2}) + f_{K-1} + g_{K-1},  f_k + g_k for 0 < k < K - 1 )        (free, c = 0)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_distopt.model_parallel.staleness import StalenessPlan

__all__ = ["Span", "bubble_fraction", "ceiling", "flush_ceiling", "period", "play", "slots"]


class Span(NamedTuple):
    """One piece of work: stage, "F" or "B", batch, and when it starts and ends."""

    stage: int
    kind: str
    batch: int
    start: float
    end: float


def play(
    plan: StalenessPlan,
    batches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    latency: float = 0.0,
    delays: Mapping[tuple[int, str, int], float] | None = None,
) -> list[Span]:
    """Return every piece of work of a drained run, tick by tick.

    Args:
        plan: who does what in which tick.
        batches: batches of the run.
        forward: duration of one stage's forward, any unit; or of each stage's.
        backward: duration of one stage's backward, recomputation included; or of each stage's.
        latency: of one hop, each way.
        delays: extra duration of single pieces, keyed by (stage, "F" or "B", batch).
    """
    extra, last = delays or {}, plan.stages - 1
    lengths = {kind: _each(plan, length) for kind, length in (("F", forward), ("B", backward))}
    ends: dict[tuple[int, str, int], float] = {}
    free = [0.0] * plan.workers
    spans: list[Span] = []

    def needs(kind: str, stage: int, batch: int) -> tuple[int, str, int] | None:
        if kind == "F":
            return (stage - 1, "F", batch) if stage else None
        return (stage + 1, "B", batch) if stage < last else (stage, "F", batch)

    for tick in range(plan.ticks(batches)):
        lists = [deque(plan.work(worker)) for worker in range(plan.workers)]
        while any(lists):
            for worker, todo in enumerate(lists):  # as far as each can go on what the others have sent
                while todo:
                    kind, stage = todo[0]
                    batch = (plan.forward_batch if kind == "F" else plan.backward_batch)(stage, tick)
                    if 0 <= batch < batches:
                        before = needs(kind, stage, batch)
                        if before is not None and before not in ends:
                            break
                        hop = latency if before is not None and before[0] != stage else 0.0
                        start = max(free[worker], 0.0 if before is None else ends[before] + hop)
                        end = start + lengths[kind][stage] + extra.get((stage, kind, batch), 0.0)
                        free[worker] = ends[stage, kind, batch] = end
                        spans.append(Span(stage, kind, batch, start, end))
                    todo.popleft()
        if plan.timetable == "barrier":
            free = [max(free)] * plan.workers
    return spans


def period(
    plan: StalenessPlan,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    latency: float = 0.0,
    batches: int = 120,
) -> float:
    """Return the steady time a batch, measured on a played run."""
    first, second = (
        max(span.end for span in play(plan, n, forward, backward, latency)) for n in (batches, 2 * batches)
    )
    return (second - first) / batches


def ceiling(
    plan: StalenessPlan,
    backward_over_forward: float = 2.0,
    latency: float = 0.0,
    lengths: Sequence[float] | None = None,
) -> float:
    """Return the greatest speed-up over naive model parallelism on as many stages, recomputation paid where the plan does.

    The last stage recomputes nothing in truth; equal stages are assumed to be bound by one that does.

    Args:
        plan: the plan.
        backward_over_forward: duration of a backward without recomputation, in forwards.
        latency: of a hop, in forwards of one stage.
        lengths: of each stage's forward, any unit; then the last stage recomputes nothing here either.
    """
    if lengths is not None:
        again = [backward_over_forward + (plan.keep == "input" and k < plan.stages - 1) for k in range(plan.stages)]
        whole = sum(lengths) * (1.0 + backward_over_forward) + 2.0 * latency * (plan.stages - 1)
        return whole / period(plan, lengths, [f * a for f, a in zip(lengths, again, strict=True)], latency)
    backward = backward_over_forward + (1.0 if plan.keep == "input" and plan.stages > 1 else 0.0)
    stages = plan.stages
    naive = stages * (1.0 + backward_over_forward) + 2.0 * latency * (stages - 1)
    return naive / period(plan, 1.0, backward, latency)


def flush_ceiling(stages: int, microbatches: int) -> float:
    """Return the greatest speed-up of GPipe and 1F1B over naive model parallelism: ``K M / (M + K - 1)``."""
    return stages * microbatches / (microbatches + stages - 1)


def bubble_fraction(
    plan: StalenessPlan,
    batches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
) -> float:
    """Return the share of all workers' time in which they do nothing, fill and drain included, in [0, 1)."""
    spans = play(plan, batches, forward, backward)
    if not spans:
        return 0.0
    busy = sum(span.end - span.start for span in spans)
    return 1.0 - busy / (plan.workers * max(span.end for span in spans))


def slots(plan: StalenessPlan, batches: int, width: int) -> str:
    """Draw the first slots of a run in which F and B take one slot each, one row a worker."""
    return draw(play(plan, batches, 1.0, 1.0), plan.placement, width)


def draw(spans: Sequence[Span], placement: Sequence[int], width: int) -> str:
    """Draw work of one slot each: ``F<batch>``, ``B<batch>``, ``.`` for nothing."""
    rows = [["."] * width for _ in range(max(placement) + 1)]
    for span in spans:
        if span.start < width:
            rows[placement[span.stage]][int(span.start)] = f"{span.kind}{span.batch}"
    return "\n".join(
        f"w{worker} | " + " ".join(cell.ljust(2) for cell in row).rstrip() for worker, row in enumerate(rows)
    )


def _each(plan: StalenessPlan, length: float | Sequence[float]) -> Sequence[float]:
    return length if isinstance(length, Sequence) else [length] * plan.stages
