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
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import hosts
from lightning_distopt import LocalUpdateStrategy
from lightning_distopt.errors import ExchangeError, PipelineError
from tests.strategies.fits import trainer
from tests.strategies.models import Layered, Net
from tests.strategies.rows import RECORDS, build, kind
from tests.zeroth_order.models import Regression, loader

with suppress(ImportError):
    import torch.distributed.pipelining  # processes forked from this one begin together

STEP, CULPRIT = 3, 1


def patience(row: str) -> float:
    """Return the time-out of a row's processes in seconds.

    Gloo takes that of messages between two processes when it connects them, so there it is in force from the start, when
    processes come together more slowly than they train.
    """
    return 5.0 if kind(row) in ("synchronous", "stale") else 3.0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def exception() -> None:
    raise ValueError("a bug of the user's")


def slow(seconds: float = 7.0) -> None:
    time.sleep(seconds)


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


class Fault:
    """What happens to one rank in one step.

    Args:
        name: a key of ``FAULTS``, "nan", or "none".
        folder: for the moment of the fault.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def strikes(self, rank: int, step: int) -> bool:
        """Let it happen, if it is time; return whether numbers are to become NaN."""
        if rank != CULPRIT or step != STEP or self.name == "none":
            return False
        if not (self.folder / "fault").exists():
            (self.folder / "fault").write_text(str(time.time()))
            if self.name != "nan":
                FAULTS[self.name]()
        return self.name == "nan"


def be_impatient() -> None:
    """Set the time-out only when training starts: processes that import everything anew come together more slowly."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=patience("compressed_ddp")))


class Faulty(Net):
    """Fails on one rank in one step.

    Args:
        fault: which, and when.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(batches=20)
        self.fault = fault

    def on_train_start(self) -> None:
        be_impatient()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        assert isinstance(loss, Tensor)
        return loss * float("nan") if self.fault.strikes(self.global_rank, batch_idx) else loss


class Trap(nn.Module):
    """Fails where it is run, in one step.

    Args:
        module: whose layer it is.
    """

    def __init__(self, module: LayeredFaulty) -> None:
        super().__init__()
        self.of = [module]  # in a list, so that the module is no part of this one

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self.of
        if not (module._trainer and module.trainer.training and self.training):
            return x
        if module.fault.strikes(dist.get_rank(), module.trainer.global_step) and x.requires_grad:
            x.register_hook(lambda gradient: gradient * float("nan"))
        return x


class LayeredFaulty(Layered):
    """The same in a pipeline: every layer of that rank would do it.

    Args:
        fault: which, and when.
    """

    def __init__(self, fault: Fault) -> None:
        self.__dict__["fault"] = fault
        super().__init__(batches=20)

    def after(self, dropout: float) -> list[nn.Module]:
        return [Trap(self)]


class FaultyQueries(Regression):
    """The same in a query.

    Args:
        fault: which, and when.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.__dict__["fault"] = fault

    def on_train_start(self) -> None:
        be_impatient()

    def query(self, batch: Any) -> Tensor:
        losses = super().query(batch)
        return losses * float("nan") if self.fault.strikes(dist.get_rank(), self.trainer.global_step) else losses

    def train_dataloader(self) -> Any:
        return loader(20)


MODELS: dict[str, Any] = {"replicas": Faulty, "queries": FaultyQueries}


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
        if isinstance(error, PipelineError):
            ended |= {"rank": error.rank, "step": error.batch, "culprits": error.culprits}
        raise
    finally:
        part = folder / f"{watched.global_rank}.part"
        part.write_text(json.dumps({**ended, "time": time.time()}))
        part.rename(part.with_suffix(".end"))


def strategy(row: str, start_method: str, timeout: float = 60.0, **arguments: Any) -> Any:
    if kind(row) == "stale":
        arguments.setdefault("non_finite", "raise")
    if issubclass(RECORDS[row].strategy, LocalUpdateStrategy):
        arguments.setdefault("sync_every", 1)  # the tables say in which exchange a fault is seen
    return build(row, timeout=timedelta(seconds=timeout), start_method=start_method, **arguments)


def run(row: str, fault: str, folder: Path, start_method: str, devices: int = 3) -> None:
    """Fit with a fault."""
    from_the_start = patience(row) == 5.0 and (start_method == "fork" or fault == "link")
    watched = trainer(strategy(row, start_method, patience(row) if from_the_start else 60.0), 10, devices=devices)
    launch = watched.strategy.launcher.launch
    watched.strategy.launcher.launch = lambda function, *args, **kwargs: launch(
        partial(noted, folder, watched, function), *args, **kwargs
    )
    watched.fit(MODELS.get(kind(row), LayeredFaulty)(Fault(fault, folder)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), "popen")
