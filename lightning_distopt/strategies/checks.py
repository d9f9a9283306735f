"""Checks of arguments, each with the rule, the value and the cure in its message."""

from __future__ import annotations

import math
from typing import Any, get_args

__all__ = ["choice", "count", "fraction", "positive"]


def choice(name: str, value: Any, literal: Any) -> Any:
    """Return ``value`` if it is one of a ``Literal``'s."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}: got {value!r}.")
    return value


def count(name: str, value: Any, least: int) -> int:
    """Return ``value`` if it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer >= {least}: got {value!r}. Write for example `{name}={least}`.")
    if value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}: got {value}. Write for example `{name}={least}`.")
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
