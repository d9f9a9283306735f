"""What is special about random blocks: the same consecutive places on all ranks, wrapping round the end."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_distopt.compressors import RandomBlock
from lightning_distopt.compressors.randomness import hash64


def kept_places(numel: int, ratio: float, key: int) -> list[int]:
    compressor = RandomBlock(ratio)
    return compressor.decompress(compressor.compress(torch.ones(numel), key)).nonzero().view(-1).tolist()


@settings(deadline=None, max_examples=100)
@given(numel=st.integers(1, 300), ratio=st.floats(0.01, 1), key=st.integers(0, 2**64 - 1))
def test_the_block_starts_where_the_hash_says_and_wraps_round(numel: int, ratio: float, key: int) -> None:
    k, start = max(1, int(numel * ratio)), hash64(key, 0) % numel
    assert kept_places(numel, ratio, key) == sorted((start + i) % numel for i in range(k))


def test_a_block_that_wraps_carries_the_end_first() -> None:
    key = next(key for key in range(1000) if hash64(key, 0) % 10 == 8)
    values = RandomBlock(0.4).compress(torch.arange(10.0), key).fields["values"]
    assert values.tolist() == [8.0, 9.0, 0.0, 1.0]


def test_other_values_under_the_same_key_take_the_same_places() -> None:
    compressor = RandomBlock(0.1)
    places = [
        compressor.decompress(compressor.compress(torch.full((100,), value), 77)).nonzero().view(-1).tolist()
        for value in (1.0, -3.0)
    ]
    assert places[0] == places[1]


def test_every_place_is_kept_equally_often() -> None:
    draws, share = 4000, 0.2
    counts = torch.zeros(50)
    for key in range(draws):
        counts[kept_places(50, share, key)] += 1
    # Binomial: a standard deviation of 25 around 800; five of them for the worst of 50 places.
    assert bool(((counts - draws * share).abs() < 5 * (draws * share * (1 - share)) ** 0.5).all())


def test_the_mean_share_that_is_left_is_what_was_not_kept() -> None:
    v = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    compressor, total = RandomBlock(0.25), float(v.square().sum())
    left = []
    for key in range(3000):
        residual = v.clone()
        compressor.compress_(residual, key)
        left.append(float(residual.square().sum()) / total)
    draws = torch.tensor(left)
    assert abs(float(draws.mean()) - 0.75) < 5 * float(draws.std()) / 3000**0.5


def test_no_places_travel() -> None:
    assert RandomBlock(1 / 64).nbytes(6400) == 100 * 4


def test_a_value_outside_the_block_that_is_not_finite_is_not_hidden() -> None:
    v = torch.ones(100)
    v[(hash64(5, 0) + 50) % 100] = torch.nan
    payload = RandomBlock(0.1).compress(v, 5, assume_finite=True)
    assert bool(payload.fields["values"].isnan().all())


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001])
def test_a_ratio_outside_its_range_is_refused_with_value_and_rule(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"`ratio` must be in \(0, 1\].*got {ratio}"):
        RandomBlock(ratio)
