"""The strategies that every suite of this folder about faults and files runs on: a new one in the registry is one more row."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_distopt import list_strategies
from lightning_distopt.strategies import StrategyRecord

SUFFIX = "_fork"
RECORDS: dict[str, StrategyRecord] = {
    record.name.removesuffix(SUFFIX): record for record in list_strategies() if record.name.endswith(SUFFIX)
}
ROWS = tuple(RECORDS)
ENGINES = ("compressed_ddp", "compressed_ddp_powersgd")
"""One strategy of each engine, with the most state: residuals; residuals and warm starts."""


def build(row: str, **arguments: Any) -> Any:
    """Return the strategy of a row, on forked processes, with further arguments."""
    record = RECORDS[row]
    return record.strategy(**{**record.arguments, **arguments})


def rows_and(normal: tuple[str, ...] = ENGINES) -> Any:
    """Parametrise over all rows; those that are not in ``normal`` are slow."""
    marks = [pytest.param(row, marks=() if row in normal else pytest.mark.slow) for row in ROWS]
    return pytest.mark.parametrize("row", marks)


def crossed(cases: Any, first: str = "") -> Any:
    """Parametrise over all pairs of a row and a case, named by keys.

    In ``make test`` the first engine's row has every case, the other one only ``first``; the rest is slow. Without
    ``first`` both have every case.
    """
    row_0, row_1 = ENGINES
    normal = {(row_0, name) for name in cases} | {(row_1, name) for name in cases if not first or name == first}
    marks = [
        pytest.param(row, cases[name], id=f"{row}-{name}", marks=() if (row, name) in normal else pytest.mark.slow)
        for row in ROWS
        for name in cases
    ]
    return pytest.mark.parametrize(("row", "case"), marks)
