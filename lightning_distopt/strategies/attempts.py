"""Ranks that ``torchrun`` has started again meet under a name of their own in the agent's store."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["meet_again"]


def meet_again(rank: int, world_size: int, backend: str | None, device: torch.device, timeout: timedelta) -> None:
    """Make the default process group of a later attempt; nothing happens in a first one, or without an agent.

    The agent keeps its store when it starts the ranks again, and with it the addresses of those that died (torch 2.15).

    Args:
        rank: of this process.
        world_size: number of ranks.
        backend: of the process group; ``None`` is the device's default.
        device: of this rank.
        timeout: of the process group.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend or dist.get_default_backend_for_device(device),
        store=dist.PrefixStore(f"attempt/{attempt}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type != "cpu" else None,
    )
