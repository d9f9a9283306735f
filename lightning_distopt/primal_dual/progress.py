"""What is seen of a run while it goes on: a bar with gap and bytes, and the rows of a Lightning logger."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_distopt.primal_dual.certificate import Row

__all__ = ["log_to", "shown"]


def log_to(logger: Any, row: Row, prefix: str = "dual") -> None:
    """Write one row to a logger of Lightning (or a list of them): ``dual/gap``, ``dual/primal``, ``dual/bytes_up``, ..."""
    for one in logger if isinstance(logger, list | tuple) else [logger]:
        metrics = {f"{prefix}/{name}": float(value) for name, value in row.asdict().items() if name != "rounds"}
        one.log_metrics(metrics, step=row.rounds)


@contextmanager
def shown(verbose: bool, tol: float, what: str = "gap") -> Iterator[Callable[[Row], None]]:
    """Yield a function that shows a row: a bar whose length is the logarithm of the relative gap.

    Args:
        verbose: otherwise nothing is shown.
        tol: where the bar is full.
        what: its label.
    """
    if not verbose:
        yield lambda row: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(what, total=1.0, state="")
        first: list[float] = []

        def show(row: Row) -> None:
            relative = max(row.gap / max(1.0, abs(row.primal)), 1e-300)
            first.append(relative)
            whole = math.log(first[0] / max(tol, 1e-16))
            share = math.log(first[0] / relative) / whole if whole > 0 else 1.0
            carried = f", {(row.bytes_up + row.bytes_down) / 1e6:.2f} MB" if row.bytes_up else ""
            state = f"round {row.rounds}, gap {row.gap:.2e} ({relative:.1e} of the objective){carried}"
            progress.update(task, completed=min(1.0, max(0.0, share)), state=state)

        yield show
