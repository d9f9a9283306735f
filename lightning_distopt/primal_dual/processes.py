"""K processes on this machine: started, watched, and started again without the one that was lost.

    parent   starts K processes, which share its samples; takes rows of the history, checkpoints and the result from
             rank 0; sees at once when a process ends, and ends all when one is lost
    rank 0   server and worker 0          rank k   worker k

After a loss nothing of the old process group can be trusted, so "redistribute" is a new start: K - 1 processes, all samples
divided anew, from the dual variables of the last checkpoint. Any feasible ones are a valid start, so the certificate holds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lightning_distopt.errors import CertificateError, WorkerLostError
from lightning_distopt.primal_dual import kernels
from lightning_distopt.primal_dual.certificate import Certificate, Row
from lightning_distopt.primal_dual.checkpoints import Checkpoint, CheckpointFile, Start, save_array
from lightning_distopt.primal_dual.config import Config
from lightning_distopt.primal_dual.losses import Loss
from lightning_distopt.primal_dual.ranks import Hooks, Rank, run_rank
from lightning_distopt.primal_dual.split import make_shard, parts
from lightning_distopt.primal_dual.worker import Worker

__all__ = ["Job", "solve_on_processes"]

Array = NDArray[np.float64]
_START = 120.0  # seconds that processes may take to start and compile
_LONGEST_WAIT = timedelta(seconds=600)  # for one message; who is lost is found much earlier


@dataclass(frozen=True)
class Job:
    """One problem and how it is to be solved.

    Attributes:
        x: samples, CSR.
        y: targets.
        weight: of the samples.
        loss: a row of the table.
        lam: strength of the regulariser.
        bias: append the constant feature.
        configure: the settings for a number of workers.
        on_worker_loss: "raise" or "redistribute".
        timeout: seconds without life after which a worker is lost.
        checkpoint_every: certified synchronisations between checkpoints; 0 is none.
    """

    x: Any
    y: Array
    weight: Array
    loss: Loss
    lam: float
    bias: bool
    configure: Callable[[int], Config]
    on_worker_loss: str = "raise"
    timeout: float = 30.0
    checkpoint_every: int = 0


def solve_on_processes(
    job: Job,
    workers: int,
    on_row: Callable[[Row], None],
    alpha: Array | None = None,
    file: CheckpointFile | None = None,
) -> tuple[Array, Array, Certificate]:
    """Solve and return ``(w, alpha, certificate)``; no process is left.

    Args:
        job: the problem.
        workers: K.
        on_row: called with every row of the history.
        alpha: dual variables to start from, by sample.
        file: where checkpoints are kept beyond this run; read first, removed at the end.

    Raises:
        WorkerLostError: if a worker is lost, and ``on_worker_loss="raise"`` or it is rank 0's process alone that is left.
        DistoptError: what the server raises.
    """
    _warm(job)
    last = Checkpoint(np.zeros(len(job.y)) if alpha is None else alpha)
    if file is not None:
        last = file.load() or last

    def keep(state: Checkpoint) -> None:
        nonlocal last
        last = state
        if file is not None:
            file.save(state)

    while True:
        try:
            found = _Generation(job, job.configure(workers), last, on_row, keep).run()
        except WorkerLostError as lost:
            if job.on_worker_loss == "raise" or workers == 1:
                raise
            workers -= 1
            warnings.warn(f"{lost} Going on from round {last.rounds} with {workers} workers.", stacklevel=2)
            continue
        if file is not None:
            file.remove()
        return found


def _warm(job: Job) -> None:
    """Compile, or load, here what the children will use, rather than in each of them."""
    few = job.x[:2]
    shard = make_shard(few, job.y[:2], job.loss, 1.0, 1.0, job.weight[:2], job.bias)
    alpha, m = np.zeros(few.shape[0]), np.zeros(shard.dim)
    shard.draws(alpha, m, 1.0, 0, 0, 0, 2)
    shard.contribution(alpha)
    kernels.begin(m, m.copy(), 1.0, m.copy(), m)
    kernels.end(m, m.copy(), 1.0, m.copy())
    shard.primal_sum(m)
    shard.dual_sum(alpha)


class _Generation:
    """One start of K processes."""

    def __init__(
        self,
        job: Job,
        config: Config,
        start: Checkpoint,
        on_row: Callable[[Row], None],
        keep: Callable[[Checkpoint], None],
    ) -> None:
        self.job, self.config, self.start, self.on_row, self.keep = job, config, start, on_row, keep
        self.rows = parts(len(job.y), config.workers, config.seed)
        self.alpha = start.alpha.copy()
        self.rounds = 0
        self.last: Row | None = None

    def run(self) -> tuple[Array, Array, Certificate]:
        # A child of a process with a process group of its own would inherit it.
        fork = sys.platform == "linux" and not dist.is_initialized()
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        with tempfile.TemporaryDirectory(prefix="distopt-") as name:
            folder = Path(name)
            ours, theirs = context.Pipe(duplex=False)
            job = replace(self.job, configure=_Fixed(self.config))
            processes = [
                context.Process(
                    target=_child,
                    args=(job, self.config, k, self.rows[k], start, folder, theirs),
                    daemon=True,
                )
                for k, start in enumerate(self.start.starts(self.rows))
            ]
            try:
                for process in processes:
                    process.start()
                theirs.close()
                return self._watched(processes, ours, folder)
            finally:
                for process in processes:
                    if process.is_alive():
                        process.kill()
                    if process.pid is not None:
                        process.join()
                ours.close()

    def _watched(self, processes: list[Any], pipe: Connection, folder: Path) -> tuple[Array, Array, Certificate]:
        heard, patience = time.monotonic(), max(_START, self.job.timeout)
        while True:
            ready = wait([pipe, *(process.sentinel for process in processes if process.exitcode is None)], timeout=1.0)
            if pipe in ready:
                try:
                    what, content = pipe.recv()
                except EOFError:
                    what, content = "silence", None
                if what == "done":
                    for process in processes:
                        process.join(timeout=5.0)
                    model, certificate = content
                    return model, self._gathered(folder, "final"), certificate
                self._heard(what, content, folder)
                if what != "silence":
                    heard, patience = time.monotonic(), self.job.timeout if what != "started" else patience
                    continue
            ended = [k for k, process in enumerate(processes) if process.exitcode not in (None, 0)]
            if ended:
                raise self._lost(ended, processes, folder)
            if time.monotonic() - heard > patience:
                raise self._error(0, f"its server has shown no life for {patience:g} s")

    def _heard(self, what: str, content: Any, folder: Path) -> None:
        if what == "row":
            self.last = _later(content, self.start)
            self.rounds = content.rounds
            self.on_row(self.last)
        elif what == "checkpoint" and self.last is not None:
            at = self.last
            alpha = self._gathered(folder, f"kept.{content}")
            self.keep(
                Checkpoint(alpha, at.rounds, at.seconds, at.bytes_up, at.bytes_down, *self._path(folder, content))
            )
            for path in folder.glob(f"kept.{content}.*"):
                path.unlink()
        elif what == "error":
            raise content

    def _path(self, folder: Path, version: int) -> tuple[float, NDArray[np.int64], Array]:
        """Return what makes the path the same: sigma, samples drawn, model; nothing of them where residuals were left."""
        if not (folder / f"kept.{version}.model.npy").exists():
            return 0.0, np.empty(0, np.int64), np.empty(0)
        each = [np.load(folder / f"kept.{version}.path.{k}.npy", allow_pickle=False) for k in range(len(self.rows))]
        model = np.load(folder / f"kept.{version}.model.npy", allow_pickle=False)
        return float(each[0][0]), np.array([int(path[1]) for path in each]), model

    def _gathered(self, folder: Path, name: str) -> Array:
        for k, rows in enumerate(self.rows):
            self.alpha[rows] = np.load(folder / f"{name}.{k}.npy", allow_pickle=False)
        return self.alpha.copy()

    def _lost(self, ended: list[int], processes: list[Any], folder: Path) -> WorkerLostError:
        # The first that wrote why, or else one that was killed: those whose neighbour is gone fail after it.
        if (folder / "diverged").exists():
            raise CertificateError((folder / "diverged").read_text())
        killed = [k for k in ended if processes[k].exitcode < 0]
        k = (killed or ended)[0]
        code = processes[k].exitcode
        path = folder / f"{k}.error"
        why = path.read_text().strip().splitlines()[-1] if path.exists() else ""
        if code < 0:
            why = f"its process was ended by {signal.Signals(-code).name}"
        return self._error(k, why or f"its process ended with code {code}")

    def _error(self, worker: int, why: str) -> WorkerLostError:
        return WorkerLostError(
            f"Worker {worker} of {self.config.workers} is lost after {self.start.rounds + self.rounds} rounds: {why}. Use "
            "`on_worker_loss='redistribute'` to go on with the others, or `checkpoint=<folder>` to go on later.",
            worker,
            self.start.rounds + self.rounds,
        )


@dataclass(frozen=True)
class _Fixed:
    """Settings that a child gets as they are."""

    config: Config

    def __call__(self, workers: int) -> Config:
        return self.config


def _later(row: Row, start: Checkpoint) -> Row:
    return replace(
        row, seconds=row.seconds + start.seconds, rounds=row.rounds + start.rounds, bytes_up=row.bytes_up + start.bytes_up,
        bytes_down=row.bytes_down + start.bytes_down,
    )  # fmt: skip


def _child(
    job: Job, config: Config, k: int, rows: NDArray[np.int64], start: Start, folder: Path, pipe: Connection
) -> None:
    """Be rank k: take part, leave the dual variables in the folder, and end."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
        torch.set_num_threads(1)  # a forked child inherits the pool of threads without the threads in it
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        _take_part(job, config, k, rows, start, folder, pipe)
        code = 0
    except BaseException as error:
        if isinstance(error, CertificateError):  # no fault of this worker: it is raised as it is
            (folder / "diverged").write_text(str(error))
        part = folder / f"{k}.part"
        part.write_text(traceback.format_exc())
        part.rename(folder / f"{k}.error")
        if k == 0:
            _tell(pipe, "error", error)
    finally:
        os._exit(code)


def _take_part(
    job: Job, config: Config, k: int, rows: NDArray[np.int64], start: Start, folder: Path, pipe: Connection
) -> None:
    store = dist.FileStore(str(folder / "store"), config.workers)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=k, world_size=config.workers, timeout=_LONGEST_WAIT)
    total = float(job.weight.sum())
    shard = make_shard(job.x, job.y, job.loss, job.lam, total, job.weight, job.bias, rows)
    told = [0.0]

    def look() -> None:
        if time.monotonic() - told[0] > 0.25 * min(4.0, job.timeout):
            told[0] = time.monotonic()
            _tell(pipe, "alive", None)

    def keep(version: int, worker: Worker) -> None:
        save_array(folder / f"kept.{version}.{k}.npy", worker.alpha)
        if worker.settled:
            save_array(folder / f"kept.{version}.path.{k}.npy", np.array([worker.sigma, worker.drawn]))
            if k == 0:
                save_array(folder / f"kept.{version}.model.npy", worker.model)

    hooks = Hooks(
        on_row=lambda row: _tell(pipe, "row", row),
        on_checkpoint=lambda version, _: _tell(pipe, "checkpoint", version),
        keep=keep,
        on_look=look,
        checkpoint_every=job.checkpoint_every,
    )
    place = Rank(k, config.workers, store=store, timeout=job.timeout, dismiss=False)
    model, mine, server = run_rank(shard, config, place, hooks, start)
    save_array(folder / f"final.{k}.npy", mine)
    dist.barrier()
    if server is not None:
        assert server.certificate is not None
        _tell(pipe, "done", (model, server.certificate))


def _tell(pipe: Connection, what: str, content: Any) -> None:
    pipe.send((what, content))
