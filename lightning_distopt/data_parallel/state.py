"""What a rank of the update engine remembers, by parameter name: collected for a checkpoint, placed after one.

==============  ==============================================================================================
``residuals``   ``e``
``server``      ``s``, the same on every rank: of a replicated server, or merged from the pieces of a sharded one
``shards``      this rank's pieces of a sharded server's ``s``
``local``       ``z``, inside a round of several local steps
``flight``      the averaged displacement of a fragment that is on its way, the same on every rank
``groups``      counters, by the numbers of the optimizers that step the group
``outer``       what the outer optimizer remembers, the same on every rank
``buffers``     this rank's own, between two averages of them
==============  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.data_parallel.buckets import Group
from lightning_distopt.data_parallel.fragments import Flight
from lightning_distopt.data_parallel.server_memory import ServerMemory
from lightning_distopt.error_feedback import FlatViews, step_ahead_
from lightning_distopt.exchange import Meter, ServerResidual

__all__ = ["Asleep", "collect_state", "no_state", "place_state", "rescue_lost"]

Asleep = dict[str, dict[str, Any]]
"""The state of parameters and groups that do not take part now, in the form of the module's table without shards."""


def no_state() -> Asleep:
    """Return the state of nothing."""
    return {"residuals": {}, "server": {}, "local": {}, "flight": {}, "groups": {}}


def collect_state(groups: Sequence[Group], server: ServerMemory, asleep: Asleep) -> dict[str, Any]:
    """Return tensors, numbers and strings only. Tensors are references, except inside a round."""
    state: dict[str, Any] = {key: dict(values) for key, values in asleep.items()}
    pieces = server.pieces([bucket for group in groups for bucket in group.buckets])
    state["shards"] = {name: [piece._asdict() for piece in those] for name, those in pieces.items()}
    for group in groups:
        if group.flight is not None:
            group.flight.arrive()
            for bucket, mean in zip(group.buckets, group.flight.means, strict=True):
                state["flight"].update(zip(bucket.names, mean.views, strict=True))
        state["groups"][group.key] = {
            "rounds": group.rounds,
            "local_steps": group.local_steps,
            "begun": group.begun,
            **({"mixed": True} if group.mixed else {}),
        }
        for bucket in group.buckets:
            state["residuals"].update(zip(bucket.names, bucket.residual.views, strict=True))
            if bucket.server is not None:
                state["server"].update(zip(bucket.names, bucket.server.views, strict=True))
        if group.inside:
            local = group.stash or group.data
            state["local"].update({name: z.clone() for name, z in zip(group.names, local, strict=True)})
    return state


def place_state(state: Mapping[str, Any], groups: Sequence[Group], server: ServerMemory) -> Asleep:
    """Give the groups what belongs to them, zero where there is nothing; return the rest.

    The parameters hold the common model; in the middle of a round it stays shown until the next ``enter``. A server's
    residual that came from another kind of server goes to the kind that serves now, or to the residuals if none does.
    """
    asleep: Asleep = {key: dict(state.get(key, {})) for key in no_state()}
    shards = state.get("shards", {})
    pieces = {n: [ServerResidual(int(p["start"]), p["values"].clone()) for p in those] for n, those in shards.items()}
    for group in groups:
        counters = asleep["groups"].pop(group.key, {})
        group.rounds = int(counters.get("rounds", 0))
        group.begun = bool(counters.get("begun", False))
        group.away, group.local_steps, group.stash, group.mixed, group.flight = False, 0, [], False, None
        for bucket in group.buckets:
            for i, name in enumerate(bucket.names):
                e = bucket.residual.views[i]
                _set(e, asleep["residuals"].pop(name, None))
                s = asleep["server"].pop(name, None)
                if bucket.server is not None:
                    _set(bucket.server.views[i], s)
                elif s is not None and s.shape == e.shape:
                    if not server.serves:
                        e.add_(s)
                    elif server.exchange.rank == 0:  # all ranks have it, and pieces have one owner
                        pieces.setdefault(name, []).append(ServerResidual(0, s.reshape(-1)))
        local = [asleep["local"].pop(name, None) for name in group.names]
        if all(z is not None for z in local):
            _begin_round_at_x(group, int(counters.get("local_steps", 0)))
            group.mixed = bool(counters.get("mixed", False))
            group.stash = [z.to(param.device, copy=True) for z, param in zip(local, group.data, strict=True)]
        coming = [[asleep["flight"].pop(name, None) for name in bucket.names] for bucket in group.buckets]
        if all(g is not None for bucket in coming for g in bucket):
            group.flight = Flight([FlatViews(bucket.params) for bucket in group.buckets])
            for mean, values in zip(group.flight.means, coming, strict=True):
                for view, value in zip(mean.views, values, strict=True):
                    _set(view, value)
    server.replace(pieces)
    # What is left sleeps in memory of its own: not in the state's, nor in that of buckets that are no more.
    for key in ("residuals", "server", "local", "flight"):
        asleep[key] = {name: values.clone() for name, values in asleep[key].items()}
    if groups:
        asleep["local"], asleep["flight"] = {}, {}
        asleep["groups"] = {
            key: {**counters, "local_steps": 0, "begun": False} for key, counters in asleep["groups"].items()
        }
    return asleep


def rescue_lost(groups: Sequence[Group], meter: Meter, process_group: dist.ProcessGroup | None = None) -> None:
    """Let ranks that lost their state go on with the others' counters and replicated ``s``, in a round from ``x``.

    A collective, small where nothing was lost. Counters decide about averaging, randomness and rounds, so ranks whose
    counters differ could not work together.
    """
    world, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    device = groups[0].buckets[0].anchor.flat.device
    table = torch.zeros(world, len(groups), 3, dtype=torch.int64, device=device)
    table[rank] = torch.tensor([[group.rounds, group.local_steps, group.begun] for group in groups])
    dist.all_reduce(table, group=process_group)
    meter.all_reduce("setup", table.nbytes, world)
    for group, counters in zip(groups, table.transpose(0, 1).tolist(), strict=True):
        best = rounds, local_steps, begun = max(counters)
        if group.local_steps < local_steps:
            _begin_round_at_x(group, local_steps)
        group.rounds, group.begun = rounds, bool(begun)
        for bucket in group.buckets:
            if bucket.server is not None and min(counters) != best:
                if rank != counters.index(best):
                    bucket.server.flat.zero_()
                dist.all_reduce(bucket.server.flat, group=process_group)
                meter.all_reduce("setup", bucket.server.flat.nbytes, world)


def _begin_round_at_x(group: Group, local_steps: int) -> None:
    """Be inside a round after so many local steps, with ``z = x``."""
    for bucket in group.buckets:
        step_ahead_(bucket.data, bucket.anchor, bucket.residual, 0.0)
    group.begun = group.away = True
    group.local_steps = local_steps


def _set(view: Tensor, value: Tensor | None) -> None:
    if value is not None and value.shape == view.shape:
        view.copy_(value)
    else:
        view.zero_()
