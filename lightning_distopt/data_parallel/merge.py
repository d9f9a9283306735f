"""The states of all ranks of one run become the state of a rank of another number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["merge_states"]


def merge_states(states: Iterable[dict[str, Any] | None], world: int | None = None) -> dict[str, Any]:
    """Give every new rank the mean of the old ranks' residuals, so that the mean over ranks, hence the auxiliary point, is kept.

    Args:
        states: :meth:`UpdateSync.state_dict` of each old rank, or the ``residuals`` of :meth:`GradientSync.state_dict`, in
            order, one in memory at a time; ``None``, or left out, where it was lost (counts as zero).
        world: number of old ranks; as many as there are states if ``None``.

    Returns:
        A state, the same for every new rank: mean residuals, the server's residual (of one replica, or put together
        from all shards), the counters. Local steps of an unfinished round are dropped.
    """
    if world is None:
        states = list(states)
        world = len(states)
    merged: dict[str, Any] = {"residuals": {}, "server": {}, "shards": {}, "local": {}, "groups": {}}
    residuals: dict[str, Tensor] = merged["residuals"]
    server: dict[str, Tensor] = merged["server"]
    first = True
    for state in states:
        if state is None:
            continue
        if first:
            server.update(state.get("server", {}))
            groups = state.get("groups", {})
            merged["groups"] = {key: {**counters, "local_steps": 0} for key, counters in groups.items()}
            first = False
        for name, values in state.get("residuals", {}).items():
            residuals.setdefault(name, torch.zeros_like(values)).add_(values, alpha=1.0 / world)
        for name, pieces in state.get("shards", {}).items():
            whole = server.setdefault(name, torch.zeros_like(residuals[name])).view(-1)
            for piece in pieces:
                start, values = piece["start"], piece["values"]
                whole[start : start + values.numel()] = values
    return merged
