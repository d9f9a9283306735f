"""The table of runs: each row trains once on each number of ranks, and many tests look at what it left."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.data_parallel.reference import C, Moment, Span, family, server_spans, sign, spans_of, top
from tests.data_parallel.replica import SIZE, SIZES, Replica, config, decaying, flat
from tests.ranks import run_ranks

STEPS, SHORT = 60, 21  # optimizer steps of the runs compared with the reference, and of the others
DISTURBED = 7  # the round before which a row's disturbance happens


class Row(NamedTuple):
    """A point in the engine's parameter space.

    Args:
        compressor: as text.
        exchange: "all_gather" or "sharded_server".
        two_way: compress the mean again.
        alpha: coefficient.
        period: of averaging.
        every: local steps a round.
        dtype: of the parameters.
        bucket_bytes: 400 makes two buckets of the four tensors, in float32 and in float64.
        scope: "tensor" or "model".
        disturbance: what happens to the residuals in the middle: nothing, "permute" or "drop".
    """

    compressor: str
    exchange: str = "all_gather"
    two_way: bool = False
    alpha: float = 1.0
    period: int = 0
    every: int = 1
    dtype: torch.dtype = torch.float64
    bucket_bytes: float = 400.0
    scope: str = "tensor"
    disturbance: str = ""

    @property
    def name(self) -> str:
        way = "two-way" if self.two_way else "one-way"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.compressor} {self.exchange} {way} a={self.alpha} p={self.period} H={self.every} {dtype} "
            f"{self.scope} {self.disturbance}"
        ).strip()

    def make(self, **optimizer: Any) -> Replica:
        return Replica(
            config(
                self.compressor,
                self.exchange,
                server_compression=self.two_way,
                coefficient=self.alpha,
                averaging_period=self.period,
                sync_every=self.every,
                bucket_bytes=self.bucket_bytes,
                scope=self.scope,
            ),
            self.dtype,
            **optimizer,
        )

    def reference_compressor(self) -> C:
        name, _, ratio = self.compressor.partition(":")
        return {"sign": lambda: sign, "topk": lambda: top(float(ratio))}[name]()

    def server_spans(self, ranks: int) -> list[Span] | None:
        if not self.two_way:
            return None
        if self.exchange == "all_gather":
            return self.spans()
        return server_spans(self.buckets(), ranks)

    def spans(self) -> list[Span]:
        return [(0, SIZE)] if self.scope == "model" else spans_of(SIZES)

    def buckets(self) -> list[list[int]]:
        """Sizes of the tensors of each bucket, drawn by hand for ``SHAPES``."""
        if self.scope == "model":
            return [[SIZE]]
        assert (self.bucket_bytes, SIZES) == (400.0, [35, 13, 1, 120]), "drawn for these"
        return [[35, 13, 1], [120]]


class Outcome(NamedTuple):
    """What one rank saw, one row a round: ``x``, ``e``, its part of ``s``, the sum of its local steps; the bits of ``x``."""

    x: Tensor
    e: Tensor
    s: Tensor
    steps: Tensor


_WAYS = (("all_gather", False), ("all_gather", True), ("sharded_server", True))
_ALPHAS = (0.0, 0.3, 1.0)


def _row(a: int, w: int, p: int, h: int, c: int) -> Row:
    return Row(("sign", "topk:0.1")[c % 2], *_WAYS[w], _ALPHAS[a], (0, 5)[p % 2], (1, 3)[h % 2])


def _grid() -> tuple[Row, ...]:
    """Every alpha, way, period and number of local steps; the compressors alternate, so that each meets all of them."""
    return tuple(_row(a, w, p, h, a + w + p + h) for a, w, p, h in product(range(3), range(3), range(2), range(2)))


def _pairs() -> tuple[Row, ...]:
    """Every alpha by every way, and every pair of any other two settings: 4 ranks take three times as long."""
    return tuple(_row(i // 3, i % 3, i, i // 2, i + i // 2) for i in range(9))


REFERENCE_ROWS = {
    2: (*_grid(), Row("sign", alpha=0.3, scope="model"), Row("topk:0.1", "sharded_server", True, 0.3, scope="model")),
    4: _pairs(),
}
"""Runs in float64 that are compared with the reference."""

OTHER_ROWS = {
    2: (
        *(Row("sign", *way, alpha, 5, dtype=torch.float32) for way in _WAYS for alpha in _ALPHAS),
        *(Row("sign", *way, alpha, disturbance="permute") for way in _WAYS for alpha in _ALPHAS[1:]),
    ),
    4: (
        *(Row("topk:0.1", *way, alpha, 5, dtype=torch.float32) for way, alpha in zip(_WAYS, _ALPHAS, strict=True)),
        Row("topk:0.1", alpha=1.0, disturbance="permute"),
    ),
}
"""In float32, and with residuals that change places among the ranks."""

DROPPED_ROW = Row("sign", alpha=1.0, disturbance="drop")


def run_row(rank: int, world: int, row: Row, steps: int) -> Outcome:
    replica = row.make()
    moments = []
    while replica.steps < steps:
        if row.disturbance and replica.steps == DISTURBED * row.every:
            _disturb(replica, rank, world, row.disturbance)
        done = torch.zeros(SIZE, dtype=torch.float64)
        exchanged = False
        while not exchanged:
            replica.track()
            replica.sync.enter()
            before = flat(replica.params).double()
            replica.take_gradients()
            replica.local_step()
            done += before - flat(replica.params).double()
            exchanged = replica.sync.exchange()
        moments.append((replica.x, replica.e, replica.s, done))
    return Outcome(*(torch.stack(column) for column in zip(*moments, strict=True)))


def _disturb(replica: Replica, rank: int, world: int, how: str) -> None:
    for bucket in replica.sync.buckets:
        if how == "drop":
            bucket.residual.flat.zero_()
        else:
            everyones = [torch.empty_like(bucket.residual.flat) for _ in range(world)]
            dist.all_gather(everyones, bucket.residual.flat)
            bucket.residual.flat.copy_(everyones[(rank + 1) % world])


def _run_rows(rank: int, world: int, rows: tuple[Row, ...]) -> list[Outcome]:
    outcomes = []
    for row in rows:
        try:
            outcomes.append(run_row(rank, world, row, STEPS if row in REFERENCE_ROWS[world] else SHORT))
        except Exception as error:
            raise RuntimeError(f"in {row.name}") from error
    return outcomes


@cache
def _together(world: int, rows: tuple[Row, ...]) -> list[list[Outcome]]:
    return run_ranks(world, _run_rows, rows, timeout=55)


def outcomes(world: int, row: Row) -> list[Outcome]:
    """Return what each rank saw; rows of one table and alpha run together, once for all tests."""
    table = next((t for t in (REFERENCE_ROWS[world], OTHER_ROWS[world]) if row in t), (row,))
    rows = tuple(other for other in table if other.alpha == row.alpha)
    return [ranks[rows.index(row)] for ranks in _together(world, rows)]


def reference(row: Row, world: int, problem: Any, rounds: int) -> list[Moment]:
    moments = family(
        problem,
        world,
        compress=row.reference_compressor(),
        spans=row.spans(),
        server=row.server_spans(world),
        alpha=row.alpha,
        period=row.period,
        local_steps=row.every,
        lr=decaying,
        momentum=0.9,
        weight_decay=0.01,
    )
    return [next(moments) for _ in range(rounds)]
