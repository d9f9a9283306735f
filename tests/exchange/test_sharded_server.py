"""What is special about the sharded server: shares, residuals that move with them, and a cost that does not grow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_distopt.compressors import Dense, ScaledSign, TopK
from lightning_distopt.exchange import (
    AllGatherExchange,
    Exchange,
    Meter,
    ServerResidual,
    ShardedServerExchange,
    Steps,
    overlap,
)
from lightning_distopt.exchange.sharded_server import _shares
from tests.compressors.table import gaussian
from tests.ranks import run_ranks

SIZES = st.lists(st.integers(0, 200), max_size=8)
WORLD = st.integers(1, 9)


def means_of(exchange: Exchange, tensors: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    payloads = [exchange.compressor.compress(tensor) for tensor in tensors.values()]
    means: list[Tensor] = []

    def work() -> Steps:
        means.extend((yield from exchange.mean(list(tensors), payloads, step)))

    overlap([work()])
    return dict(zip(tensors, means, strict=True))


# ---- shares ----------------------------------------------------------------------------------------------------------


def test_shares_of_two_tensors_are_the_drawn_ones() -> None:
    #  tensor 0: 0 ........ 24 | 24 ... 40      tensor 1: 0 .. 8 | 8 ........ 32 | 32 .. 40
    assert [[tuple(part) for part in share] for share in _shares([40, 40], 3, 8)] == [
        [(0, 0, 24)],
        [(0, 24, 40), (1, 0, 8)],
        [(1, 8, 40)],
    ]


@settings(deadline=None)
@given(SIZES, WORLD)
def test_shares_cover_every_coordinate_exactly_once(numels: list[int], world: int) -> None:
    owned = Counter(
        (part.tensor, i) for share in _shares(numels, world, 8) for part in share for i in range(part.start, part.stop)
    )
    assert owned == Counter((tensor, i) for tensor, numel in enumerate(numels) for i in range(numel))


@settings(deadline=None)
@given(SIZES, WORLD)
def test_inner_cuts_are_multiples_of_eight(numels: list[int], world: int) -> None:
    for part in (part for share in _shares(numels, world, 8) for part in share):
        assert part.start % 8 == 0
        assert part.stop % 8 == 0 or part.stop == numels[part.tensor]


@settings(deadline=None)
@given(SIZES, WORLD)
def test_shares_are_equal_to_a_byte_of_bits(numels: list[int], world: int) -> None:
    ideal = sum(numels) / world
    # Either end is rounded down by at most 7, after a whole part of the ideal place was taken.
    assert all(abs(sum(part.numel for part in share) - ideal) < 9 for share in _shares(numels, world, 8))


@settings(deadline=None)
@given(SIZES, WORLD)
def test_an_owner_has_at_most_one_part_of_a_tensor(numels: list[int], world: int) -> None:
    for share in _shares(numels, world, 8):
        tensors = [part.tensor for part in share]
        assert tensors == sorted(set(tensors))


# ---- awkward buckets -------------------------------------------------------------------------------------------------


def _few_elements(rank: int, world: int) -> list[Tensor]:
    means = []
    for compressor in (Dense(), TopK(1.0), ScaledSign()):
        exchange = ShardedServerExchange(compressor, Meter(), compress_answer=False)
        means += means_of(
            exchange, {"a": torch.tensor([1.0, -1.0]) * 4, "b": torch.zeros(0), "c": torch.tensor(4.0)}
        ).values()
    return means


def test_more_ranks_than_elements_still_average() -> None:
    for means in run_ranks(5, _few_elements):
        assert [mean.tolist() for mean in means] == 3 * [[4.0, -4.0], [], [4.0]]


def _lopsided(rank: int, world: int) -> Tensor:
    """Five bfloat16 entries of rank 0 (30 bytes, no multiple of 4) and none of rank 1 arrive at owner 1, at owner 0 none."""
    v = torch.zeros(200, dtype=torch.bfloat16)
    v[slice(150, 155) if rank == 0 else slice(0, 5)] = 1 + rank
    return means_of(ShardedServerExchange(TopK(0.025), Meter(), compress_answer=False), {"v": v})["v"]


def test_a_part_without_entries_may_arrive_at_an_odd_place() -> None:
    for mean in run_ranks(2, _lopsided):
        assert mean.nonzero().view(-1).tolist() == [0, 1, 2, 3, 4, 150, 151, 152, 153, 154]


def _nothing(rank: int, world: int) -> list[list[int]]:
    exchanges: list[Exchange] = [
        ShardedServerExchange(TopK(0.1), Meter()),
        ShardedServerExchange(ScaledSign(), Meter()),
        AllGatherExchange(TopK(0.1), Meter()),
        AllGatherExchange(ScaledSign(), Meter()),
    ]
    return [means_of(exchange, {"v": torch.zeros(0)})["v"].tolist() for exchange in exchanges]


@pytest.mark.parametrize("world", [2, 3])
def test_an_empty_bucket_is_exchanged(world: int) -> None:
    assert run_ranks(world, _nothing) == world * [4 * [[]]]


# ---- residuals -------------------------------------------------------------------------------------------------------


def _one_step(rank: int, world: int, step: int, pieces: dict[str, list[tuple[int, Tensor]]] | None) -> Any:
    exchange = ShardedServerExchange(TopK(0.1), Meter())
    if pieces is not None:
        exchange.restore_residuals(
            {name: [ServerResidual(*piece) for piece in those] for name, those in pieces.items()}
        )
    tensors = {"a": gaussian(100, seed=10 * step + rank), "b": gaussian(50, seed=10 * step + rank + 5)}
    sent = {name: TopK(0.1).decompress(TopK(0.1).compress(v)) for name, v in tensors.items()}
    means = means_of(exchange, tensors, step)
    return sent, means, {name: tuple(residual) for name, residual in exchange.residuals.items()}


def _whole(outcomes: list[Any]) -> dict[str, Tensor]:
    residuals = {"a": torch.zeros(100), "b": torch.zeros(50)}
    for _, _, parts in outcomes:
        for name, (start, values) in parts.items():
            residuals[name][start : start + len(values)] = values
    return residuals


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_residuals_cut_for_two_ranks_are_taken_over_by_any_number(world: int) -> None:
    written = run_ranks(2, _one_step, 0, None)
    pieces = {name: [parts[name] for _, _, parts in written if name in parts] for name in ("a", "b")}
    before, outcomes = _whole(written), run_ranks(world, _one_step, 1, pieces)
    after = _whole(outcomes)
    for name in ("a", "b"):
        mean = sum(sent[name] / world for sent, _, _ in outcomes)
        torch.testing.assert_close(before[name] + mean, outcomes[0][1][name] + after[name])


def test_without_a_compressed_answer_no_residual_is_kept() -> None:
    exchange = ShardedServerExchange(TopK(0.1), Meter(), compress_answer=False)
    means_of(exchange, {"v": gaussian(100)})
    assert exchange.residuals == {}


# ---- cost ------------------------------------------------------------------------------------------------------------


def _bytes(rank: int, world: int) -> tuple[int, int]:
    v = {"v": gaussian(100_000, seed=rank)}
    served, gathered = Meter(), Meter()
    means_of(ShardedServerExchange(ScaledSign(), served), v)
    means_of(AllGatherExchange(ScaledSign(), gathered), v)
    return max(served.bytes_sent, served.bytes_received), gathered.bytes_sent


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_rank_sends_at_most_two_payloads_whatever_the_number_of_ranks(world: int) -> None:
    payload = ScaledSign().nbytes(100_000)
    for served, gathered in run_ranks(world, _bytes):
        # A scale travels with every part, and shares differ by a byte: under 8 bytes to and from each rank.
        assert abs(served - 2 * payload * (world - 1) / world) <= 8 * world
        assert gathered == payload * (world - 1)
