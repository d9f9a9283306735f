"""Majority vote: the sign of exact counts, by bits or by bytes; a broken rank spoils its vote openly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distopt.exchange import MajorityVote, Meter, majority_vote, overlap
from tests.ranks import run_ranks

N = 1003


def vote(votes: MajorityVote, flat: Tensor, step: int = 0) -> Tensor:
    out = torch.full_like(flat, 7.0)

    def work() -> Any:
        means = yield from votes.mean_(["a", "b"], list(flat.split([1000, 3])), flat, step)
        means.write_(out)
        assert means.finite() == bool(out.isfinite().all())

    overlap([work()])
    return out


def gradients(world: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(world, N, generator=torch.Generator().manual_seed(world)).to(dtype)


def _vote(rank: int, world: int, by_bytes: bool, dtype: torch.dtype) -> tuple[Tensor, bool, dict[str, int]]:
    if by_bytes:
        majority_vote.BIT_RANKS = 0
    votes = MajorityVote(Meter())
    flat = gradients(world, dtype)[rank].clone()
    out = vote(votes, flat)
    return out, torch.equal(flat, gradients(world, dtype)[rank]), dict(votes.meter.received)


@pytest.mark.parametrize("by_bytes", [False, True], ids=["bits", "bytes"])
@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float32), (3, torch.bfloat16), (4, torch.float64)])
def test_the_result_is_the_sign_of_the_sum_of_signs(world: int, dtype: torch.dtype, by_bytes: bool) -> None:
    expected = gradients(world, dtype).sign().sum(0).sign()
    assert bool((expected == 0).any()) == (world % 2 == 0), "ties are among them"
    for out, untouched, received in run_ranks(world, _vote, by_bytes, dtype):
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        assert untouched
        ring = 2 * (N + 1) * (world - 1) // world
        assert received == {"exchange": ring if by_bytes else ((N + 7) // 8 + 1) * (world - 1)}


def test_one_rank_is_sign_descent() -> None:
    flat = gradients(1)[0]
    assert torch.equal(vote(MajorityVote(Meter()), flat), flat.sign())


def _zeros(rank: int, world: int) -> list[Tensor]:
    votes = MajorityVote(Meter())
    return [vote(votes, torch.zeros(N), step) for step in range(2)]


def test_zeros_everywhere_are_no_step_on_an_even_number_of_ranks() -> None:
    for outs in run_ranks(2, _zeros):
        assert not bool(torch.stack(outs).any())


def test_zeros_go_to_and_fro_on_an_odd_number() -> None:
    there, back = _zeros(0, 1)
    assert bool((there + back == 0).all())
    assert bool((there.abs() == 1).all())


def _broken(rank: int, world: int, by_bytes: bool, value: float) -> bool:
    if by_bytes:
        majority_vote.BIT_RANKS = 0
    flat = gradients(world)[rank].clone()
    if rank == 1:
        flat[77] = value
    return bool(vote(MajorityVote(Meter()), flat).isnan().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("by_bytes", [False, True], ids=["bits", "bytes"])
def test_a_bad_number_of_one_rank_shows_on_all(by_bytes: bool, value: float) -> None:
    assert run_ranks(2, _broken, by_bytes, value) == [True, True]


def test_more_ranks_than_a_byte_can_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 128)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    with pytest.raises(ValueError, match="at most 127 ranks: got 128"):
        MajorityVote(Meter())


@pytest.mark.parametrize("world", [9, 127])
def test_counts_of_bytes_are_exact_up_to_127_ranks(world: int) -> None:
    """The arithmetic of the all-reduce, without the processes: all the same, and all but one."""
    for minority in (0, 1, world // 2):
        votes = torch.ones(world, 5, dtype=torch.int8)
        votes[:minority] = -1
        total = torch.zeros(5, dtype=torch.int8)
        for one in votes:
            total += one
        assert total.tolist() == [world - 2 * minority] * 5
