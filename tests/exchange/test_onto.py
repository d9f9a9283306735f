"""A mean can be added to what is there, without memory of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_distopt.compressors import parse
from lightning_distopt.exchange import (
    AllGatherExchange,
    AllReduceExchange,
    Meter,
    ShardedServerExchange,
    Steps,
    overlap,
)
from tests.compressors.table import gaussian
from tests.ranks import run_ranks

KINDS = {
    "all_reduce": AllReduceExchange,
    "all_gather": AllGatherExchange,
    "sharded_server": partial(ShardedServerExchange, compress_answer=False),
    "sharded_server+answer": partial(ShardedServerExchange, keep_residual=False),
}
CASES = [
    ("fp32", "all_reduce"),
    ("fp16", "all_reduce"),
    ("random_block:0.3", "all_reduce"),
    ("sign", "all_gather"),
    ("topk:0.1", "all_gather"),
    ("bf16", "sharded_server"),
    ("sign", "sharded_server+answer"),
    ("topk:0.1", "sharded_server+answer"),
]
SIZES = (700, 1, 129)


def _both(rank: int, world: int) -> list[tuple[list[Tensor], list[Tensor], list[Tensor], bool]]:
    """By case: the means; what was there; what is there with -0.5 of the means added; and whether it is the same memory."""
    found = []
    for text, kind in CASES:
        compressor = parse(text)
        results: list[list[Tensor]] = []
        there = [gaussian(n, seed=9) for n in SIZES]
        onto = [tensor.clone() for tensor in there]

        def work(onto: list[Tensor] | None, compressor=compressor, kind=kind, results=results) -> Steps:  # type: ignore[no-untyped-def]
            exchange = KINDS[kind](compressor, Meter())
            payloads = [compressor.compress(gaussian(n, seed=10 * rank + i), 7) for i, n in enumerate(SIZES)]
            results.append((yield from exchange.mean(["a", "b", "c"], payloads, 0, onto=onto, alpha=-0.5)))

        overlap([work(None)])
        overlap([work(onto)])
        found.append((results[0], there, onto, all(a is b for a, b in zip(results[1], onto, strict=True))))
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_a_share_of_the_mean_is_added_in_place(world: int) -> None:
    ranks = run_ranks(world, _both)
    for rank in ranks:
        for case, (means, there, onto, same) in zip(CASES, rank, strict=True):
            assert same, case
            for mean, before, after in zip(means, there, onto, strict=True):
                torch.testing.assert_close(after, before - 0.5 * mean, rtol=1e-5, atol=1e-6)
    for rank in ranks[1:]:
        for (_, _, first, _), (_, _, other, _) in zip(ranks[0], rank, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), "all ranks hold the same bits"
