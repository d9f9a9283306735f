"""ACPD against CoCoA+ on hosts whose links are limited, and what no method that sends entries can do there."""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks import primal_dual_problems as problems
from benchmarks.hosts import bits_per_second, enter, network, why_not
from benchmarks.results_file import wait_for_quiet
from lightning_distopt.primal_dual import LOSSES, Config, Row, Worker, preset, shards_of, simulate
from lightning_distopt.primal_dual.messages import Kind, Message
from lightning_distopt.primal_dual.ranks import Hooks, Rank, run_rank
from lightning_distopt.primal_dual.server import Server
from lightning_distopt.primal_dual.split import make_shard, parts
from tests.ranks import run_ranks

Array = NDArray[np.float64]


def candidates(workers: int, rows: int) -> dict[str, Config]:
    """What the study of hosts compares: some settings of each method, so that each is tuned alike."""
    passes = {1: -(-rows // workers), 3: -(-3 * rows // workers)}
    half = max(1, workers // 2)
    found = {f"CoCoA+ H={p}": preset("cocoa_plus", workers, local_steps=h) for p, h in passes.items()}
    for group, period, density in ((workers, 3, 0.05), (workers, 5, 0.02), (workers, 10, 0.05), (half, 10, 0.02)):
        for p in (1, 3):
            found[f"ACPD B={group} T={period} rho={density} H={p}"] = preset(
                "acpd", workers, group_size=group, sync_period=period, density=density, local_steps=passes[p]
            )
    return found


def hosts(given: argparse.Namespace) -> None:
    """ACPD against CoCoA+ on hosts whose links are limited, without stragglers and with random ones."""
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"Hosts cannot be made: {reason}.")
    for text in given.data:
        name, x, y = problems.data_set(text, given)
        for stragglers in (0.0, 0.1):
            setting = f"{given.hosts} hosts, {given.bandwidth}, {stragglers:.0%} of solves 10 x slower, lam={given.lam}"
            with network(given.hosts, bits_per_second(given.bandwidth)) as names:
                for method, config in candidates(given.hosts, len(y)).items():
                    common = {"study": "hosts", "data": name, "loss": given.loss, "method": method, "setting": setting}
                    if problems.RESULTS.find(**common) or (
                        given.only and not any(text in method for text in given.only)
                    ):
                        continue
                    wait_for_quiet(given.patience)
                    job = (
                        x,
                        y,
                        given.loss,
                        given.lam,
                        config.but(tol=problems.TOL, max_rounds=200),
                        stragglers,
                        given.repeats,
                    )
                    runs = run_ranks(
                        given.hosts, _solve, *job, timeout=given.limit, before=functools.partial(enter, names)
                    )[0]
                    _note_hosts([run[0] for run in runs], [run[1] for run in runs], common)


def _note_hosts(histories: list[list[Row]], solves: list[float], common: dict[str, Any]) -> None:
    ends = [problems.reached(history) for history in histories]
    reached = sorted((end for end in ends if end is not None), key=lambda end: end.seconds)
    if len(reached) < len(ends):
        problems.row(**common, seconds="inf", rounds=histories[0][-1].rounds, extra=f"gap {histories[0][-1].gap:.1e}")
        return
    middle = reached[len(reached) // 2]
    told = f"{problems.spread([end.seconds for end in reached])}, a local solve {1e3 * float(np.median(solves)):.2f} ms"
    problems.row(
        **common, seconds=f"{middle.seconds:.4f}", rounds=middle.rounds, bytes_up=middle.bytes_up,
        bytes_down=middle.bytes_down, extra=told,
    )  # fmt: skip


def _solve(
    rank: int, world: int, x: Any, y: Array, loss: str, lam: float, config: Config, stragglers: float, repeats: int
) -> list[tuple[list[Row], float]]:
    rows = parts(len(y), world, config.seed)[rank]
    shard = make_shard(x, y, LOSSES[loss], lam, float(len(y)), rows=rows)
    scratch = np.zeros(shard.dim)  # compiled, and in the cache, before the clock runs
    shard.draws(np.zeros(shard.n), scratch, 1.0, 0, 0, 0, min(10, shard.n))
    shard.primal_sum(scratch)
    spent = _slow_down(stragglers, rank)
    found = []
    for run in range(repeats):
        dist.barrier()
        spent.clear()
        _, _, server = run_rank(shard, config, Rank(rank, world, run=run), Hooks())
        found.append(([] if server is None else server.history, float(np.median(spent))))
    return found


def _slow_down(probability: float, rank: int) -> list[float]:
    """Let some of this process's local solves take ten times as long; return a list that will hold the seconds of each."""
    whole, rng, spent = Worker._update, np.random.default_rng(rank), list[float]()

    def update(self: Worker) -> Any:
        start = time.perf_counter()
        message = whole(self)
        spent.append(time.perf_counter() - start)
        if rng.random() < probability:
            time.sleep(9 * spent[-1])
        return message

    Worker._update = update  # type: ignore[method-assign]
    return spent


def floor(given: argparse.Namespace) -> None:
    """How near to the minimum a model is that has the largest entries of each worker's part of the very solution.

    Whatever a worker sends entry by entry, a model made of so many entries in all is hardly nearer: it is what an oracle would
    send, at 12 bytes an entry. D is that of the solution.
    """
    for text in given.data:
        name, x, y = problems.data_set(text, given)
        setting = f"{given.hosts} workers, lam={given.lam}"
        if problems.RESULTS.find(study="floor", data=name, loss=given.loss, method="density 0.05", setting=setting):
            continue
        shards = shards_of(x, y, given.hosts, loss=given.loss, lam=given.lam)
        run = simulate(shards, preset("cocoa_plus", given.hosts, tol=1e-6, max_rounds=100))
        whole = [shard.contribution(alpha) for shard, alpha in zip(shards, run.alphas, strict=True)]
        for density in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
            model = np.zeros(shards[0].dim)
            for part in whole:
                largest = np.argsort(-np.abs(part))[: int(density * part.size)]
                model[largest] += part[largest]
            total = sum(shard.primal_sum(model) for shard in shards)
            primal = total / len(y) + given.lam / 2 * float(model @ model)
            problems.row(
                study="floor", data=name, loss=given.loss, method=f"density {density}", setting=setting,
                bytes_up=given.hosts * 12 * int(density * model.size), extra=f"gap {primal - run.certificate.dual:.2e}",
            )  # fmt: skip


def server(given: argparse.Namespace) -> None:
    """Seconds that the server takes for a round of a group, its answers included, by the bytes that it receives; no network."""
    for workers in given.simulated_workers:
        for share in (0.001, 0.01, 0.1):
            config = preset("acpd", workers, density=share, sync_period=1000, tol=1e-9, max_rounds=10**6)
            entries, rng = int(share * given.columns), np.random.default_rng(0)
            own = Server(config, given.columns, given.lam, 1.0)
            for worker in range(workers):
                own.receive(worker, Message(Kind.HELLO, 0, None, np.empty(0), np.zeros(3), purpose="setup"))
            group = [
                (np.sort(rng.choice(given.columns, entries, replace=False)).astype(np.int32), rng.standard_normal(entries))
                for _ in range(config.group_size)
            ]  # fmt: skip
            seconds = []
            for version in range(given.repeats + 1):  # the same workers answer in every round
                messages = [Message(Kind.UPDATE, version, places, values) for places, values in group]
                start = time.perf_counter()
                for worker, message in enumerate(messages):
                    own.receive(worker, message)
                seconds.append(time.perf_counter() - start)
            received = sum(message.nbytes for message in messages)
            middle = float(np.median(seconds[1:]))
            problems.row(
                study="server", data=f"{given.columns} coordinates", method=f"{workers} workers, rho={share:g}",
                setting=f"groups of {config.group_size}", seconds=f"{middle:.5f}", bytes_up=received,
                extra=f"{1e9 * middle / received:.2f} ns a byte",
            )  # fmt: skip
