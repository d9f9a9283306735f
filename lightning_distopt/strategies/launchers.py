"""Launchers that let the ranks that survive a failure say what they know, and leave no process behind.

Lightning's own send SIGKILL to all ranks up to five seconds after one has failed (scripts), or wait for one that is stopped
(fork, spawn). These wait a grace period, print who ended how, and kill what still runs then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

__all__ = ["PatientProcesses", "PatientScripts"]

GRACE = 10.0  # seconds from the first failure until what still runs is killed: a roll-call takes two of them
_LOOK = 0.2  # seconds between looks at the processes
_KILL = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL


class PatientScripts(_SubprocessScriptLauncher):
    """Starts the script again on every device but the first; see the module."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if self.cluster_environment.creates_processes_externally:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        self._call_children_scripts()
        first = self.cluster_environment.global_rank() + 1
        threading.Thread(target=self._watch, args=(first,), name="distopt-observer", daemon=True).start()
        if not os.environ.get("OMP_NUM_THREADS"):  # as Lightning's launcher does
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.num_processes))
        try:
            return function(*args, **kwargs)
        except BaseException:
            self._end(first, time.monotonic() + GRACE)
            raise

    def _watch(self, first: int) -> None:
        """When a child has failed, give everyone the grace period, then end it all."""
        while not any(process.poll() for process in self.procs):
            if all(process.poll() == 0 for process in self.procs):
                return
            time.sleep(_LOOK)
        deadline = time.monotonic() + GRACE
        self._end(first, deadline)
        time.sleep(max(0.0, deadline - time.monotonic()))  # this thread ends with its process, usually before
        _print(f"rank {first - 1} still ran {GRACE:.0f} s after the first failure and was killed", self.procs, first)
        os.kill(os.getpid(), _KILL)

    def _end(self, first: int, deadline: float) -> None:
        """Wait for the children, and kill those that still run at the deadline."""
        while any(process.poll() is None for process in self.procs) and time.monotonic() < deadline:
            time.sleep(_LOOK)
        hanging = [first + i for i, process in enumerate(self.procs) if process.poll() is None]
        for process in self.procs:
            if process.poll() is None:
                process.send_signal(_KILL)
        if hanging:
            _print(
                f"ranks {hanging} still ran {GRACE:.0f} s after the first failure and were killed", self.procs, first
            )


class PatientProcesses(_MultiProcessingLauncher):
    """Forks or spawns one process a device; see the module."""

    def __init__(self, strategy: Any, start_method: Literal["spawn", "fork", "forkserver"] = "spawn") -> None:
        super().__init__(strategy, start_method=start_method)

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        ended = threading.Event()
        observer = threading.Thread(target=self._watch, args=(ended,), name="distopt-observer", daemon=True)
        observer.start()
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        finally:
            ended.set()
            observer.join()

    def _watch(self, ended: threading.Event) -> None:
        deadline = float("inf")
        while not ended.wait(_LOOK):
            if deadline == float("inf") and any(_has_failed(process) for process in self.procs):
                deadline = time.monotonic() + GRACE
            if time.monotonic() > deadline:
                for pid in [process.pid for process in self.procs if process.pid is not None]:
                    with suppress(ProcessLookupError, ChildProcessError):
                        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                            os.kill(pid, _KILL)
                return


def _has_failed(process: Any) -> bool:
    """Whether a child has ended with an error; it is left to the thread that waits for it."""
    if not hasattr(os, "waitid"):
        return False
    try:
        status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # that thread has done so
        return bool(process.exitcode)
    return status is not None and status.si_status != 0


def _print(what: str, processes: Sequence[subprocess.Popen[Any]], first: int) -> None:
    """Say on stderr how the ranks ended: the roll-call of a launcher, which needs no store."""
    ends = [f"rank {first + i}: {_end_of(process.poll())}" for i, process in enumerate(processes)]
    print(f"lightning_distopt: {what}. {'; '.join(ends)}.", file=sys.stderr, flush=True)


def _end_of(code: int | None) -> str:
    if code is None:
        return "runs"
    if code < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"
