"""The meter's formulas, checked against a count of messages."""

from __future__ import annotations

import time

import pytest

from lightning_distopt.exchange import Meter
from lightning_distopt.exchange.meter import ring_all_reduce_bytes

WORLDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 33, 64)


@pytest.mark.parametrize(("world", "expected"), [(1, 0), (2, 1000), (3, 1333), (4, 1500), (8, 1750)])
def test_a_ring_all_reduce_passes_every_chunk_on_twice(world: int, expected: int) -> None:
    assert ring_all_reduce_bytes(1000, world) == expected


def messages(world: int) -> list[tuple[int, int]]:
    """Who sends to whom in Gloo's broadcast, by playing it: in each round the ranks that have the data double."""
    sent: list[tuple[int, int]] = []
    have = 1
    while have < world:
        sent += [(rank, rank + have) for rank in range(have) if rank + have < world]
        have *= 2
    return sent


def test_four_ranks_broadcast_along_the_drawn_tree() -> None:
    #      0         round 1: 0 -> 1
    #     / \        round 2: 0 -> 2, 1 -> 3
    #    1   2       rank 0 sends twice, rank 1 once
    #    |
    #    3
    meters = [Meter() for _ in range(4)]
    for rank, meter in enumerate(meters):
        meter.broadcast("buffers", 10, 4, rank)
    assert [meter.bytes_sent for meter in meters] == [20, 10, 0, 0]
    assert [meter.bytes_received for meter in meters] == [0, 10, 10, 10]


@pytest.mark.parametrize("world", WORLDS)
def test_a_broadcast_is_counted_message_by_message(world: int) -> None:
    tree = messages(world)
    for rank in range(world):
        meter = Meter()
        meter.broadcast("buffers", 10, world, rank)
        assert meter.bytes_sent == 10 * sum(sender == rank for sender, _ in tree)
        assert meter.bytes_received == 10 * sum(receiver == rank for _, receiver in tree)


@pytest.mark.parametrize("world", WORLDS)
def test_a_broadcast_reaches_every_other_rank_once(world: int) -> None:
    meter = Meter()
    for rank in range(world):
        meter.broadcast("buffers", 10, world, rank)
    assert meter.bytes_sent == meter.bytes_received == 10 * (world - 1)


def test_ones_own_part_of_an_all_to_all_is_free() -> None:
    meter = Meter()
    meter.all_to_all("exchange", [1, 20, 300], [4000, 50_000, 600_000], rank=1)
    assert (meter.bytes_sent, meter.bytes_received) == (301, 604_000)


def test_an_all_gather_receives_from_all_others() -> None:
    meter = Meter()
    meter.all_gather("exchange", 10, 5)
    assert (meter.bytes_sent, meter.bytes_received) == (40, 40)


def test_purposes_are_kept_apart_and_summed() -> None:
    meter = Meter()
    meter.all_gather("exchange", 10, 2)
    meter.all_reduce("averaging", 100, 2)
    assert dict(meter.sent) == dict(meter.received) == {"exchange": 10, "averaging": 100}
    assert meter.bytes_sent == 110


def test_steps_add_up_what_ddp_would_have_sent() -> None:
    meter = Meter()
    meter.step(100)
    meter.step(50)
    assert (meter.steps, meter.dense_bytes) == (2, 150)


def test_timed_blocks_add_up_even_if_they_fail() -> None:
    meter = Meter()

    def work(fails: bool) -> None:
        with meter.timed("encode"):
            time.sleep(0.01)
            if fails:
                raise ValueError("inside")

    work(fails=False)
    with pytest.raises(ValueError, match="inside"):
        work(fails=True)
    assert 0.02 <= meter.seconds["encode"] < 5
