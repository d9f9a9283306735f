"""The table of exchanges, a worker that runs many cases on real ranks, and a slow reference of what must come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors import Compressor, Payload
from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.exchange import (
    AllGatherExchange,
    AllReduceExchange,
    Exchange,
    Meter,
    ShardedServerExchange,
    Steps,
    overlap,
)
from lightning_distopt.exchange.sharded_server import _shares
from tests.compressors.table import FLOATS, ROWS, Row, gaussian
from tests.ranks import run_ranks


class Kind(NamedTuple):
    """One way to exchange: a new one is a row.

    Args:
        name: for test ids.
        make: builds it for a compressor and a meter.
        needs: the trait that a compressor must have.
        two_way: whether the mean is compressed again.
        keeps: whether what that leaves out is kept for the next exchange.
    """

    name: str
    make: Callable[[Compressor, Meter], Exchange]
    needs: str = ""
    two_way: bool = False
    keeps: bool = False


KINDS = (
    Kind("all_gather", AllGatherExchange),
    Kind("all_reduce", AllReduceExchange, "linear"),
    Kind("sharded_server", partial(ShardedServerExchange, compress_answer=False), "splittable"),
    Kind("sharded_server+answer", partial(ShardedServerExchange, keep_residual=False), "splittable", two_way=True),
    Kind("sharded_server+answer+residual", ShardedServerExchange, "splittable", two_way=True, keeps=True),
)

STEPS = 2
BUCKETS = ((700, 7, 0, 1), (129, 200))  # sizes of the tensors of each bucket


class Case(NamedTuple):
    row: Row
    kind: Kind
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.row.text} by {self.kind.name} in {str(self.dtype).removeprefix('torch.')}"


# Rows that differ from one of the others only in how levels are found: their payloads travel alike.
_ALIKE = ("threshold=", "linear", "qsgd:255", "clip=", "orq:5", "onebit")

CASES = tuple(
    Case(row, kind, dtype)
    for row in ROWS
    if not any(part in row.text for part in _ALIKE)
    for kind in KINDS
    for dtype in FLOATS
    if not kind.needs or kind.needs in row.traits
)
WORLDS = (1, 2, 3, 4)


def runs_on(case: Case, world: int) -> bool:
    """All sizes in float32; the other dtypes only where a mean is not a division by a power of two."""
    return case.dtype is torch.float32 or world == 3


class Handed(NamedTuple):
    """One collective as it was called: what its tensors say must travel."""

    name: str
    given: int
    sent: int
    received: int


@contextmanager
def spied() -> Iterator[list[Handed]]:
    """Record the collectives that are called inside, in order, with the bytes of the tensors handed to them."""
    calls: list[Handed] = []
    originals = (dist.all_reduce, dist.all_gather_into_tensor, dist.all_to_all_single)

    def all_reduce(tensor: Tensor, **kwargs: Any) -> Any:
        world = dist.get_world_size(kwargs["group"])
        ring = 2 * tensor.nbytes * (world - 1) // world
        calls.append(Handed("all_reduce", tensor.nbytes, ring, ring))
        return originals[0](tensor, **kwargs)

    def all_gather(everyones: Tensor, mine: Tensor, **kwargs: Any) -> Any:
        others = everyones.nbytes - mine.nbytes
        calls.append(Handed("all_gather", mine.nbytes, others, others))
        return originals[1](everyones, mine, **kwargs)

    def all_to_all(received: Tensor, sent: Tensor, arriving: list[int], leaving: list[int], **kwargs: Any) -> Any:
        rank = dist.get_rank(kwargs["group"])
        out, into = ((sum(split) - split[rank]) * sent.itemsize for split in (leaving, arriving))
        assert (sum(leaving), sum(arriving)) == (sent.numel(), received.numel())
        calls.append(Handed("all_to_all", sent.nbytes, out, into))
        return originals[2](received, sent, arriving, leaving, **kwargs)

    dist.all_reduce, dist.all_gather_into_tensor, dist.all_to_all_single = all_reduce, all_gather, all_to_all
    try:
        yield calls
    finally:
        dist.all_reduce, dist.all_gather_into_tensor, dist.all_to_all_single = originals


@dataclass
class Outcome:
    """What one rank saw of one case: ``means[step][name]``, the server residuals after each step, and the bytes."""

    means: list[dict[str, Tensor]] = field(default_factory=list)
    residuals: list[dict[str, tuple[int, Tensor]]] = field(default_factory=list)
    payload_bytes: int = 0
    sent: int = 0
    received: int = 0
    calls: list[Handed] = field(default_factory=list)


def names_of(bucket: int) -> list[str]:
    return [f"bucket{bucket}.tensor{i}" for i in range(len(BUCKETS[bucket]))]


def payloads_of(case: Case, rank: int, step: int, bucket: int) -> list[Payload]:
    """What ``rank`` contributes: other values for every rank, step and tensor, larger ones on higher ranks."""
    return [
        case.row.make().compress(
            gaussian(numel, dtype=case.dtype, seed=1000 * rank + 100 * step + 10 * bucket + i) * (1 + rank),
            derive_key(0, 0, step, name),
        )
        for i, (numel, name) in enumerate(zip(BUCKETS[bucket], names_of(bucket), strict=True))
    ]


def run_case(rank: int, case: Case) -> Outcome:
    meter, outcome = Meter(), Outcome()
    exchange = case.kind.make(case.row.make(), meter)

    def work(step: int, bucket: int) -> Steps:
        payloads = payloads_of(case, rank, step, bucket)
        outcome.payload_bytes += sum(payload.nbytes for payload in payloads)
        means = yield from exchange.mean(names_of(bucket), payloads, step)
        outcome.means[step].update(zip(names_of(bucket), means, strict=True))

    with spied() as outcome.calls:
        for step in range(STEPS):
            outcome.means.append({})
            overlap(work(step, bucket) for bucket in range(len(BUCKETS)))
            residuals = getattr(exchange, "residuals", {})
            outcome.residuals.append({name: (r.start, r.values.clone()) for name, r in residuals.items()})
    outcome.sent, outcome.received = meter.bytes_sent, meter.bytes_received
    return outcome


def _run_cases(rank: int, world: int) -> dict[str, Outcome]:
    outcomes = {}
    for case in CASES:
        if not runs_on(case, world):
            continue
        try:
            outcomes[case.name] = run_case(rank, case)
        except Exception as error:
            raise RuntimeError(f"in {case.name}") from error
    return outcomes


@cache
def outcomes(world: int) -> list[dict[str, Outcome]]:
    """Run all cases on ``world`` ranks, once for all tests; outcomes by rank and name."""
    return run_ranks(world, _run_cases)


@cache
def gathered(row: Row, dtype: torch.dtype, world: int) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """By step and name, in float64: the mean over ranks of what each payload decodes to, and of its magnitude."""
    compressor = row.make()
    steps: list[dict[str, tuple[Tensor, Tensor]]] = []
    for step in range(STEPS):
        steps.append({})
        for bucket in range(len(BUCKETS)):
            ranks = [payloads_of(Case(row, KINDS[0], dtype), rank, step, bucket) for rank in range(world)]
            for name, *payloads in zip(names_of(bucket), *ranks, strict=True):
                decoded = torch.stack([compressor.decompress(payload).double() for payload in payloads])
                steps[-1][name] = decoded.mean(0), decoded.abs().mean(0)
    return steps


@cache
def reference(case: Case, world: int) -> list[dict[str, Tensor]]:
    """The means of each step, in float64, from the definition: decode everything, average, let the owners answer."""
    compressor = case.row.make()
    kept: dict[str, Tensor] = {}
    means = [{name: mean.clone() for name, (mean, _) in step.items()} for step in gathered(case.row, case.dtype, world)]
    if not case.kind.two_way:
        return means
    for number, step in enumerate(means):
        for bucket, numels in enumerate(BUCKETS):
            for owner, share in enumerate(_shares(numels, world, compressor.granularity)):
                for part in share:
                    name, there = names_of(bucket)[part.tensor], slice(part.start, part.stop)
                    total = kept.setdefault(name, torch.zeros(numels[part.tensor], dtype=torch.float64))
                    total[there] += step[name][there]
                    key = derive_key(0, owner, number, f"{name}@server")
                    answer = compressor.decompress(compressor.compress(total[there].to(case.dtype), key))
                    step[name][there] = answer.double()
                    total[there] -= answer
                    if not case.kind.keeps:
                        total[there] = 0
    return means
