"""What the replicas of a pipeline do not have in common, for its checkpoint: one dictionary a replica, by layer or parameter.

    states      of stateful layers                residuals   of compressed gradients, in units of gradients
    loaders     places of its reader's loaders    queries     starts of PowerSGD's iterations, alike in all replicas
    random      generators of each worker         rounds      of averaging, which enter the keys of randomness; alike, too

It is in the checkpoint, where the optimizer's state is, and not beside it: by name, every cut into stages can go on with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["merge_parts", "state_for"]

_BY_NAME = ("states", "residuals", "queries", "rounds", "random")


def merge_parts(parts: Iterable[tuple[int, Mapping[str, Any]]], replicas: int) -> list[dict[str, Any]]:
    """Return the state of each replica.

    Args:
        parts: (replica, what one of its processes has).
        replicas: how many.
    """
    merged: list[dict[str, Any]] = [{name: {} for name in _BY_NAME} for _ in range(replicas)]
    for replica, part in parts:
        for name, value in part.items():
            if name in _BY_NAME:
                merged[replica][name].update(value)
            else:
                merged[replica][name] = value
    return merged


def state_for(saved: Sequence[Mapping[str, Any]], replica: int, replicas: int) -> dict[str, Any]:
    """Return what a replica goes on with.

    With another number of replicas each gets the mean of the residuals, so that their mean, what is still to be learned from,
    is kept; states of layers, places and generators are left out.
    """
    if not saved:
        return {}
    if len(saved) == replicas:
        return dict(saved[replica])
    residuals: dict[str, Tensor] = {}
    for part in saved:
        for name, values in part["residuals"].items():
            residuals.setdefault(name, torch.zeros_like(values)).add_(values, alpha=1.0 / len(saved))
    return {"queries": saved[0]["queries"], "rounds": saved[0]["rounds"], "residuals": residuals}
