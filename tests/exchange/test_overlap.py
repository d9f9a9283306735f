"""Staged works overlap in one order: what is under way, and in which order ranks call their collectives."""

from __future__ import annotations

import random
import time
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_distopt.compressors import Compressor, Dense, ScaledSign, TopK
from lightning_distopt.exchange import (
    AllGatherExchange,
    AllReduceExchange,
    Meter,
    ShardedServerExchange,
    Steps,
    overlap,
)
from lightning_distopt.exchange.base import drain
from tests.compressors.table import gaussian, same_payload
from tests.exchange.cases import Handed, spied
from tests.ranks import run_ranks


class Log:
    """Works that write down when each of their stages runs: ``b1`` is stage 1 of work b."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.under_way = 0
        self.most = 0

    def work(self, name: str, collectives: int) -> Steps:
        for stage in range(collectives):
            self.events.append(f"{name}{stage}")
            self.under_way += stage == 0
            self.most = max(self.most, self.under_way)
            yield
        self.events.append(f"{name}{collectives}")
        self.under_way -= collectives > 0

    def run(self, collectives: list[int], depth: int = 2) -> str:
        overlap((self.work(chr(ord("a") + i), n) for i, n in enumerate(collectives)), depth)
        return " ".join(self.events)


@pytest.mark.parametrize(
    ("collectives", "depth", "drawn"),
    [
        ([1], 2, "a0 a1"),
        ([1, 1, 1, 1], 2, "a0 b0 a1 c0 b1 d0 c1 d1"),  # start the next, then finish the one before it
        ([1, 1, 1, 1], 1, "a0 a1 b0 b1 c0 c1 d0 d1"),
        ([1, 1, 1, 1], 3, "a0 b0 c0 a1 d0 b1 c1 d1"),
        ([2, 2, 2], 2, "a0 b0 a1 b1 a2 c0 b2 c1 c2"),  # two stages alternate, so that one is always on the network
        ([0, 1, 0, 1], 2, "a0 b0 c0 d0 b1 d1"),
        ([], 2, ""),
    ],
)
def test_stages_run_in_the_drawn_order(collectives: list[int], depth: int, drawn: str) -> None:
    assert Log().run(collectives, depth) == drawn


@settings(deadline=None)
@given(collectives=st.lists(st.integers(0, 4), max_size=20), depth=st.integers(1, 4))
def test_at_most_depth_works_are_under_way(collectives: list[int], depth: int) -> None:
    log = Log()
    log.run(collectives, depth)
    assert log.most <= depth


@settings(deadline=None)
@given(collectives=st.lists(st.integers(0, 4), max_size=20), depth=st.integers(1, 4))
def test_every_stage_runs_once_and_in_its_works_order(collectives: list[int], depth: int) -> None:
    events = Log().run(collectives, depth).split()
    for i, n in enumerate(collectives):
        name = chr(ord("a") + i)
        assert [event for event in events if event[0] == name] == [f"{name}{stage}" for stage in range(n + 1)]


def test_the_next_work_is_made_while_the_one_before_is_under_way() -> None:
    log = Log()

    def works() -> Any:
        for name in "ab":
            log.events.append(f"make {name}")
            yield log.work(name, 1)

    overlap(works())
    assert log.events == ["make a", "a0", "make b", "b0", "a1", "b1"]


def test_started_works_are_drained_stage_by_stage_in_turn() -> None:
    log = Log()
    works = [log.work(name, collectives) for name, collectives in (("a", 2), ("b", 1), ("c", 3))]
    for work in works:
        next(work)
    drain(works)
    assert " ".join(log.events) == "a0 b0 c0 a1 b1 c1 a2 c2 c3"


def test_an_error_inside_a_work_reaches_the_caller() -> None:
    def broken() -> Steps:
        yield
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        overlap([broken()])


# ---- on real ranks ---------------------------------------------------------------------------------------------------

_BUCKETS = 50


def _make(kind: str) -> tuple[Compressor, Any]:
    compressor: Compressor = {"all_reduce": Dense(), "all_gather": ScaledSign(), "sharded_server": TopK(0.1)}[kind]
    exchanges = {
        "all_reduce": AllReduceExchange,
        "all_gather": AllGatherExchange,
        "sharded_server": ShardedServerExchange,
    }
    return compressor, exchanges[kind](compressor, Meter())


def _many_buckets(rank: int, world: int, kind: str, depth: int, sleeps: bool) -> tuple[list[Handed], dict[str, Tensor]]:
    compressor, exchange = _make(kind)
    nap = random.Random(rank)
    means: dict[str, Tensor] = {}

    def work(bucket: int) -> Steps:
        if sleeps:
            time.sleep(nap.uniform(0, 0.004))
        payload = compressor.compress(gaussian(100 + bucket, seed=1000 * rank + bucket))
        (means[str(bucket)],) = yield from exchange.mean([str(bucket)], [payload], 0)

    with spied() as calls:
        overlap((work(bucket) for bucket in range(_BUCKETS)), depth)
    return calls, means


@cache
def _one_by_one(world: int, kind: str) -> dict[str, Tensor]:
    _, means = run_ranks(world, _many_buckets, kind, 1, False)[0]
    return means


@pytest.mark.parametrize(("world", "depth"), [(2, 2), (4, 2), (2, _BUCKETS + 1)], ids=["2", "4", "2, all under way"])
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "sharded_server"])
def test_many_buckets_on_ranks_out_of_step_give_what_they_give_one_by_one(kind: str, world: int, depth: int) -> None:
    hurried = run_ranks(world, _many_buckets, kind, depth, True)
    alone = _one_by_one(world, kind)
    for calls, means in hurried:
        assert [call.name for call in calls] == [call.name for call in hurried[0][0]]
        assert same_payload(dict(sorted(means.items())), dict(sorted(alone.items())))


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather"])
def test_ranks_out_of_step_hand_over_the_same_buckets_in_the_same_order(kind: str) -> None:
    """Buckets differ in size, so the bytes given tell which one is meant."""
    (first, _), (second, _) = run_ranks(2, _many_buckets, kind, 2, True)
    assert len(first) == _BUCKETS
    assert first == second


def _train_like(rank: int, world: int) -> list[Tensor]:
    """Dense and compressed exchanges by turns in one sequence, as in a step with parameters of several kinds."""
    exchanges = [_make(kind) for kind in ("sharded_server", "all_reduce", "all_gather")]
    means: list[Tensor] = []

    def work(i: int) -> Steps:
        compressor, exchange = exchanges[i % 3]
        time.sleep(0.003 * ((rank + i) % 3))
        means.extend((yield from exchange.mean([str(i)], [compressor.compress(gaussian(64, seed=i))], 0)))

    overlap(work(i) for i in range(30))
    return means


def test_exchanges_of_several_kinds_may_be_under_way_together() -> None:
    first, *others = run_ranks(3, _train_like)
    assert len(first) == 30
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
