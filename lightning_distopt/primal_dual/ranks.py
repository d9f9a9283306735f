"""One rank of a real run: rank 0 serves from a thread of its own and works too, the others work.

    rank 0:  receiver thread ──┐
             its own worker ───┴─> inbox ──> Server.receive ──> answers: sent, or put before its own worker
    rank k:  send ──> receive ──> Worker.handle ──> send ...

The receiver waits on the network only while a worker owes a message, so nothing is left posted at the end. The server looks
up from its inbox now and then: every worker writes a beat into the store; whose beats stop is lost.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from lightning_distopt.errors import ProtocolError, WorkerLostError
from lightning_distopt.exchange.notes import Store, shared_store
from lightning_distopt.primal_dual.certificate import Certificate, Row
from lightning_distopt.primal_dual.checkpoints import Start
from lightning_distopt.primal_dual.config import Config
from lightning_distopt.primal_dual.messages import Kind, Message
from lightning_distopt.primal_dual.server import Server
from lightning_distopt.primal_dual.shard import Shard
from lightning_distopt.primal_dual.transport import Endpoint
from lightning_distopt.primal_dual.worker import Keep, Worker

__all__ = ["Hooks", "Rank", "run_rank"]

Array = NDArray[np.float64]
_LOOK = 0.5  # seconds between two looks at who is alive
_PREFIX = "lightning_distopt/primal_dual"


@dataclass(frozen=True)
class Rank:
    """Where this process stands.

    Attributes:
        rank: of this process in ``group``; 0 serves.
        world: ranks in the group.
        group: a Gloo group; ``None`` is the default group.
        store: for beats; ``None`` does without: then only the group's time-out finds who hangs.
        run: a number that all ranks of the run share.
        server_works: whether rank 0 has a shard too; otherwise rank k is worker k - 1.
        timeout: seconds without a beat after which a worker is lost.
        dismiss: after an error, tell the workers, instead of leaving that to whoever started them.
    """

    rank: int
    world: int
    group: dist.ProcessGroup | None = None
    store: Store | None = None
    run: int = 0
    server_works: bool = True
    timeout: float = 30.0
    dismiss: bool = True


@dataclass(frozen=True)
class Hooks:
    """Who is told what.

    Attributes:
        on_row: every row of the history, at rank 0.
        on_checkpoint: a version and its certificate, at rank 0, once all workers have kept their part.
        keep: the worker that is to keep its part, at every rank.
        on_look: called by rank 0 now and then while it serves.
        checkpoint_every: certified synchronisations between checkpoints; 0 is none.
        script: arrivals are handed to the server in this order of workers; where it ends, as they come.
    """

    on_row: Callable[[Row], None] | None = None
    on_checkpoint: Callable[[int, Certificate], None] | None = None
    keep: Keep | None = None
    on_look: Callable[[], None] | None = None
    checkpoint_every: int = 0
    script: Sequence[int] = field(default_factory=tuple)


def run_rank(
    shard: Shard, config: Config, rank: Rank, hooks: Hooks | None = None, start: Start | None = None
) -> tuple[Array, Array, Server | None]:
    """Take part in a run to its end; return ``(model, alpha, server)``, the last only at rank 0.

    Args:
        shard: of this rank; a rank 0 that only serves looks at its width and problem, not at its samples.
        config: alike on all ranks; ``config.workers`` counts those that work.
        rank: see there.
        hooks: see there.
        start: where to begin; ``None`` is at 0.

    Raises:
        ValueError: if ``config.workers`` is not the number of ranks that work.
        WorkerLostError: at rank 0, naming the worker that is lost.
        ProtocolError: at rank 0, for a message that cannot be used; at the others, if the server ends the run.
        CertificateError: at rank 0, if the run diverges.
    """
    hooks = hooks or Hooks()
    expected = rank.world if rank.server_works else rank.world - 1
    if config.workers != expected:
        raise ValueError(f"`n_workers` must be the number of ranks that work: got {config.workers} for {expected}.")
    number = rank.rank if rank.server_works else rank.rank - 1
    beats = _Beats(rank)
    with beats:
        endpoint = Endpoint(rank.group, rank.run, shard.dim)
        if rank.rank == 0:
            return _serve(shard, config, rank, hooks, start, endpoint, beats)
        worker = Worker(shard, config, number, start=start, keep=hooks.keep)
        endpoint.send(worker.hello(), 0)
        while True:
            _, message = endpoint.receive(0)
            answer = worker.handle(message)
            if answer is None:
                return worker.model, worker.alpha, None
            endpoint.send(answer, 0)


def _serve(
    shard: Shard, config: Config, rank: Rank, hooks: Hooks, start: Start | None, endpoint: Endpoint, beats: _Beats
) -> tuple[Array, Array, Server]:
    server = Server(
        config, shard.dim, shard.lam, shard.total, on_row=hooks.on_row, checkpoint_every=hooks.checkpoint_every,
        on_checkpoint=hooks.on_checkpoint, start=start,
    )  # fmt: skip
    desk = _Desk(server, rank, hooks, endpoint, beats)
    if not rank.server_works:
        desk.run()
        if desk.error is not None:
            raise desk.error
        return server.model, np.zeros(0), server
    thread = threading.Thread(target=desk.run, name="distopt-server", daemon=True)
    thread.start()
    worker = Worker(shard, config, 0, start=start, keep=hooks.keep)
    answer: Message | None = worker.hello()
    try:
        while answer is not None:
            desk.inbox.put((0, answer))
            message = desk.own.get()
            if message is None:
                break
            answer = worker.handle(message)
    except BaseException as error:
        desk.inbox.put((0, error))
        thread.join(timeout=rank.timeout)
        raise
    thread.join()
    if desk.error is not None:
        raise desk.error
    return worker.model, worker.alpha, server


class _Desk:
    """The server's thread: takes from the inbox, hands to the state machine, sends what that returns."""

    def __init__(self, server: Server, rank: Rank, hooks: Hooks, endpoint: Endpoint, beats: _Beats) -> None:
        self.server, self.rank, self.hooks, self.endpoint, self.beats = server, rank, hooks, endpoint, beats
        self.inbox: queue.Queue[tuple[int, Message | BaseException]] = queue.Queue()
        self.own: queue.Queue[Message | None] = queue.Queue()
        self.error: BaseException | None = None
        self._owed = threading.Semaphore(0)
        self._ended = False
        self._liar: int | None = None
        self._script = list(hooks.script)[::-1]
        self._held: dict[int, Message] = {}
        self._first = 0 if rank.server_works else 1

    def run(self) -> None:
        receiver = threading.Thread(target=self._receive, name="distopt-receiver", daemon=True)
        receiver.start()
        for _ in range(self.rank.world - 1):
            self._owed.release()
        try:
            self.beats.watch(range(1, self.rank.world))
            while not self.server.finished:
                self._next()
        except BaseException as error:
            self.error = error
            if self.rank.dismiss:
                with contextlib.suppress(Exception):
                    self._dismiss()
        self._ended = True
        self._owed.release()
        self.own.put(None)

    def _receive(self) -> None:
        while True:
            self._owed.acquire()
            if self._ended:
                return
            try:
                source, message = self.endpoint.receive()
                self.inbox.put((source - self._first, message))
            except ProtocolError as error:
                self.inbox.put((error.worker - self._first, error))
            except RuntimeError as error:
                self.inbox.put((-1, error))
                return

    def _next(self) -> None:
        worker, message = self._taken()
        try:
            answers = self.server.receive(worker, message)
        except ProtocolError as error:
            raise self._failure(worker, error) from error
        for k, answer in answers:
            if self.rank.server_works and k == 0:
                self.own.put(answer)
                continue
            try:
                self.endpoint.send(answer, k + self._first)
            except RuntimeError as error:
                raise self._lost(k, f"it cannot be reached: {_first_line(error)}") from error
            if answer.kind is not Kind.STOP:
                self._owed.release()

    def _taken(self) -> tuple[int, Message]:
        wanted = self._script[-1] if self._script else None
        while True:
            if wanted is not None and wanted in self._held:
                self._script.pop()
                return wanted, self._held.pop(wanted)
            if wanted is None and self._held:
                return self._held.popitem()
            worker, message = self._arrived()
            if isinstance(message, BaseException):
                raise self._failure(worker, message)
            if wanted is None:
                return worker, message
            self._held[worker] = message

    def _arrived(self) -> tuple[int, Message | BaseException]:
        while True:
            if self.hooks.on_look is not None:
                self.hooks.on_look()
            try:
                return self.inbox.get(timeout=_LOOK)
            except queue.Empty:
                silent = self.beats.silent()
                if silent is not None:
                    seconds = f"{self.rank.timeout:g}"
                    raise self._lost(silent - self._first, f"it has shown no life for {seconds} s") from None

    def _failure(self, worker: int, error: BaseException) -> BaseException:
        if isinstance(error, ProtocolError):
            self._liar = worker
            return self._lost(worker, str(error))
        if worker >= 0:
            return error
        silent = [k for k in self.server.waiting_for if k or not self.rank.server_works]
        return self._lost(silent[0] if silent else 0, f"nothing came from workers {silent}: {_first_line(error)}")

    def _lost(self, worker: int, why: str) -> WorkerLostError:
        return WorkerLostError(
            f"Worker {worker} is lost after {self.server.version} rounds: {why}. Use `on_worker_loss='redistribute'` (local "
            "processes), or start again from the checkpoint.",
            worker,
            self.server.version,
        )

    def _dismiss(self) -> None:
        """Tell every worker that still speaks that the run is over; what is lost stays silent."""
        left = set(range(self.server.config.workers)) - ({0} if self.rank.server_works else set())
        over = Message(Kind.ERROR, self.server.version, purpose="setup")
        waiting = [*self.server.inbox, *self._held]
        if isinstance(self.error, WorkerLostError):
            left.discard(self.error.worker)
        if self._liar is not None:  # it speaks, so it listens
            waiting.append(self._liar)
            left.add(self._liar)
        deadline = time.monotonic() + 2 * self.rank.timeout
        while left and time.monotonic() < deadline:
            for k in [k for k in waiting if k in left]:
                left.discard(k)
                self.endpoint.send(over, k + self._first)
            with contextlib.suppress(queue.Empty):
                waiting = [self.inbox.get(timeout=_LOOK)[0]]


class _Beats:
    """A thread that shows life in the store, and the server's look at the others."""

    def __init__(self, rank: Rank) -> None:
        self._rank, self._stop = rank, threading.Event()
        self._store = None if rank.store is None else shared_store(rank.store, f"{_PREFIX}/{rank.run}")
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._thread = threading.Thread(target=self._run, name="distopt-beats", daemon=True)

    def __enter__(self) -> _Beats:
        if self._store is not None and self._rank.rank:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        assert self._store is not None
        beat = 0
        with contextlib.suppress(RuntimeError):  # the store went with the process that kept it
            while not self._stop.is_set():
                beat += 1
                self._store.set(f"beat/{self._rank.rank}", str(beat))
                self._stop.wait(self._rank.timeout / 6)

    def watch(self, ranks: range) -> None:
        """Begin to count the silence of these ranks."""
        self._seen = {rank: (b"", time.monotonic()) for rank in ranks}

    def silent(self) -> int | None:
        """Return a rank whose beats have stopped, if there is one."""
        if self._store is None:
            return None
        now = time.monotonic()
        for rank, (beat, since) in self._seen.items():
            key = f"beat/{rank}"
            found = self._store.get(key) if self._store.check([key]) else b""
            if found != beat:
                self._seen[rank] = (found, now)
            elif now - since > self._rank.timeout:
                return rank
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
