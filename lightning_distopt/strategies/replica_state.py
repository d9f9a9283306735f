"""What the replicas of a pipeline do not have in common, for its checkpoint: one dictionary a replica, by layer or parameter.

    states      of stateful layers                residuals   of compressed gradients, in units of gradients
    loaders     places of its reader's loaders    queries     starts of PowerSGD's iterations, alike in all replicas
    random      generators, by process            rounds      of averaging, which enter the keys of randomness; alike, too

It is in the checkpoint, where the optimizer's state is, and not beside it: by name, every cut into stages can go on with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distopt.errors import CheckpointError
from lightning_distopt.strategies.header import check_engine
from lightning_distopt.strategies.random_states import check_random_states

__all__ = ["check_added", "merge_parts", "state_for"]

_BY_NAME = ("states", "residuals", "queries", "rounds", "random")
_COUNTS = ("batches", "updates", "epochs")


def check_added(added: Any, path: str) -> None:
    """Look at what a pipeline has added to a checkpoint, before anything of it is used.

    Raises:
        CheckpointError: if it is not what a pipeline adds.
    """
    try:
        for name in _COUNTS:
            count = added.get(name, 0)
            if type(count) is not int or count < 0:
                raise TypeError(f"`{name}` is a {type(count).__name__}, not a counter")
        for part in added.get("replicas", []):
            check_engine({"residuals": part.get("residuals", {})})
            for name in _BY_NAME:
                if not isinstance(part.get(name, {}), dict):
                    raise TypeError(f"`{name}` is a {type(part[name]).__name__}, not a dictionary")
            for states in part.get("random", {}).values():
                check_random_states(states)
            if not isinstance(part.get("loaders", []), list):
                raise TypeError("`loaders` is not a list")
    except Exception as error:  # what is no dictionary raises what it will
        raise CheckpointError(
            f"`{path}` holds something of a pipeline that this version cannot use ({type(error).__name__}: {error}). Choose "
            "another checkpoint, or update the package if a later version wrote it.",
            path,
        ) from error


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
