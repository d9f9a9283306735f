"""What a worker did when, as a file that Perfetto and Chrome's tracing page show, and its idle time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Trace", "chrome_trace"]


class Trace:
    """The pieces of work of one process: (kind, stage, batch, start, end), seconds of one machine's monotonic clock."""

    def __init__(self) -> None:
        self.work: list[tuple[str, int, int, float, float]] = []

    def add(self, kind: str, stage: int, batch: int, start: float, end: float) -> None:
        """Note one piece."""
        self.work.append((kind, stage, batch, start, end))

    def idle_fraction(self) -> float:
        """Return the share of the time between first and last piece in which nothing was done; 0 for none."""
        return _idle(self.work)

    def save(self, path: str | Path, worker: int = 0) -> None:
        """Write this worker's part as a Chrome trace."""
        Path(path).write_text(json.dumps(chrome_trace([(worker, self.work)])))


def chrome_trace(parts: Iterable[tuple[int, Iterable[tuple[str, int, int, float, float]]]]) -> dict[str, Any]:
    """Return the trace events of several workers; times are microseconds from the first event.

    Args:
        parts: (worker, its pieces of work).
    """
    listed = [(worker, list(work)) for worker, work in parts]
    begin = min((w[3] for _, work in listed for w in work), default=0.0)
    events: list[dict[str, Any]] = []
    for worker, work in listed:
        shown = f"worker {worker}, idle {100 * _idle(work):.1f} %"
        events.append({"name": "process_name", "ph": "M", "pid": worker, "args": {"name": shown}})
        for kind, stage, batch, start, end in work:
            events.append(
                {
                    "name": f"{kind}{batch}",
                    "cat": "forward" if kind == "F" else "backward",
                    "ph": "X",
                    "pid": worker,
                    "tid": stage,
                    "ts": (start - begin) * 1e6,
                    "dur": (end - start) * 1e6,
                    "args": {"stage": stage, "batch": batch},
                }
            )
    idle = {f"worker {worker}": round(_idle(work), 4) for worker, work in listed}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"idle_fraction": idle}}


def _idle(work: Sequence[tuple[str, int, int, float, float]]) -> float:
    if not work:
        return 0.0
    span = max(w[4] for w in work) - min(w[3] for w in work)
    return max(0.0, 1.0 - sum(w[4] - w[3] for w in work) / span) if span > 0 else 0.0
