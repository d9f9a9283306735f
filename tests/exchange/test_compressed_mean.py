"""Who draws what: quantisers draw apart on every rank, in every step and for every parameter, again from the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_distopt.compressors import parse
from lightning_distopt.exchange import AllGatherExchange, CompressedMean, Meter
from tests.compressors.table import gaussian
from tests.ranks import run_ranks

SEEDS = (3, 3, 4)


def _codes(rank: int, world: int, text: str) -> list[list[Tensor]]:
    """Return what every rank has sent, for each seed and two steps: two parameters that are alike on all ranks."""
    flat = torch.cat([gaussian(300), gaussian(300)])
    sent = []
    for seed in SEEDS:
        mean = CompressedMean(AllGatherExchange(parse(text), Meter()), seed=seed)
        for step in range(2):
            work = mean.mean_(["a", "b"], flat.split(300), flat, step)
            try:
                while True:
                    next(work)
            except StopIteration as end:
                sent.append([piece.payload.fields["codes"].clone() for piece in end.value.arrived.pieces])
    return sent


@pytest.mark.parametrize("text", ["orq:5", "qsgd:5", "terngrad", "linear:5", "bingrad_pb"])
def test_draws_differ_by_rank_step_and_parameter_and_follow_the_seed(text: str) -> None:
    everyones = run_ranks(2, _codes, text)
    assert all(
        torch.equal(a, b) for mine, theirs in zip(*everyones, strict=True) for a, b in zip(mine, theirs, strict=True)
    )
    first, second, again, again_second, other, _ = everyones[0]
    assert len(first) == 4  # two ranks, two parameters
    assert not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first + second, again + again_second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
