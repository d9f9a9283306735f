"""Hosts on one machine: links are as slow as they are told to be, and nothing is left behind."""

from __future__ import annotations

import subprocess
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from benchmarks.hosts import HostsError, bits_per_second, counters, enter, network, why_not
from tests.ranks import run_ranks

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def _broadcast(rank: int, world: int, nbytes: int) -> tuple[float, int]:
    v = torch.zeros(nbytes, dtype=torch.uint8)
    dist.broadcast(v[:1], 0)  # opens the connections
    dist.barrier()
    (sent, _), start = counters(), time.perf_counter()
    dist.broadcast(v, 0)
    dist.barrier()
    return time.perf_counter() - start, counters()[0] - sent


def _seconds(hosts: int, bandwidth: str, nbytes: int) -> float:
    try:
        with network(hosts, bits_per_second(bandwidth)) as names:
            return run_ranks(hosts, _broadcast, nbytes, before=partial(enter, names))[0][0]
    except HostsError as error:
        pytest.skip(str(error))


@needs_hosts
@pytest.mark.parametrize("hosts", [2, 3])
def test_a_megabyte_takes_its_time_on_a_slow_link(hosts: int) -> None:
    # 0.8 s for the bytes; two children of the root in a broadcast to three share its link.
    assert _seconds(hosts, "10mbit", 1_000_000) >= 0.7 * (hosts - 1)


@needs_hosts
def test_a_link_without_a_limit_is_faster() -> None:
    assert _seconds(2, "unshaped", 1_000_000) < 0.5


def _gather(rank: int, world: int, nbytes: int) -> float:
    mine = torch.zeros(nbytes, dtype=torch.uint8)
    dist.barrier()
    start = time.perf_counter()
    dist.gather(mine, [torch.zeros_like(mine) for _ in range(world)] if rank == 0 else None)
    return time.perf_counter() - start


@needs_hosts
def test_what_a_host_receives_through_the_hub_is_limited_too() -> None:
    try:
        with network(3, 20e6) as names:
            seconds = run_ranks(3, _gather, 1_000_000, before=partial(enter, names))[0]
    except HostsError as error:
        pytest.skip(str(error))
    assert seconds >= 0.7  # two megabytes into one link of 2.5 MB/s; 0.4 s if only the senders were limited


@needs_hosts
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_namespace_is_left_behind_even_after_an_error(error: type[BaseException]) -> None:
    made: list[str] = []

    def fail() -> None:
        with network(3, 1e9) as names:
            made.extend(names)
            raise error("inside")

    with pytest.raises(error, match="inside"):
        fail()
    left = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True, timeout=10).stdout
    assert made
    assert not any(name.rpartition("-")[0] in left for name in made)


@pytest.mark.parametrize(("text", "rate"), [("100mbit", 1e8), ("2.5gbit", 2.5e9), ("64kbit", 64e3), ("unshaped", None)])
def test_bandwidths_are_read(text: str, rate: float | None) -> None:
    assert bits_per_second(text) == rate


@pytest.mark.parametrize("text", ["", "100", "fast", "0mbit", "-1gbit", "1gbyte"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="100mbit"):
        bits_per_second(text)
