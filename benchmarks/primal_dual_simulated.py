"""The virtual clock: stragglers, and 64 and 256 workers, to a gap of 1e-4."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import primal_dual_problems as problems
from lightning_distopt.primal_dual import Cluster, Config, Server, preset, shards_of, simulate

Array = NDArray[np.float64]

SCENARIOS: dict[str, Callable[[int, int], Cluster]] = {
    "one worker 10 x slower, free network": lambda k, d: Cluster.straggler(k, 10.0),
    "one worker 10 x slower, a dense message costs 5": lambda k, d: Cluster.straggler(k, 10.0, bandwidth=8 * d / 5),
    "10 % of solves 10 x slower, free network": lambda k, d: Cluster(slow_probability=0.1),
    "10 % of solves 10 x slower, a dense message costs 5": lambda k, d: Cluster(
        slow_probability=0.1, bandwidth=8 * d / 5
    ),
    "no straggler, a dense message costs 20": lambda k, d: Cluster(bandwidth=8 * d / 20),
}


def methods(workers: int, local_steps: int | None) -> dict[str, Config]:
    """What the simulated tables compare."""
    common: dict[str, Any] = {"tol": 0.0, "local_steps": local_steps, "max_rounds": 600, "downlink": "assign"}
    half = max(1, workers // 2)
    return {
        "CoCoA+": preset("cocoa_plus", workers, **common),
        "ACPD T=10": preset("acpd", workers, group_size=half, **common),
        "ACPD T=30": preset("acpd", workers, group_size=half, sync_period=30, **common),
        "ACPD T=10, no flush": preset("acpd", workers, group_size=half, flush_every=0, **common),
        "ACPD T=10, top-k down": preset("acpd", workers, group_size=half, **{**common, "downlink": "topk"}),
        "top entries of all": preset("acpd", workers, group_size=workers, sync_period=1, flush_every=0, **common),
    }


def simulated(given: argparse.Namespace) -> None:
    """Virtual time to a gap of 1e-4: the specification's straggler table, then 64 and 256 workers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 500)) * (rng.random((2000, 500)) < 0.05)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    y = np.where(x @ rng.standard_normal(500) + 0.1 * rng.standard_normal(2000) > 0, 1.0, -1.0)
    _simulated("Gaussian 2000x500", x, y, 8, 250)
    for workers in given.simulated_workers:
        wide, signs = problems.generated(100 * workers, 5000, 50)
        _simulated(f"generated {100 * workers}x5000", wide, signs, workers, None)


def _simulated(name: str, x: Any, y: Array, workers: int, local_steps: int | None) -> None:
    shards = shards_of(x, y, workers, loss="smoothed_hinge", lam=1e-2)
    for scenario, cluster in SCENARIOS.items():
        for method, config in methods(workers, local_steps).items():
            common = {
                "study": "simulated",
                "data": name,
                "loss": "smoothed_hinge",
                "method": method,
                "setting": scenario,
            }
            if problems.RESULTS.find(**common):
                continue
            with _served() as spent:
                run = simulate(shards, config.but(tol=problems.TOL), cluster(workers, shards[0].dim))
            each = 1e3 * spent[0] / run.server.version
            per_byte = 1e9 * spent[0] / max(1, run.server.meter.bytes_received)
            last = problems.reached(run.history)
            if last is None:
                problems.row(**common, seconds="inf", extra=f"gap {run.history[-1].gap:.1e}")
                continue
            problems.row(
                **common, seconds=f"{last.seconds:.1f}", rounds=last.rounds, bytes_up=last.bytes_up, bytes_down=last.bytes_down,
                extra=f"{workers} workers, server {each:.2f} ms a round, {per_byte:.2f} ns a byte received",
            )  # fmt: skip


@contextmanager
def _served() -> Iterator[list[float]]:
    """Measure the real time that the server's state machine takes."""
    whole, spent = Server.receive, [0.0]

    def receive(self: Server, worker: int, message: Any) -> Any:
        start = time.perf_counter()
        try:
            return whole(self, worker, message)
        finally:
            spent[0] += time.perf_counter() - start

    Server.receive = receive  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Server.receive = whole  # type: ignore[method-assign]
