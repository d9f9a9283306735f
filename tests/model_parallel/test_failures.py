"""A neighbour that dies, hangs or is slow: one typed error within the time-out, and processes that end."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_distopt.errors import PipelineError
from lightning_distopt.exchange import Meter
from lightning_distopt.model_parallel import StalenessPlan, simulate
from lightning_distopt.model_parallel.block import Block
from lightning_distopt.model_parallel.connect import connect, settle
from lightning_distopt.model_parallel.stage import Stage
from lightning_distopt.model_parallel.worker import Worker, deposit
from tests.model_parallel.models import batches_of, blocks
from tests.model_parallel.survivors import run_survivors
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LOSS = nn.functional.cross_entropy
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def worker_of(rank: int, plan: StalenessPlan, timeout: float = 20.0) -> Worker:
    """Return one rank's worker, with channels to its neighbours."""
    block = Block({str(rank): blocks(plan.stages)[rank]})
    stage = Stage(rank, plan, block, (lambda y, t: (LOSS(y, t), {})) if rank == plan.stages - 1 else None)
    return Worker(plan, {rank: stage}, connect(plan, range(plan.stages), rank, Meter(), timeout, CPU))


def _train(rank: int, world: int, plan: StalenessPlan) -> Any:
    worker = worker_of(rank, plan)
    optimizer = SGD(worker.stages[rank].block.parameters())
    losses: dict[int, float] = {}

    def tick(batch: Any) -> None:
        found = worker.run_tick(batch)
        losses.update({b: float(f["loss"]) for b, f in found.figures.items()})
        if found.updates is not None:
            deposit(found.updates)
            optimizer.step()
            optimizer.zero_grad()
            worker.updated()

    for batch in batches_of(12):
        tick(batch if rank == 0 else None)
    for _ in range(worker.drain_ticks()):
        tick(None)
    settle(worker.hops)
    return [p.detach() for p in worker.stages[rank].block.parameters()], [losses[b] for b in range(12)]


@pytest.mark.parametrize("name", ["naive", "pipedream", "dsp", "dsp(2,2,0;6,3,0)"])
def test_processes_without_lightning_are_the_simulation(name: str) -> None:
    plan = StalenessPlan.preset(name, 3)
    modules = blocks(3)
    losses = simulate(modules, LOSS, batches_of(12), plan, SGD)
    for rank, (weights, seen) in enumerate(run_ranks(3, _train, plan)):
        assert all(map(torch.equal, weights, modules[rank].parameters()))
        assert seen == losses


def _one_goes_wrong(rank: int, world: int, how: str) -> Any:
    worker = worker_of(rank, StalenessPlan.preset("dsp", world), timeout=1.0)
    batch = next(batches_of(1))
    start = time.monotonic()
    try:
        for tick in range(50):
            if rank == 1 and tick == 5:
                if how == "dies":
                    os._exit(0)
                start = time.monotonic()
                time.sleep(3.0 if how == "hangs" else 1.6)
            found = worker.run_tick(batch if rank == 0 else None)
            start = time.monotonic()
            if found.updates is not None:
                worker.updated()
    except PipelineError as error:
        return error.stage, error.peer, error.batch, time.monotonic() - start, str(error)
    return None


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_neighbours_of_a_lost_stage_say_so_in_time_and_end(how: str) -> None:
    begin = time.monotonic()
    first, middle, last = run_survivors(3, _one_goes_wrong, how)
    assert time.monotonic() - begin < 12.0
    assert middle is None or how == "hangs"
    for found, stage in ((first, 0), (last, 2)):
        assert found is not None
        assert found[:2] == (stage, 1)
        assert 0 <= found[2] < 12
        assert found[3] < 2.0
        assert f"Stage {stage} on rank {stage} could not" in found[4]
        assert "rank 1" in found[4]
