"""What must hold whatever the compressor: the auxiliary point, equal ranks, and plain training where nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.data_parallel.reference import Problem
from tests.data_parallel.replica import SIZE, Replica, config, decaying, flat
from tests.data_parallel.runs import (
    DISTURBED,
    DROPPED_ROW,
    OTHER_ROWS,
    REFERENCE_ROWS,
    STEPS,
    Outcome,
    Row,
    outcomes,
)

ALL = [(world, row) for world in (2, 4) for row in (*REFERENCE_ROWS[world], *OTHER_ROWS[world])]
everywhere = pytest.mark.parametrize(("world", "row"), ALL, ids=[f"{world} ranks: {row.name}" for world, row in ALL])


def deviation(ranks: list[Outcome], row: Row, world: int) -> Tensor:
    """By round, the largest coordinate of ``x~_{t+1} - x~_t + mean_k step_k``, with ``x~ = x - mean(e) - s``."""
    e = torch.stack([rank.e for rank in ranks]).mean(0)
    s = ranks[0].s if row.exchange == "all_gather" else torch.stack([rank.s for rank in ranks]).sum(0)
    auxiliary = ranks[0].x.double() - e - s
    before = torch.cat([Problem(world, SIZE).start[None], auxiliary[:-1]])
    steps = torch.stack([rank.steps for rank in ranks]).mean(0)
    return (auxiliary - before + steps).abs().amax(1)


@everywhere
def test_the_auxiliary_point_moves_as_if_nothing_was_compressed(world: int, row: Row) -> None:
    # Some roundings a step of numbers below 10: 1e-15 in float64, 1e-6 in float32, and the start is rounded to float32.
    tolerance = 1e-12 if row.dtype is torch.float64 else 1e-5
    assert float(deviation(outcomes(world, row), row, world).max()) < tolerance


def test_dropping_the_residuals_moves_the_auxiliary_point() -> None:
    """The check above can fail, and does where it should and nowhere else."""
    found = deviation(outcomes(2, DROPPED_ROW), DROPPED_ROW, 2)
    assert float(found[DISTURBED]) > 0.01
    assert float(torch.cat([found[:DISTURBED], found[DISTURBED + 1 :]]).max()) < 1e-12


@everywhere
def test_all_ranks_hold_the_same_bits_of_x_after_every_round(world: int, row: Row) -> None:
    first, *others = outcomes(world, row)
    assert all(torch.equal(other.x.view(torch.uint8), first.x.view(torch.uint8)) for other in others)


@everywhere
def test_compression_leaves_something_out(world: int, row: Row) -> None:
    """The runs above test what they seem to test: residuals are there, and so is the server's where there is one."""
    last = outcomes(world, row)
    assert all(float(rank.e[-1].abs().max()) > 0.01 for rank in last)
    assert (max(float(rank.s[-1].abs().max()) for rank in last) > 1e-4) == row.two_way


# ---- one rank --------------------------------------------------------------------------------------------------------


def _plain_sgd(steps: int) -> list[Tensor]:
    """Where SGD with momentum, weight decay and the schedule of ``Replica`` takes its gradients."""
    problem = Problem(1, SIZE)
    y, m, points = problem.start, torch.zeros(SIZE, dtype=torch.float64), []
    for t in range(steps):
        points.append(y)
        m = 0.9 * m + problem.gradient(0, t, y) + 0.01 * y
        y = y - decaying(t) * m
    return points


@pytest.mark.parametrize("compressor", ["sign", "topk:0.01", "random_block:0.1", "bfloat16"])
def test_one_rank_takes_the_gradients_of_plain_sgd(compressor: str) -> None:
    """Section 2.2.3: full step ahead, one way; only ``x`` lags behind."""
    exchange = "all_gather" if compressor in ("sign", "topk:0.01") else "all_reduce"
    replica = Replica(config(compressor, exchange))
    for y in _plain_sgd(STEPS):
        replica.track()
        replica.sync.enter()
        # y = x - e, and what it was is e = x - c - z: three roundings a step
        torch.testing.assert_close(flat(replica.params), y, rtol=0, atol=1e-12)
        replica.take_gradients()
        replica.local_step()
        replica.sync.exchange()
    assert float((replica.x - y).abs().max()) > 0.001, "x must lag"


def test_one_rank_sends_nothing() -> None:
    replica = Replica(config(averaging_period=2))
    replica.run(4)
    assert replica.meter.bytes_sent == replica.meter.bytes_received == 0
