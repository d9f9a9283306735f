"""Run a function on several real processes over Gloo."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, world: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    status = os.path.join(folder, f"{rank}.error")
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(os.path.join(folder, "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
        result = fn(rank, world, *args)
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        with open(status + ".tmp", "w") as file:
            file.write(traceback.format_exc())
        os.rename(status + ".tmp", status)
        os._exit(1)
    os._exit(0)


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 30.0) -> list[Any]:
    """Fork ``world`` Gloo processes that call ``fn(rank, world, *args)``; return their results by rank.

    The first rank that fails raises an ``AssertionError`` here with its traceback and rank; the others are killed. So
    are all after ``timeout`` seconds.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_entry, args=(r, world, folder, fn, args)) for r in range(world)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes):
                for rank, process in enumerate(processes):
                    if process.exitcode not in (None, 0):
                        process.join()
                        path = os.path.join(folder, f"{rank}.error")
                        text = open(path).read() if os.path.exists(path) else f"exit code {process.exitcode}"
                        raise AssertionError(f"rank {rank} of {world} failed:\n{text}")
                if time.monotonic() > deadline:
                    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
                    raise AssertionError(f"ranks {alive} of {world} still ran after {timeout} s")
                time.sleep(0.005)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        for rank, process in enumerate(processes):
            path = os.path.join(folder, f"{rank}.error")
            assert process.exitcode == 0, (
                f"rank {rank} of {world} failed:\n" + (open(path).read() if os.path.exists(path) else "")
            )
        return [torch.load(os.path.join(folder, f"{r}.pt"), weights_only=False) for r in range(world)]


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
