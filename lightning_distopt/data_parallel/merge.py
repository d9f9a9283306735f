"""The states of all ranks of one run become the state of a rank of another number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["merge_states"]


def merge_states(states: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Give every new rank the mean of the old ranks' residuals, so that the mean over ranks, hence the auxiliary point, is kept.

    Args:
        states: :meth:`UpdateSync.state_dict` of each old rank, in order; ``None`` where it was lost (counts as zero).

    Returns:
        A state: mean residuals, the replicated server's residual (alike on all old ranks), all shards of a sharded one,
        the counters. Local steps of an unfinished round are dropped.
    """
    found = [state for state in states if state is not None]
    merged: dict[str, Any] = {"residuals": {}, "server": {}, "shards": {}, "local": {}, "groups": {}}
    if not found:
        return merged
    for state in found:
        for name, values in state["residuals"].items():
            total = merged["residuals"].setdefault(name, torch.zeros_like(values))
            total.add_(values, alpha=1.0 / len(states))
        for name, pieces in state["shards"].items():
            merged["shards"].setdefault(name, []).extend(pieces)
    merged["server"] = found[0]["server"]
    merged["groups"] = {key: {**counters, "local_steps": 0} for key, counters in found[0]["groups"].items()}
    return merged
