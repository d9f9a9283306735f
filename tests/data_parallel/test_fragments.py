"""Fragments that take turns, exchanges that arrive later, parameters that are mixed: against a step-by-step reference."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.data_parallel import FedMom, UpdateSyncConfig
from lightning_distopt.data_parallel.fragments import cut
from lightning_distopt.exchange.base import Collective
from tests.data_parallel.local_reference import nesterov, streaming
from tests.data_parallel.reference import Problem
from tests.data_parallel.replica import NAMES, SIZE, SIZES, decaying, flat
from tests.data_parallel.test_local_updates import TOLERANCE, LocalReplica, local
from tests.data_parallel.together import together
from tests.ranks import run_ranks

WORLD, STEPS = 2, 26
SPANS = {1: [(0, SIZE)], 2: [(0, 49), (49, SIZE)], 4: [(0, 35), (35, 48), (48, 49), (49, SIZE)]}


# ---- the cut ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.data())
def test_every_parameter_is_in_exactly_one_fragment_and_none_is_empty(sizes: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(sizes)))
    params = {f"p{i}": Parameter(torch.zeros(n)) for i, n in enumerate(sizes)}
    found = cut(params, parts)
    assert len(found) == parts
    assert all(found)
    assert [name for part in found for name in part] == list(params)  # so each once, and in order
    assert all(part[name] is params[name] for part in found for name in part)


def test_the_cut_is_by_bytes() -> None:
    params = {f"p{i}": Parameter(torch.zeros(n)) for i, n in enumerate([6, 6, 6, 18, 20, 3, 4, 9])}
    assert [sum(p.numel() for p in part.values()) for part in cut(params, 3)] == [18, 38, 16]


def test_sizes_that_other_bucketings_lose_are_kept() -> None:
    """The specification's cases: [6, 6, 6] and [20, 3]."""
    for sizes in ([6, 6, 6], [20, 3]):
        params = {f"p{i}": Parameter(torch.zeros(n)) for i, n in enumerate(sizes)}
        assert [len(part) for part in cut(params, 2)] == ([1, 2] if len(sizes) == 3 else [1, 1])


# ---- the timetable ---------------------------------------------------------------------------------------------------


def test_the_timetable_is_the_drawn_one() -> None:
    """``s``: an exchange starts after this step, ``a``: it arrives."""
    assert timetable(every=6, fragments=3, delay=1, steps=14) == [
        "sa....sa....sa",
        "..sa....sa....",
        "....sa....sa..",
    ]


def timetable(steps: int, **changes: Any) -> list[str]:
    config = UpdateSyncConfig(
        local().compressor,
        "all_reduce",
        0.0,
        sync_every=changes.pop("every"),
        residuals=False,
        bucket_bytes=1,
        **changes,
    )
    replica = LocalReplica(config)
    replica.track()
    rows = ["" for _ in range(config.fragments)]
    for _ in range(steps):
        before = {group.fragment: (group.flight is not None, group.rounds) for group in replica.sync._groups}
        replica.step()
        for group in replica.sync._groups:
            flew, rounds = before[group.fragment]
            rows[group.fragment] += (
                "a" if group.rounds > rounds else "s" if group.flight is not None and not flew else "."
            )
    return rows


# ---- the reference ---------------------------------------------------------------------------------------------------

CASES = [
    (fragments, every, delay, mix)
    for fragments, every in ((1, 4), (2, 4), (4, 8))
    for delay in (0, 1)
    for mix in (0.0, 0.5)
]


def _run(rank: int, world: int, fragments: int, every: int, delay: int, mix: float) -> tuple[Tensor, Tensor]:
    replica = LocalReplica(local(sync_every=every, fragments=fragments, delay=delay, mix=mix, outer=FedMom(0.7, 0.9)))
    models, own = [], []
    for _ in range(STEPS):
        replica.step()
        models.append(replica.x)
        own.append(flat(replica.params))
    return torch.stack(models), torch.stack(own)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "P={} H={} delay={} mix={}".format(*case))
def test_the_engine_equals_the_slow_reference(case: tuple[int, int, int, float]) -> None:
    fragments, every, delay, mix = case
    outers = [nesterov(lambda t: 0.7, 0.9) for _ in range(fragments)]
    steps = streaming(
        Problem(WORLD, SIZE), WORLD, outers, SPANS[fragments], every=every, delay=delay, mix=mix, lr=decaying
    )
    ranks = together(WORLD, _run, CASES, case)
    for t, (x, own) in enumerate(islice(steps, STEPS)):
        for k, (models, mine) in enumerate(ranks):
            assert float((models[t] - x).abs().max()) < TOLERANCE, f"x after step {t + 1}"
            assert float((mine[t] - own[k]).abs().max()) < TOLERANCE, f"rank {k} after step {t + 1}"


def test_one_fragment_without_delay_and_mixing_is_diloco_bit_for_bit() -> None:
    """And hence FedMom, which the other reference says."""
    replica = LocalReplica(local(outer=FedMom(0.7, 0.9)))
    one = LocalReplica(local(outer=FedMom(0.7, 0.9), fragments=1, delay=0, mix=0.0))
    for _ in range(12):
        replica.step()
        one.step()
        assert torch.equal(flat(replica.params), flat(one.params))


# ---- what it is for --------------------------------------------------------------------------------------------------


def _peaks(rank: int, world: int, fragments: int) -> tuple[int, int]:
    """The most bytes that leave in one step, and all of them."""
    replica = LocalReplica(local(sync_every=8, fragments=fragments), dtype=torch.float32)
    most = before = 0
    for _ in range(24):
        replica.step()
        most = max(most, replica.meter.sent["exchange"] - before)
        before = replica.meter.sent["exchange"]
    return most, before


def test_the_most_bytes_at_a_time_are_those_of_the_largest_fragment_and_their_sum_stays() -> None:
    (whole, total), (part, same) = (run_ranks(WORLD, _peaks, parts)[0] for parts in (1, 4))
    assert (whole, part) == (4 * SIZE, 4 * max(SIZES))
    assert total == same == 3 * 4 * SIZE


def _waits(rank: int, world: int) -> list[int]:
    """How often each step waited for the network."""
    waited: list[int] = []

    def wait(self: Any, work: Any, names: Any, step: int) -> None:
        waited[-1] += 1
        work.wait()

    Collective.wait = wait  # type: ignore[method-assign]
    replica = LocalReplica(local(sync_every=4, delay=2))
    for _ in range(8):
        waited.append(0)
        replica.step()
    return waited


def test_local_steps_go_on_while_an_exchange_is_under_way() -> None:
    # they start after step 2 and are waited for after step 4, one a bucket
    assert run_ranks(WORLD, _waits) == [[0, 0, 0, 2, 0, 0, 0, 2]] * 2


def _ends(rank: int, world: int) -> tuple[Tensor, bool]:
    replica = LocalReplica(local(sync_every=8, fragments=4, delay=1, mix=0.5, outer=FedMom(0.7)))
    replica.run(11)
    replica.sync.flush()
    return flat(replica.params), replica.sync.away


def test_at_the_end_all_ranks_hold_the_common_model() -> None:
    (one, away), (other, _) = run_ranks(WORLD, _ends)
    assert torch.equal(one, other)
    assert not away


def _dropped(rank: int, world: int) -> tuple[bool, bool]:
    """An exchange that is given up: the anchor is back, and training goes on together."""
    replica = LocalReplica(local(sync_every=8, fragments=2, delay=2, mix=0.5, outer=FedMom(0.7)))
    replica.run(3)  # the first fragment is on its way
    x = replica.x
    replica.sync.restore()
    back = torch.equal(flat(replica.params), x)
    replica.run(16)
    replica.sync.flush()
    return back, bool(flat(replica.params).isfinite().all())


def test_what_is_given_up_leaves_the_anchor() -> None:
    assert run_ranks(WORLD, _dropped) == [(True, True)] * 2


def test_parameters_that_are_frozen_in_the_middle_end_their_rounds_first() -> None:
    replica = LocalReplica(local(sync_every=8, fragments=2, mix=0.5, outer=FedMom(0.7)))
    replica.run(5)
    replica.track(NAMES[:3])
    assert not replica.sync.away
    replica.run(8)
    assert set(replica.sync.state_dict()["outer"]) == set(NAMES)
