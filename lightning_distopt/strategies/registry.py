"""Every strategy name that this package offers, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_distopt.strategies.compressed_ddp import CompressedDDPStrategy

__all__ = ["StrategyRecord", "StrategyTable", "list_strategies", "register"]


@dataclass(frozen=True)
class StrategyRecord:
    """One name for ``Trainer(strategy=...)``.

    Args:
        name: what the user writes, lower case.
        paper: where the method comes from.
        description: one line.
        strategy: the class behind it.
        arguments: what the class is constructed with.
    """

    name: str
    paper: str
    description: str
    strategy: type[CompressedDDPStrategy]
    arguments: dict[str, Any] = field(default_factory=dict)


class StrategyTable(list[StrategyRecord]):
    """A list of records that shows itself as a table."""

    def __repr__(self) -> str:
        width = max((len(record.name) for record in self), default=0)
        paper = max((len(record.paper) for record in self), default=0)
        return "\n".join(f"{r.name:<{width}}  {r.paper:<{paper}}  {r.description}" for r in self)


_METHODS = (
    StrategyRecord(
        "compressed_ddp",
        "arXiv:2008.05823",
        "DDP with compressed updates and step-ahead error feedback",
        CompressedDDPStrategy,
    ),
)
_LAUNCHERS = {
    "": ("popen", "one process a device, started by running the script again"),
    "_spawn": ("spawn", "processes by spawn"),
    "_fork": ("fork", "processes by fork"),
    "_notebook": ("fork", "processes by fork, for notebooks"),
}
_RECORDS = tuple(
    StrategyRecord(
        method.name + suffix,
        method.paper,
        method.description if not suffix else f"{method.description}; {how}",
        method.strategy,
        {**method.arguments, "start_method": start_method},
    )
    for method in _METHODS
    for suffix, (start_method, how) in _LAUNCHERS.items()
)


def list_strategies() -> StrategyTable:
    """Return a record for every strategy name, with ``.name``, ``.paper`` and ``.description``; printing it shows a table."""
    return StrategyTable(_RECORDS)


def register(registry: Any = StrategyRegistry) -> None:
    """Make the names known to ``Trainer(strategy=...)``; calling it again changes nothing."""
    for record in _RECORDS:
        if record.name not in registry:
            registry.register(record.name, record.strategy, description=record.description, **record.arguments)
