"""Channels between real processes: what arrives, in which order, how many bytes, and what goes wrong."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_distopt.errors import PipelineError
from lightning_distopt.exchange import Meter
from lightning_distopt.model_parallel.structure import flatten, unflatten
from lightning_distopt.model_parallel.transport import Endpoint, LocalChannel, Receiver, Sender
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def ends(rank: int, depth: int = 1, in_flight: int = 3, timeout: float = 10.0, latency: float = 0.0) -> Any:
    meter = Meter()
    if rank == 0:
        return Sender(Endpoint(0, 1, 4, "activations"), depth, in_flight, None, meter, timeout), meter
    return Receiver(Endpoint(1, 0, 4, "activations"), depth, None, meter, timeout, CPU, latency), meter


def nests() -> list[Any]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3, 4, generator=g), torch.arange(3)),
        (torch.randn(200, 40, generator=g), {"mask": torch.tensor([True, False]), "none": None, "n": 3, "text": "ü"}),
        (torch.randn(2, 3, generator=g).bfloat16(), [torch.tensor(5, dtype=torch.uint8)]),
        (torch.randn(400, 40, generator=g).double().t(), torch.empty(0, 5)),
        (torch.randn(1, generator=g), ()),
        (torch.randn(300, 300, generator=g), torch.arange(3)),
    ] * 2


def _everything(rank: int, world: int, depth: int) -> Any:
    channel, meter = ends(rank, depth)
    for i, nest in enumerate(nests()):
        if rank == 0:
            channel.send(i, nest)
        else:
            spec, tensors = flatten(channel.receive(i))
            wanted_spec, wanted = flatten(nest)
            assert spec == wanted_spec
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True)), i
    if rank == 0:
        channel.settle()
    return meter.sent["activations"], meter.received["activations"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_all_kinds_of_nests_of_changing_sizes_arrive(depth: int) -> None:
    (sent, nothing), (also_nothing, received) = run_ranks(2, _everything, depth)
    assert sent == received > 0
    assert nothing == also_nothing == 0


def _wrong_batch(rank: int, world: int) -> Any:
    channel, _ = ends(rank)
    if rank == 0:
        channel.send(7, torch.zeros(2))
        channel.settle()
        return None
    with pytest.raises(PipelineError, match="activations of batch 3 from rank 0 and got those of batch 7") as caught:
        channel.receive(3)
    return caught.value.stage, caught.value.peer, caught.value.batch


def test_the_batch_must_be_the_one_waited_for() -> None:
    assert run_ranks(2, _wrong_batch)[1] == (1, 0, 3)


def _slow(rank: int, world: int) -> Any:
    channel, _ = ends(rank, timeout=0.5)
    if rank == 0:
        time.sleep(1.5)
        return None
    start = time.monotonic()
    with pytest.raises(
        PipelineError, match=r"Stage 1 on rank 1 could not receive the activations of batch 0 from rank 0 within 0.5 s"
    ):
        channel.receive(0)
    return time.monotonic() - start


def _no_barrier(rank: int, world: int) -> Any:
    return _slow(rank, world)


def test_a_slow_peer_is_named_within_the_time_out() -> None:
    from tests.model_parallel.survivors import run_survivors

    assert 0.4 < run_survivors(2, _no_barrier)[1] < 1.4


def _latency(rank: int, world: int) -> Any:
    channel, _ = ends(rank, latency=0.1)
    dist.barrier()
    start = time.monotonic()
    if rank == 0:
        channel.send(0, torch.zeros(2))
        channel.settle()
    else:
        channel.receive(0)
    return time.monotonic() - start


def test_latency_can_be_added() -> None:
    """The message may have left before the other side began to look at its clock."""
    assert 0.05 < run_ranks(2, _latency)[1] < 0.5


def test_a_local_channel_is_a_queue_of_copies() -> None:
    channel, x = LocalChannel(1), torch.ones(2)
    channel.send(0, (x, {"a": None}))
    x.zero_()
    assert channel.depth() == 1
    received = channel.receive(0)
    assert torch.equal(received[0], torch.ones(2))
    with pytest.raises(PipelineError, match="batch 1"):
        channel.receive(1)
    channel.send(2, x)
    with pytest.raises(PipelineError, match=r"batch 1.*batch 2"):
        channel.receive(1)


def test_a_nest_comes_apart_and_together() -> None:
    nest = {"a": (torch.ones(1), [None, 2, True]), "b": {"c": torch.zeros(2)}}
    spec, tensors = flatten(nest)
    again = unflatten(spec, tensors)
    assert again["a"][0] is nest["a"][0]
    assert again["a"][1] == [None, 2, True]
    assert isinstance(again["a"], tuple)
    with pytest.raises(TypeError, match="set"):
        flatten({1, 2})
