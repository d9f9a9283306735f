"""Checks of arguments, each with the rule, the value and the cure in its message."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, get_args

from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

__all__ = ["choice", "count", "ddp_arguments", "flag", "fraction", "positive"]

# What would step between the ranks and this package's own exchange.
_HOOKS = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period")
_OTHER_EXCHANGES = (
    "process_group",
    "device_mesh",
    "mixed_precision",
    "delay_all_reduce_named_params",
    "param_to_hook_all_reduce",
    "skip_all_reduce_unused_params",
)


def choice(name: str, value: Any, literal: Any) -> Any:
    """Return ``value`` if it is one of a ``Literal``'s."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}: got {value!r}. Choose one of these."
        )
    return value


def count(name: str, value: Any, least: int) -> int:
    """Return ``value`` if it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer >= {least}: got {value!r}. Write for example `{name}={least}`.")
    if value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}: got {value}. Write for example `{name}={least}`.")
    return value


def flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False: got {value!r}. Write for example `{name}=True`.")
    return value


def fraction(name: str, value: Any) -> float:
    """Return ``value`` if it is in [0, 1]."""
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` must be in [0, 1]: got {value!r}. Write for example `{name}=1.0`.")
    return float(value)


def positive(name: str, value: Any) -> float:
    """Return ``value`` if it is above 0."""
    if not _is_number(value) or not value > 0:
        raise ValueError(f"`{name}` must be above 0: got {value!r}. Write for example `{name}=25`.")
    return float(value)


def ddp_arguments(strategy: str, arguments: Mapping[str, Any]) -> None:
    """Raise for keywords that neither ``DDPStrategy`` nor ``DistributedDataParallel`` knows, or that replace our exchange.

    Left alone, unknown ones would be refused at the start of the fit, and the others would train wrongly.

    Raises:
        TypeError: naming the unknown arguments and the known ones.
        ValueError: naming those that cannot be combined with the strategy.
    """
    theirs = [*_parameters(DDPStrategy), *_parameters(DistributedDataParallel)]
    known = [name for name in theirs if name not in (*_HOOKS, *_OTHER_EXCHANGES)]
    unknown = sorted(set(arguments) - set(theirs))
    if unknown:
        raise TypeError(
            f"`{strategy}` got unknown arguments {unknown}: what it does not know itself goes to DDPStrategy and "
            f"DistributedDataParallel, which take {', '.join(known)}. Check the spelling."
        )
    given = [name for name in (*_HOOKS, *_OTHER_EXCHANGES) if arguments.get(name) not in (None, False)]
    if given:
        named = ", ".join(f"`{name}`" for name in given)
        raise ValueError(
            f"`{strategy}` brings its own exchange over all ranks and takes no {named}. Leave them out, or use `DDPStrategy`."
        )


def _parameters(cls: type) -> list[str]:
    named = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    ours = ("self", "module", "device_ids")
    return [p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ours]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
