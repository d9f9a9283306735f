"""The strategies that every suite of this folder about faults and files runs on: a new one in the registry is one more row.

=============  ==========================================  ====================================================
kind           strategies                                  model
=============  ==========================================  ====================================================
replicas       ``compressed_ddp*``, local updates          ``Net``: each rank has data of its own
synchronous    ``pipeline*``                               ``Layered``: the same in eight layers; rank 0 reads
stale          ``dsp``, ``ouroboros``, ``ddg``, ...        ``Layered``
queries        ``zo_ddp``                                  ``Regression``: all ranks draw the same samples
=============  ==========================================  ====================================================
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

import pytest

from lightning_distopt import CompressedDDPStrategy, LocalUpdateStrategy, PipelineStrategy, list_strategies
from lightning_distopt.strategies import StrategyRecord
from lightning_distopt.strategies.staged import StagedStrategy
from tests.strategies.models import Layered, Net

SUFFIX = "_fork"
RECORDS: dict[str, StrategyRecord] = {
    record.name.removesuffix(SUFFIX): record for record in list_strategies() if record.name.endswith(SUFFIX)
}


def kind(row: str) -> str:
    """Return the kind of a row; see the module's table."""
    strategy = RECORDS[row].strategy
    if issubclass(strategy, CompressedDDPStrategy):
        return "replicas"
    if issubclass(strategy, StagedStrategy):
        return "synchronous" if issubclass(strategy, PipelineStrategy) else "stale"
    return "queries"


ROWS = tuple(RECORDS)
REPLICAS = tuple(row for row in ROWS if kind(row) == "replicas")
PIPELINES = tuple(row for row in ROWS if kind(row) in ("synchronous", "stale"))
ENGINES = ("compressed_ddp", "compressed_ddp_powersgd")
"""One strategy of each engine of replicas, with the most state: residuals; residuals and warm starts."""
STAGED = ("pipeline", "dsp")
"""One of each engine of pipelines."""
ROUND = 3
"""Local steps a round in these suites, so that rounds end inside of short fits, and fits inside of rounds."""


def build(row: str, **arguments: Any) -> Any:
    """Return the strategy of a row, on forked processes, with further arguments.

    Args:
        row: its name.
        **arguments: of ``CompressedDDPStrategy``; what does not apply to a pipeline is left out there.
    """
    record = RECORDS[row]
    given = {**record.arguments, **arguments}
    if issubclass(record.strategy, LocalUpdateStrategy):
        given["sync_every"] = arguments.get("sync_every", ROUND)
    if kind(row) != "replicas":
        given.pop("strict_sidecars", None)  # there are none
    if kind(row) in ("synchronous", "stale"):
        given.setdefault("balance", "layers")
        if isinstance(timeout := given.get("timeout"), timedelta):
            given["timeout"] = timeout.total_seconds()
    return record.strategy(**given)


def net(row: str, **arguments: Any) -> Any:
    """Return the model of a row, with arguments of ``Net``."""
    return (Net if kind(row) == "replicas" else Layered)(**arguments)


def rows_and(normal: Sequence[str] = ENGINES, rows: Sequence[str] = REPLICAS) -> Any:
    """Parametrise over rows; those that are not in ``normal`` are slow."""
    marks = [pytest.param(row, marks=() if row in normal else pytest.mark.slow) for row in rows]
    return pytest.mark.parametrize("row", marks)


def crossed(cases: Any, first: str = "", rows: Sequence[str] = REPLICAS, also: Collection[tuple[str, str]] = ()) -> Any:
    """Parametrise over all pairs of a row and a case, named by keys.

    In ``make test`` the first engine's row has every case, the other one only ``first``; the rest is slow. Without
    ``first`` both have every case. What is in ``also`` is normal, too.
    """
    row_0, row_1 = ENGINES
    normal = {(row_0, name) for name in cases} | {(row_1, name) for name in cases if not first or name == first}
    normal |= set(also)
    marks = [
        pytest.param(row, cases[name], id=f"{row}-{name}", marks=() if (row, name) in normal else pytest.mark.slow)
        for row in rows
        for name in cases
    ]
    return pytest.mark.parametrize(("row", "case"), marks)
