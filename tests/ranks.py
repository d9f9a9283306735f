"""Run a function on several real processes over Gloo."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(
    rank: int,
    world: int,
    folder: Path,
    timeout: float,
    before: Callable[[int], None] | None,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        with open(folder / f"{rank}.stack", "w") as stack:
            faulthandler.register(signal.SIGUSR1, stack)
            torch.set_num_threads(1)
            if before is not None:
                before(rank)
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
            store = dist.FileStore(str(folder / "store"), world)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=max(1.0, timeout))
            )
            torch.save(fn(rank, world, *args), folder / f"{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        part = folder / f"{rank}.part"
        part.write_text(traceback.format_exc())
        part.rename(folder / f"{rank}.error")
        os._exit(1)
    os._exit(0)


def run_ranks(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 30.0,
    before: Callable[[int], None] | None = None,
) -> list[Any]:
    """Fork ``world`` Gloo processes that call ``fn(rank, world, *args)``; return their results by rank.

    The rank that fails first raises an ``AssertionError`` here with its traceback and number; the others are killed. So
    are all after ``timeout`` seconds, and the error shows where each of them was. ``before(rank)`` runs in each process
    before it opens a connection.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_entry, args=(rank, world, folder, timeout, before, fn, args))
            for rank in range(world)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes) and not _failed(processes):
                if time.monotonic() > deadline:
                    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
                    stacks = [f"\nrank {rank}:\n{_stack(processes[rank], folder / f'{rank}.stack')}" for rank in alive]
                    raise AssertionError(f"ranks {alive} of {world} still ran after {timeout} s{''.join(stacks)}")
                time.sleep(0.005)
            failed = _failed(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        if failed:
            raise AssertionError(
                _first_failure(folder, world) or f"rank {failed[0]} of {world} ended without a traceback"
            )
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _failed(processes: list[Any]) -> list[int]:
    return [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]


def _stack(process: Any, path: Path) -> str:
    """Let a running rank write down where it is."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1)
    patience = time.monotonic() + 2.0
    while not (path.exists() and path.stat().st_size) and process.is_alive() and time.monotonic() < patience:
        time.sleep(0.01)
    return path.read_text() if path.exists() else ""


def _first_failure(folder: Path, world: int) -> str:
    """Return the oldest traceback: ranks whose neighbour is gone fail too, and say nothing of the cause."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    return f"rank {errors[0].stem} of {world} failed:\n{errors[0].read_text()}" if errors else ""


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
