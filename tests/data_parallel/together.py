"""Many small cases in one start of processes: starting them costs more than most cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.ranks import run_ranks

_results: dict[tuple[int, Callable[..., Any]], list[list[Any]]] = {}


def together(world: int, fn: Callable[..., Any], cases: Sequence[tuple[Any, ...]], case: tuple[Any, ...]) -> list[Any]:
    """Return by rank what ``fn(rank, world, *case)`` returned; all cases run the first time that one is asked for.

    Args:
        world: number of ranks.
        fn: has one table of cases.
        cases: that table.
        case: one of them.
    """
    if (world, fn) not in _results:
        _results[world, fn] = run_ranks(world, _each, fn, cases, timeout=55)
    return [ranks[cases.index(case)] for ranks in _results[world, fn]]


def _each(rank: int, world: int, fn: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    results = []
    for case in cases:
        try:
            results.append(fn(rank, world, *case))
        except Exception as error:
            raise RuntimeError(f"in case {case}") from error
    return results
