"""Every byte that the update engine sends is counted under its purpose, as formulas predict."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import Parameter

from lightning_distopt.data_parallel import UpdateSync
from lightning_distopt.exchange import Meter
from tests.data_parallel.replica import config
from tests.ranks import run_ranks

SIZES = [1024, 64, 1]  # two buckets: 1024 | 64, 1
STEPS = 6


class Row(NamedTuple):
    """A method and the bytes that a rank of ``W`` ranks sends in one exchange, by hand."""

    method: dict[str, Any]
    exchange: dict[int, int]


def ring(nbytes: int, world: int) -> int:
    return 2 * nbytes * (world - 1) // world


SIGN = (1024 // 8 + 4) + (64 // 8 + 4) + (1 + 4)  # bits and a float32 scale for each tensor
TOP = 8 * (10 + 1 + 1)  # float32 and int32 for each of 1 % of 1024, and at least one
BLOCK = [4 * 102, 4 * (6 + 1)]  # float32 for each of 10 %, by bucket

ROWS = [
    Row({"compressor": "sign"}, {2: SIGN, 4: 3 * SIGN}),
    Row({"compressor": "sign", "server_compression": True}, {2: SIGN, 4: 3 * SIGN}),
    Row({"compressor": "topk:0.01"}, {2: TOP, 4: 3 * TOP}),
    Row(
        {"compressor": "fp32", "exchange": "all_reduce"},
        {w: ring(4 * 1024, w) + ring(4 * 65, w) for w in (2, 4)},
    ),
    Row(
        {"compressor": "bf16", "exchange": "all_reduce"},
        {w: ring(2 * 1024, w) + ring(2 * 65, w) for w in (2, 4)},
    ),
    Row(
        {"compressor": "random_block:0.1", "exchange": "all_reduce"},
        {w: ring(BLOCK[0], w) + ring(BLOCK[1], w) for w in (2, 4)},
    ),
    # All dense: 4 bytes an element, whatever would be sent otherwise
    Row({"compressor": "sign", "dense_steps": 99}, {w: ring(4 * 1024, w) + ring(4 * 65, w) for w in (2, 4)}),
    # One vector: one scale
    Row({"compressor": "sign", "scope": "model"}, {2: 1089 // 8 + 1 + 4, 4: 3 * (1089 // 8 + 1 + 4)}),
]


def _train(
    rank: int, world: int, method: dict[str, Any], sizes: list[int]
) -> tuple[dict[str, int], dict[str, int], int, int]:
    params = {str(n): Parameter(torch.randn(n)) for n in sizes}
    meter = Meter()
    sync = UpdateSync(config(averaging_period=3, bucket_bytes=4096, **method), meter)
    for step in range(STEPS):
        sync.track(params, dict.fromkeys(params, (0,)))
        sync.enter()
        for param in params.values():
            param.data.sub_(torch.randn_like(param) * (rank + 1 + step))
        sync.exchange()
    return dict(meter.sent), dict(meter.received), meter.steps, meter.dense_bytes


def _train_all(rank: int, world: int) -> list[Any]:
    return [_train(rank, world, row.method, SIZES) for row in ROWS]


@cache
def meters(world: int) -> list[Any]:
    return run_ranks(world, _train_all)


worlds = pytest.mark.parametrize("world", [2, 4])
rows = pytest.mark.parametrize("row", range(len(ROWS)), ids=[str(row.method) for row in ROWS])


@worlds
@rows
def test_bytes_by_purpose_are_those_of_the_formulas(row: int, world: int) -> None:
    buckets = [1089] if "scope" in ROWS[row].method else [1024, 65]
    averagings = 0 if "dense_steps" in ROWS[row].method else 2
    expected = {
        "setup": ring(16 * world, world) + ring(24 * world, world),  # names alike; counters alike
        "flag": (STEPS + averagings) * ring(32, world),  # before each exchange and each averaging
        "averaging": averagings * sum(ring(4 * n, world) for n in buckets),
        "exchange": STEPS * ROWS[row].exchange[world],
    }
    for ranks in meters(world):
        sent, received, _, _ = ranks[row]
        assert {purpose: n for purpose, n in sent.items() if n} == {p: n for p, n in expected.items() if n}
        assert received == sent, "rings and all-gathers are symmetric"


@worlds
@rows
def test_ddp_would_have_sent_all_gradients_on_a_ring(row: int, world: int) -> None:
    for ranks in meters(world):
        _, _, steps, dense = ranks[row]
        assert (steps, dense) == (STEPS, STEPS * ring(4 * sum(SIZES), world))


def _sharded(rank: int, world: int, method: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], int, int]:
    return _train(rank, world, {"exchange": "sharded_server", **method}, [1024])


@worlds
def test_a_sharded_server_sends_two_payloads_whatever_the_number_of_ranks(world: int) -> None:
    part = 1024 // world // 8 + 4  # bits of a share, and a scale
    for sent, _, _, _ in run_ranks(world, _sharded, {"compressor": "sign", "server_compression": True}):
        assert sent["exchange"] == STEPS * 2 * (world - 1) * part


@worlds
def test_a_sharded_server_without_compression_answers_in_full_precision(world: int) -> None:
    up = 1024 // world // 8 + 4
    for sent, _, _, _ in run_ranks(world, _sharded, {"compressor": "sign"}):
        assert sent["exchange"] == STEPS * (world - 1) * (up + 4 * 1024 // world)


@worlds
def test_top_k_by_a_sharded_server_sends_sizes_and_what_others_own(world: int) -> None:
    """What goes up depends on where the entries are: in all, W payloads less what owners keep; and a size for each part."""
    ranks = run_ranks(world, _sharded, {"compressor": "topk:0.125", "server_compression": True})
    payload, answer, sizes = 8 * 128, 8 * (128 // world), 4
    for sent, _, _, _ in ranks:
        fixed = (world - 1) * (sizes + answer)
        assert STEPS * fixed <= sent["exchange"] <= STEPS * (fixed + payload)
    assert sum(sent["exchange"] for sent, *_ in ranks) == sum(received["exchange"] for _, received, *_ in ranks)
