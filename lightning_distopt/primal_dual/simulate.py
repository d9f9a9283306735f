"""A run in one process, with time on a virtual clock: the same server and workers, only arrivals are computed.

    queue of (time, worker, message), ordered by (time, worker)
    start worker k at s:   its answer is computed now; it arrives at s + down + compute_k + up
    compute_k            = seconds * speed_k * (slow with probability p, else 1)
    up, down             = latency + bytes / bandwidth, of the bytes that the real message has

Random times come from a generator of their own, so another network does not change the order of the samples. What only
certificates need travels free unless ``charge_certificates``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.primal_dual.certificate import Certificate, Row
from lightning_distopt.primal_dual.config import Config
from lightning_distopt.primal_dual.messages import Kind, Message
from lightning_distopt.primal_dual.server import Server
from lightning_distopt.primal_dual.shard import Shard
from lightning_distopt.primal_dual.worker import Worker

__all__ = ["Cluster", "Simulation", "simulate"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cluster:
    """How fast everything is.

    Attributes:
        seconds: of one local solve on a worker of speed 1.
        speeds: factor of each worker, above 1 is slower; empty is 1 for all.
        slow_probability: of a local solve that takes ``slow_factor`` times as long.
        slow_factor: see there.
        latency: seconds of every message.
        bandwidth: bytes a second of every link, to the server; ``inf`` is free.
        down_bandwidth: from the server; ``None`` is the same.
        server_seconds: of every group that the server completes.
        shared_server_link: transfers to (and from) the server go one after another.
        charge_certificates: what only certificates need takes time too.
        seed: of the slow solves.
    """

    seconds: float = 1.0
    speeds: tuple[float, ...] = ()
    slow_probability: float = 0.0
    slow_factor: float = 10.0
    latency: float = 0.0
    bandwidth: float = float("inf")
    down_bandwidth: float | None = None
    server_seconds: float = 0.0
    shared_server_link: bool = False
    charge_certificates: bool = False
    seed: int = 0

    @classmethod
    def straggler(cls, workers: int, factor: float, slow: Sequence[int] = (0,), **others: float) -> Cluster:
        """Return a cluster in which the workers ``slow`` take ``factor`` times as long, always."""
        return cls(speeds=tuple(factor if k in slow else 1.0 for k in range(workers)), **others)  # type: ignore[arg-type]


@dataclass
class Simulation:
    """What a run left.

    Attributes:
        model: w, which is v(alpha).
        alphas: dual variables of each worker.
        certificate: at the end.
        history: one row a certificate, seconds of the virtual clock.
        order: workers in the order in which their messages arrived: replaying it on real processes gives the same iterates.
        waiting: seconds that each worker waited between its message's arrival and the answer.
        server: with its meter.
    """

    model: Array
    alphas: list[Array]
    certificate: Certificate
    history: list[Row]
    order: list[int]
    waiting: list[float]
    server: Server = field(repr=False)


@dataclass(order=True)
class _Arrival:
    time: float
    worker: int
    sent: bool  # whether a shared link has carried it already
    message: Message = field(compare=False)


Watch = Callable[[Server, "list[Worker]", "list[Message]"], None]


def simulate(
    shards: Sequence[Shard],
    config: Config,
    cluster: Cluster | None = None,
    alphas: Sequence[Array] | None = None,
    watch: Watch | None = None,
    script: Sequence[int] | None = None,
) -> Simulation:
    """Run to the end and return what it left.

    Args:
        shards: one a worker.
        config: of the run; ``config.workers`` is their number.
        cluster: how fast everything is; ``None`` is equal workers and a free network.
        alphas: dual variables to start from.
        watch: called as ``watch(server, workers, in_flight)`` after every event; ``in_flight`` are the messages whose values
            have left a residual and have not reached the model.
        script: arrivals in this order (of workers) instead of by time; where it ends, time goes on to decide.

    Raises:
        ValueError: if the numbers of shards and workers differ.
        CertificateError: if the run diverges.
    """
    if len(shards) != config.workers:
        raise ValueError(f"`shards` must be one a worker: got {len(shards)} for `workers={config.workers}`.")
    return _Run(shards, config, cluster or Cluster(), alphas, watch, script).to_the_end()


class _Run:
    def __init__(
        self,
        shards: Sequence[Shard],
        config: Config,
        cluster: Cluster,
        alphas: Sequence[Array] | None,
        watch: Watch | None,
        script: Sequence[int] | None,
    ) -> None:
        self.cluster, self.watch = cluster, watch
        self.now = 0.0
        self.workers = [Worker(s, config, k, None if alphas is None else alphas[k]) for k, s in enumerate(shards)]
        first = shards[0]
        self.server = Server(config, first.dim, first.lam, first.total, clock=lambda: self.now)
        self.random = np.random.default_rng(cluster.seed)
        self.queue: list[_Arrival] = []
        self.order: list[int] = []
        self.script = list(script or [])[::-1]
        self.waiting = [0.0] * config.workers
        self.arrived = [0.0] * config.workers
        self.up_free = self.down_free = 0.0

    def to_the_end(self) -> Simulation:
        for k, worker in enumerate(self.workers):
            heapq.heappush(self.queue, _Arrival(0.0, k, True, worker.hello()))
        while not self.server.finished:
            self._next()
        assert self.server.certificate is not None
        return Simulation(
            self.server.model, [worker.alpha for worker in self.workers], self.server.certificate, self.server.history,
            self.order, self.waiting, self.server,
        )  # fmt: skip

    def _next(self) -> None:
        arrival = self._pop()
        if not arrival.sent:
            start = max(arrival.time, self.up_free)
            self.up_free = start + self._carried(arrival.message, self.cluster.bandwidth)
            heapq.heappush(
                self.queue, _Arrival(self.up_free + self.cluster.latency, arrival.worker, True, arrival.message)
            )
            return
        self.now = max(self.now, arrival.time)
        self.arrived[arrival.worker] = self.now
        self.order.append(arrival.worker)
        answers = self.server.receive(arrival.worker, arrival.message)
        if answers:
            self.now += self.cluster.server_seconds
        for k, message in answers:
            self.waiting[k] += self.now - self.arrived[k]
            self._start(k, message)
        if self.watch is not None:
            flying = [a.message for a in self.queue] + list(self.server.inbox.values())
            self.watch(self.server, self.workers, [m for m in flying if m.kind is Kind.UPDATE or _is_flush(m)])

    def _pop(self) -> _Arrival:
        if not self.script:
            return heapq.heappop(self.queue)
        wanted = self.script.pop()
        found = next((a for a in self.queue if a.worker == wanted), None)
        if found is None:
            raise ValueError(f"`script` must name a worker whose message is under way: got {wanted}.")
        self.queue.remove(found)
        heapq.heapify(self.queue)
        found.sent = True
        return found

    def _start(self, k: int, message: Message) -> None:
        at, down = self.now, self.cluster.down_bandwidth or self.cluster.bandwidth
        if self.cluster.shared_server_link:
            at = self.down_free = max(self.now, self.down_free) + self._carried(message, down)
            at += self.cluster.latency if self._charged(message) else 0.0
        elif self._charged(message):
            at += self.cluster.latency + self._carried(message, down)
        answer = self.workers[k].handle(message)
        if answer is None:
            return
        if answer.kind is Kind.UPDATE:
            at += self._solve_seconds(k)
        alone = not self.cluster.shared_server_link
        if alone and self._charged(answer):
            at += self.cluster.latency + self._carried(answer, self.cluster.bandwidth)
        heapq.heappush(self.queue, _Arrival(at, k, alone or not self._charged(answer), answer))

    def _solve_seconds(self, k: int) -> float:
        slow = self.cluster.slow_probability > 0 and self.random.random() < self.cluster.slow_probability
        speed = self.cluster.speeds[k] if self.cluster.speeds else 1.0
        return self.cluster.seconds * speed * (self.cluster.slow_factor if slow else 1.0)

    def _charged(self, message: Message) -> bool:
        if message.purpose == "setup":
            return False
        return message.purpose != "certificate" or self.cluster.charge_certificates

    def _carried(self, message: Message, bandwidth: float) -> float:
        return message.nbytes / bandwidth if self._charged(message) else 0.0


def _is_flush(message: Message) -> bool:
    return message.kind is Kind.RESIDUAL and message.purpose == "flush"
