from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import free_port, run_ranks


def _sum_of_ranks(rank: int, world: int, offset: int) -> torch.Tensor:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return total


def _fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.all_reduce(torch.ones(1))  # fails because rank 1 is gone


def _die_on_one(rank: int, world: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _hang_here(rank: int, world: int) -> None:
    time.sleep(60)


def _threads(rank: int, world: int) -> tuple[Any, ...]:
    return rank, world, torch.get_num_threads(), dist.get_backend()


def test_results_come_back_by_rank() -> None:
    assert run_ranks(3, _threads) == [(rank, 3, 1, "gloo") for rank in range(3)]


def test_ranks_talk_to_each_other() -> None:
    assert [int(total) for total in run_ranks(2, _sum_of_ranks, 10)] == [21, 21]


def test_the_rank_that_failed_first_is_named_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 3 failed:.*_fail_on_one.*ValueError: the cause"):
        run_ranks(3, _fail_on_one)


def test_a_killed_rank_is_an_error_and_the_others_do_not_wait() -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 of 2 ended without a traceback"):
        run_ranks(2, _die_on_one)
    assert time.monotonic() - begin < 20, "must not wait for the sleeping rank's 60 s"


def test_ranks_that_hang_are_killed_and_show_where_they_were() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ranks \[0, 1\] of 2 still ran after 3.0 s.*_hang_here"):
        run_ranks(2, _hang_here, timeout=3.0)


def test_the_environment_of_this_process_is_left_alone() -> None:
    before = dict(os.environ)
    run_ranks(2, _threads)
    assert dict(os.environ) == before
    assert not dist.is_initialized()


def test_free_ports_are_ports() -> None:
    assert 1024 <= free_port() <= 65535
