"""The channels of one process: to the stages before and after its own, with buffers as deep as the plan's delays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_distopt.exchange.meter import Meter
from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.model_parallel.transport import Channel, Endpoint, LocalChannel, Receiver, Sender
from lightning_distopt.model_parallel.worker import Hop

__all__ = ["TAGS_A_HOP", "connect", "settle"]

TAGS_A_HOP = 4
"""Tags that a hop takes, from ``first_tag + TAGS_A_HOP * hop`` on."""


def connect(
    plan: StalenessPlan,
    ranks: Sequence[int],
    rank: int,
    meter: Meter,
    timeout: float,
    device: torch.device,
    *,
    latency: float = 0.0,
    group: dist.ProcessGroup | None = None,
    first_tag: int = 0,
) -> dict[int, Hop]:
    """Return the hops that end in this process, by the stage before them.

    Args:
        plan: whose delays say how deep buffers are.
        ranks: global rank of each stage's process.
        rank: of this process.
        meter: counts bytes and waiting.
        timeout: seconds to wait for a neighbour.
        device: where tensors that arrive are to be.
        latency: seconds added to the way of every message, for experiments.
        group: process group of Gloo; the default one if ``None``.
        first_tag: no other channel between the same processes may use these tags.
    """
    hops: dict[int, Hop] = {}
    for hop, (before, after) in enumerate(itertools.pairwise(ranks)):
        if rank not in (before, after):
            continue
        if before == after:
            down, up = LocalChannel(hop + 1), LocalChannel(hop)
            hops[hop] = Hop(down, down, up, up)
            continue
        ahead, back = max(1, plan.forward_delays[hop]), max(1, plan.gradient_delays[hop])
        in_flight = plan.staleness[hop] + 2
        own, peer, tag = (hop, after, first_tag) if rank == before else (hop + 1, before, first_tag)
        down_end = Endpoint(own, peer, tag + TAGS_A_HOP * hop, "activations")
        up_end = Endpoint(own, peer, tag + TAGS_A_HOP * hop + 2, "gradients")
        if rank == before:
            sender = Sender(down_end, ahead, in_flight, group, meter, timeout)
            sender.back = Receiver(up_end, back, group, meter, timeout, device, latency)
            hops[hop] = Hop(activations_out=sender, gradients_in=sender.back)
        else:
            sender = Sender(up_end, back, in_flight, group, meter, timeout)
            sender.back = Receiver(down_end, ahead, group, meter, timeout, device, latency)
            hops[hop] = Hop(activations_in=sender.back, gradients_out=sender)
    return hops


def settle(hops: dict[int, Hop]) -> None:
    """Wait until all that was sent has arrived; before a process lets go of its channels."""
    for hop in hops.values():
        ends: list[Channel | None] = list(hop)
        for channel in ends:
            if isinstance(channel, Sender):
                channel.settle()
