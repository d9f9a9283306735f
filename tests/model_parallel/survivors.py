"""Real processes of which some are expected to fail: their results without a last barrier."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, world: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    torch.save(fn(rank, world, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()  # an ordinary end: it must not hang


def run_survivors(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 30.0) -> list[Any]:
    """Fork processes; return what they returned, ``None`` for those that died. All must be gone within ``timeout``."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [context.Process(target=_entry, args=(r, world, folder, fn, args)) for r in range(world)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        assert not alive, f"ranks {alive} did not end"
        files = [folder / f"{rank}.pt" for rank in range(world)]
        return [torch.load(f, weights_only=False) if f.exists() else None for f in files]
