"""What is special about the all-reduce: fields are summed as they travel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_distopt.compressors import Compressor, Dense, RandomBlock
from lightning_distopt.exchange import AllReduceExchange, Exchange, Meter, ShardedServerExchange, Steps, overlap
from tests.compressors.table import gaussian
from tests.ranks import run_ranks


def mean_of(exchange: Exchange, v: Tensor, key: int = 0) -> Tensor:
    means: list[Tensor] = []

    def work() -> Steps:
        means.extend((yield from exchange.mean(["v"], [exchange.compressor.compress(v, key)], 0)))

    overlap([work()])
    return means[0]


def _largest_float16(rank: int, world: int, compressor: Compressor, dtype: torch.dtype) -> Tensor:
    return mean_of(AllReduceExchange(compressor, Meter()), torch.full((1000,), 65504.0, dtype=dtype))


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize(
    ("compressor", "dtype"),
    [(Dense("float16"), torch.float32), (Dense("float16"), torch.float16), (RandomBlock(1.0), torch.float16)],
    ids=["dense of float32", "dense of float16", "block of float16"],
)
def test_the_largest_float16_on_every_rank_does_not_overflow(
    compressor: Compressor, dtype: torch.dtype, world: int
) -> None:
    means = run_ranks(world, _largest_float16, compressor, dtype)
    # Three roundings of 11 bits: of two sums and of the result.
    torch.testing.assert_close(means[0].double(), torch.full((1000,), 65504.0).double(), rtol=3 * 2.0**-11, atol=0)


def _both(rank: int, world: int) -> tuple[Tensor, Tensor]:
    v = gaussian(1000, seed=rank)
    dense = Dense("bfloat16")
    return (
        mean_of(AllReduceExchange(dense, Meter()), v),
        mean_of(ShardedServerExchange(dense, Meter(), compress_answer=False), v),
    )


def test_a_16_bit_sum_is_rounded_here_and_taken_in_float32_by_the_sharded_server() -> None:
    reduced, served = run_ranks(3, _both)[0]
    exact = torch.stack([gaussian(1000, seed=rank).bfloat16().double() for rank in range(3)]).mean(0)
    assert float((served - exact).abs().max()) < 1e-6, "float32"
    assert 1e-3 < float((reduced - exact).abs().max()) < 3 * 2.0**-8 * 4, "bfloat16: 8 bits of sums below 12"


def _subgroup(rank: int, world: int) -> tuple[Tensor | None, int]:
    pair = torch.distributed.new_group([0, 2])
    if rank == 1:
        return None, 0
    meter = Meter()
    mean = mean_of(AllReduceExchange(Dense(), meter, pair), torch.full((10,), float(rank)))
    return mean, meter.bytes_sent


def test_a_process_group_limits_the_mean_and_the_bytes_to_its_ranks() -> None:
    outcomes = run_ranks(3, _subgroup)
    for rank in (0, 2):
        mean, sent = outcomes[rank]
        assert torch.equal(mean, torch.ones(10))
        assert sent == 40


def test_without_a_process_group_one_rank_gets_its_own_values() -> None:
    v = gaussian(10)
    assert torch.equal(mean_of(AllReduceExchange(Dense(), Meter()), v), v)
