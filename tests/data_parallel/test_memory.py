"""Memory beyond parameters, gradients and optimizer: two copies of the parameters, the server's, and two buckets."""

from __future__ import annotations

import time
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_distopt.data_parallel import UpdateSync
from lightning_distopt.exchange import Meter
from tests.data_parallel.replica import config
from tests.ranks import run_ranks

NUMEL, TENSORS = 2**20, 3
BUCKET = 4 * NUMEL  # bytes of one tensor, which is one bucket
SMALL = 0.001  # of a bucket: scales, flags, tables


class LiveTensors(TorchDispatchMode):
    """Watches the memory of all tensors that operations make inside: what lives now, and the most that ever did."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self._storages = {key: (ref, n) for key, (ref, n) in self._storages.items() if not ref.expired()}
        return sum(nbytes for _, nbytes in self._storages.values())

    def settled(self, expected: float) -> int:
        """What lives once the network's threads have let go of what they sent."""
        deadline = time.monotonic() + 2.0
        while self.now() > expected and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.now()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.now()  # forget what has died, before its address is used again
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._storages:
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out


class Row(NamedTuple):
    """A method, and how many copies of the parameters its server keeps on each of ``W`` ranks: 0, "1" or "1/W"."""

    compressor: str
    exchange: str = "all_gather"
    server_compression: bool = False
    server: str = "0"

    def copies(self, world: int) -> float:
        return 2 + {"0": 0.0, "1": 1.0, "1/W": 1.0 / world}[self.server]


ROWS = (
    Row("sign"),
    Row("sign", server_compression=True, server="1"),
    Row("sign", "sharded_server", True, "1/W"),
    Row("topk:0.01"),
    Row("topk:0.01", server_compression=True, server="1"),
    Row("topk:0.01", "sharded_server", True, "1/W"),
    Row("fp32", "all_reduce"),
    Row("bf16", "all_reduce"),
    Row("random_block:0.1", "all_reduce"),
    Row("random_block:0.1", "all_reduce", True, "1"),
)
CASES = [(2, row) for row in ROWS] + [(4, row) for row in (ROWS[0], ROWS[5])]
cases = pytest.mark.parametrize(("world", "row"), CASES, ids=[f"{w} ranks: {' '.join(map(str, r))}" for w, r in CASES])


class Use(NamedTuple):
    """In buckets: what stays, and the most that came and went in ``enter`` and in ``exchange``."""

    persistent: float
    entering: float
    exchanging: float


def _use(rank: int, world: int) -> dict[Row, Use]:
    uses = {}
    for row in (row for ranks, row in CASES if ranks == world):
        params = {str(i): Parameter(torch.randn(NUMEL)) for i in range(TENSORS)}
        with LiveTensors() as live:
            sync = UpdateSync(
                config(
                    row.compressor,
                    row.exchange,
                    server_compression=row.server_compression,
                    bucket_bytes=BUCKET,
                    coefficient=0.3,
                    averaging_period=2,
                ),
                Meter(),
            )
            sync.track(params, dict.fromkeys(params, (0,)))
            sync.enter()
            for param in params.values():
                param.data.mul_(0.99)
            sync.exchange()
            persistent = live.settled((TENSORS * row.copies(world) + SMALL) * BUCKET)
        with LiveTensors() as entering:
            sync.enter()
        for param in params.values():
            param.data.mul_(0.99)
        with LiveTensors() as exchanging:
            sync.exchange()
        uses[row] = Use(persistent / BUCKET, entering.peak / BUCKET, exchanging.peak / BUCKET)
        del sync, params
    return uses


@cache
def use(world: int) -> list[dict[Row, Use]]:
    return run_ranks(world, _use, timeout=50)


@cases
def test_what_stays_is_two_copies_of_the_parameters_and_the_servers(world: int, row: Row) -> None:
    for uses in use(world):
        assert uses[row].persistent == pytest.approx(TENSORS * row.copies(world), abs=SMALL)


@cases
def test_an_exchange_needs_at_most_two_buckets(world: int, row: Row) -> None:
    for uses in use(world):
        assert uses[row].exchanging < 2 + SMALL


@cases
def test_stepping_ahead_needs_nothing(world: int, row: Row) -> None:
    for uses in use(world):
        assert uses[row].entering < SMALL


def test_stepping_ahead_in_half_precision_needs_one_parameter_at_a_time() -> None:
    params = {str(i): Parameter(torch.randn(NUMEL, dtype=torch.bfloat16)) for i in range(TENSORS)}
    sync = UpdateSync(config(), Meter())
    sync.track(params, dict.fromkeys(params, (0,)))
    with LiveTensors() as live:
        sync.enter()
    assert live.peak <= BUCKET


def test_the_check_sees_memory_that_comes_and_goes() -> None:
    """It would notice if an exchange needed more."""
    x = torch.zeros(NUMEL)
    with LiveTensors() as live:
        y = x + x * x  # two new tensors at once
        x.add_(1.0)  # none
        y.view(2, -1)  # none
    assert live.peak == 2 * BUCKET
    assert live.now() == BUCKET
