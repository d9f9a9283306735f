"""Ties: parameters that several stages share, and which plans can train them.

A tie within a worker is one tensor with one optimizer state there, whose gradient the worker puts together. A tie between
workers would be two tensors that go their own ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_distopt.model_parallel.staleness import StalenessPlan

__all__ = ["find_ties", "refuse_ties"]


def find_ties(stages: Sequence[Mapping[Any, nn.Parameter]]) -> list[list[tuple[int, Any]]]:
    """Return the memory that several stages share: for each piece, its (stage, name) pairs.

    Args:
        stages: the parameters of each stage by name.
    """
    places: dict[int, list[tuple[int, Any]]] = {}
    for index, parameters in enumerate(stages):
        seen: set[int] = set()
        for name, parameter in parameters.items():
            # By storage, so that a view of the same memory counts as well.
            key = parameter.untyped_storage().data_ptr() or id(parameter)
            if key not in seen:
                seen.add(key)
                places.setdefault(key, []).append((index, name))
    return [found for found in places.values() if len(found) > 1]


def refuse_ties(plan: StalenessPlan, stages: Sequence[Mapping[Any, nn.Parameter]]) -> None:
    """Raise for ties that this plan would train as something else than one tensor.

    Args:
        plan: says which stages are together.
        stages: the parameters of each stage by name.

    Raises:
        ValueError: with the stages, the names and the cure.
    """
    for places in find_ties(stages):
        names = " and ".join(f"`{name}` (stage {stage})" for stage, name in places)
        if len({plan.placement[stage] for stage, _ in places}) > 1:
            raise ValueError(
                f"Stages on different processes share a parameter: {names}. Each would go its own way. Cut elsewhere, or use "
                "`strategy='ouroboros'`, which has the first and the last stage on one device, or `strategy='pipeline'`."
            )
        if len({id(stages[stage][name]) for stage, name in places}) > 1:
            raise ValueError(
                f"Shared memory must be one nn.Parameter: got different ones for {names}, which would be updated twice. Share "
                "the parameter itself, as in `head.weight = embedding.weight`."
            )
        if plan.accumulate > 1 or plan.versions != "newest":
            raise ValueError(
                f"Shared parameters need `accumulate=1` and `versions='newest'`: got {plan.accumulate} and {plan.versions!r} "
                f"with {names}, whose parts would fall into different updates. Leave these options out."
            )
