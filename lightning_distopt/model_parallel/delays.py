"""Delays of a pipeline's hops: checked, counted, and derived from the staleness of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["checked_delays", "delays_back", "hops_told"]


def checked_delays(name: str, values: Any) -> tuple[int, ...]:
    """Return delays, or a staleness, as a tuple.

    Raises:
        ValueError: for something else than integers >= 0.
    """
    if (
        not isinstance(values, Iterable)
        or isinstance(values, str)
        or not all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    ):
        raise ValueError(f"`{name}` must be a list of integers, one a hop: got {values!r}. Write for example [1, 1].")
    if any(v < 0 for v in values):
        raise ValueError(f"`{name}` must not be negative: got {list(values)}. Use 0 for a hop within the tick.")
    return tuple(values)


def hops_told(stages: int | None, p: Sequence[int] | None, q: Sequence[int] | None, m: Sequence[int] | None) -> int:
    """Return the number of hops that stages, delays or staleness tell.

    Raises:
        ValueError: if none does, or two contradict each other.
    """
    for name, values in (("forward_delays", p), ("gradient_delays", q), ("staleness", m)):
        if values is not None:
            checked_delays(name, values)
    told = {
        name: count
        for name, count in (
            ("stages", stages),
            ("forward_delays", None if p is None else len(p) + 1),
            ("gradient_delays", None if q is None else len(q) + 1),
            ("staleness", None if m is None else len(m)),
        )
        if count is not None
    }
    if not told:
        raise ValueError(
            "`stages` must be given where no delays tell it: got none of them. Write for example `stages=3`."
        )
    if len(set(told.values())) > 1:
        each = ", ".join(f"`{name}` for {count} stages" for name, count in told.items())
        raise ValueError(
            f"All must be for the same number of stages: got {each}. Delays have one entry less than stages."
        )
    count = next(iter(told.values()))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"`stages` must be an integer >= 1: got {count!r}. Write for example `stages=3`.")
    return count - 1


def delays_back(p: list[int] | None, m: Sequence[int], q: Sequence[int] | None, forward: int) -> list[int]:
    """Return ``q_k = m_k - m_{k+1} - p_k``; without ``p``, half of each hop (the greater half forward) unless fixed to 0."""
    steps = [a - b for a, b in pairwise(m)]
    if m[-1] != 0 or any(step < 0 for step in steps):
        raise ValueError(
            f"`staleness` must fall from stage to stage and end with 0: got {list(m)}. Write for example [4, 2, 0]."
        )
    if p is None and q is None:
        return [step // 2 if forward else step for step in steps]
    if p is None:
        assert q is not None
        taken, name = list(q), "gradient_delays"
    else:
        taken, name = p, "forward_delays"
    rest = [step - delay for step, delay in zip(steps, taken, strict=True)]
    if any(r < 0 for r in rest):
        raise ValueError(
            f"`staleness` must leave room for `{name}`: got {list(m)}, which fall by {steps}, with {taken}. Give smaller "
            "delays or a greater staleness."
        )
    if p is None:
        return taken
    if q is not None and list(q) != rest:
        raise ValueError(
            f"`gradient_delays` must be what `staleness` and `forward_delays` leave, {rest}: got {list(q)}. Leave "
            "one of them out."
        )
    return rest
