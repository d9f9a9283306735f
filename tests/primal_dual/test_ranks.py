"""Real processes over Gloo: the simulator's iterates, every byte counted, and no dead-lock for any group size."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from lightning_distopt.errors import ProtocolError, WorkerLostError
from lightning_distopt.primal_dual import Cluster, Config, preset, shards_of, simulate
from lightning_distopt.primal_dual.messages import Kind, Message
from lightning_distopt.primal_dual.ranks import Hooks, Rank, run_rank
from lightning_distopt.primal_dual.transport import Endpoint
from tests.primal_dual.problems import sparse_problem
from tests.ranks import run_ranks

WORLD = 3


def shards(workers: int) -> Any:
    x, y = sparse_problem("logistic", 120, 60)
    return shards_of(x, y, workers, lam=1e-2, bias=True)


def solved(rank: int, world: int, configs: list[Config], scripts: list[list[int]], serves_only: bool) -> Any:
    workers = world - serves_only
    mine = shards(workers)[max(0, rank - serves_only)]
    results = []
    for run, (config, script) in enumerate(zip(configs, scripts, strict=True)):
        place = Rank(
            rank, world, run=run, server_works=not serves_only, store=dist.distributed_c10d._get_default_store()
        )
        model, alpha, server = run_rank(mine, config, place, Hooks(script=script))
        row = (
            None
            if server is None
            else (dict(server.meter.received), dict(server.meter.sent), server.history[-1].rounds)
        )
        results.append((model, alpha, row))
    return results


def test_processes_follow_the_simulator_bit_for_bit() -> None:
    configs = [
        preset("acpd", WORLD, group_size=group, density=0.1, tol=1e-4, sync_period=4, downlink=downlink)
        for group, downlink in ((1, "assign"), (2, "topk"), (3, "assign"))
    ] + [preset("cocoa_plus", WORLD, tol=1e-4)]
    runs = [simulate(shards(WORLD), config, Cluster(slow_probability=0.3, seed=3)) for config in configs]
    found = run_ranks(WORLD, solved, configs, [run.order for run in runs], False)
    for i, run in enumerate(runs):
        for rank in range(WORLD):
            np.testing.assert_array_equal(found[rank][i][0], run.model)
            np.testing.assert_array_equal(found[rank][i][1], run.alphas[rank])
        received, sent, rounds = found[0][i][2]
        assert (received, sent) == (dict(run.server.meter.received), dict(run.server.meter.sent))
        assert rounds == run.server.version


def test_arrivals_in_their_own_order_reach_the_gap_for_every_group_size() -> None:
    configs = [preset("acpd", WORLD, group_size=group, density=0.5, tol=1e-4) for group in (1, 2, 3)]
    found = run_ranks(WORLD, solved, configs, [[]] * 3, False)
    best = simulate(shards(WORLD), preset("cocoa_plus", WORLD, tol=1e-12)).model
    for i in range(3):
        for rank in range(WORLD):
            np.testing.assert_allclose(found[rank][i][0], best, atol=0.1)
            np.testing.assert_array_equal(found[rank][i][0], found[0][i][0])


def test_a_rank_that_only_serves_does_not_count() -> None:
    config = preset("acpd", WORLD - 1, density=0.1, tol=1e-5)
    run = simulate(shards(WORLD - 1), config)
    found = run_ranks(WORLD, solved, [config], [run.order], True)
    np.testing.assert_array_equal(found[0][0][0], run.model)
    np.testing.assert_array_equal(found[2][0][0], run.model)


def counted(rank: int, world: int) -> Any:
    endpoint = Endpoint(None, 0, 10)
    messages = [
        Message(Kind.UPDATE, 1, np.array([2, 5], np.int32), np.ones(2)),
        Message(Kind.RESIDUAL, 2, None, np.arange(10.0), np.ones(3), "flush"),
        Message(Kind.LOSSES, 3, scalars=np.ones(1), purpose="certificate"),
    ]
    if rank:
        for message in messages:
            endpoint.send(message, 0)
    else:
        for wanted in messages:
            source, message = endpoint.receive()
            assert source == 1
            assert (message.kind, message.version, message.purpose) == (wanted.kind, wanted.version, wanted.purpose)
            np.testing.assert_array_equal(message.values, wanted.values)
            assert (message.indices is None) == (wanted.indices is None)
            np.testing.assert_array_equal(message.scalars, wanted.scalars)
    return endpoint.sent, endpoint.received, sum(message.nbytes for message in messages)


def test_bytes_are_those_of_the_tensors_handed_over() -> None:
    (_, received, whole), (sent, _, _) = run_ranks(2, counted)
    assert sent == received == whole


def lying(rank: int, world: int, how: str) -> Any:
    mine = shards(world)[rank]
    config = preset("acpd", world, density=0.1, tol=0.0, max_rounds=1000)
    place = Rank(rank, world, run=4, timeout=2.0, store=dist.distributed_c10d._get_default_store())
    if rank != 1:
        try:
            run_rank(mine, config, place)
        except (WorkerLostError, ProtocolError) as error:
            return type(error).__name__, str(error), getattr(error, "worker", None)
        raise AssertionError("nothing was noticed")
    endpoint = Endpoint(None, 99 if how == "run" else 4, mine.dim)
    endpoint.send(Message(Kind.UPDATE), 0)
    with contextlib.suppress(RuntimeError):
        endpoint.receive(0)
    return None


@pytest.mark.parametrize(("how", "says"), [("run", "of run 99, this is 4"), ("update", "HELLO was expected")])
def test_a_malformed_message_ends_the_run_on_all_ranks(how: str, says: str) -> None:
    found = run_ranks(WORLD, lying, how)
    kind, text, worker = found[0]
    assert (kind, worker) == ("WorkerLostError", 1)
    assert says in text
    assert found[2][0] == "ProtocolError"
    assert "server ended the run" in found[2][1]
