"""A fit in which one rank fails in one step, and notes of how every rank ended; also a script, for launchers that start one.

``python -m tests.strategies.faulty <row> <fault> <folder>``
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import hosts
from lightning_distopt import LocalUpdateStrategy
from lightning_distopt.errors import ExchangeError
from tests.strategies.fits import trainer
from tests.strategies.models import Net
from tests.strategies.rows import RECORDS

TIMEOUT, STEP, CULPRIT = 3.0, 3, 1


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def exception() -> None:
    raise ValueError("a bug of the user's")


def slow() -> None:
    time.sleep(TIMEOUT + 4.0)


def memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
    try:
        torch.ones(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def link() -> None:
    """Cut this host off: in a network namespace of its own."""
    subprocess.run(["ip", "link", "set", hosts.INTERFACE, "down"], check=True)


FAULTS: dict[str, Callable[[], None]] = {f.__name__: f for f in (kill, stop, exception, slow, memory, link)}


class Faulty(Net):
    """Fails on one rank in one step.

    Args:
        fault: a key of ``FAULTS``, "nan", or "none".
        folder: for the moment of the fault.
    """

    def __init__(self, fault: str, folder: Path) -> None:
        super().__init__(batches=20)
        self.fault, self.folder = fault, folder

    def on_train_start(self) -> None:
        # Only now: processes that import everything anew come together more slowly than they train.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=TIMEOUT))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        assert isinstance(loss, Tensor)
        if self.global_rank == CULPRIT and batch_idx == STEP and self.fault != "none":
            (self.folder / "fault").write_text(str(time.time()))
            if self.fault == "nan":
                return loss * float("nan")
            FAULTS[self.fault]()
        return loss


def noted(folder: Path, watched: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Write down how a rank ends, and when."""
    (folder / f"{os.getpid()}.pid").touch()
    ended: dict[str, Any] = {"type": "none", "text": ""}
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        ended = {"type": type(error).__name__, "text": str(error)}
        if isinstance(error, ExchangeError):
            ended |= {"rank": error.rank, "step": error.step, "bucket": error.bucket, "culprits": error.culprits}
        raise
    finally:
        part = folder / f"{watched.global_rank}.part"
        part.write_text(json.dumps({**ended, "time": time.time()}))
        part.rename(part.with_suffix(".end"))


def strategy(row: str, start_method: str, timeout: float = 60.0, **arguments: Any) -> Any:
    record = RECORDS[row]
    settings = {**record.arguments, "timeout": timedelta(seconds=timeout), **arguments, "start_method": start_method}
    if record.strategy is LocalUpdateStrategy:
        settings["sync_every"] = 1  # the tables say in which exchange a fault is seen
    return record.strategy(**settings)


def run(row: str, fault: str, folder: Path, start_method: str, devices: int = 3) -> None:
    """Fit with a fault."""
    watched = trainer(strategy(row, start_method), 10, devices=devices)
    launch = watched.strategy.launcher.launch
    watched.strategy.launcher.launch = lambda function, *args, **kwargs: launch(
        partial(noted, folder, watched, function), *args, **kwargs
    )
    watched.fit(Faulty(fault, folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), "popen")
