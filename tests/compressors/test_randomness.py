"""One definition of randomness: the tensor version gives the bits of the plain-Python one."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_distopt.compressors.randomness import derive_key, fresh_key, hash64, uniform

KEYS = st.integers(0, 2**64 - 1)


def test_the_hash_is_splitmix64() -> None:
    # The first outputs of the published generator seeded with 1234567 (its state is key + (i + 1) * golden ratio).
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [hash64(1234567, i) for i in range(5)] == published


@settings(deadline=None, max_examples=50)
@given(key=KEYS)
def test_uniforms_are_the_top_bits_of_the_hash_bit_for_bit(key: int) -> None:
    assert uniform(key, 20).tolist() == [(hash64(key, i) >> 40) / 2**24 for i in range(20)]


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, -1, 2**64])
def test_keys_at_the_sign_bit_agree_too(key: int) -> None:
    assert uniform(key, 100).tolist() == [(hash64(key, i) >> 40) / 2**24 for i in range(100)]


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert torch.equal(uniform(9, 1000)[:10], uniform(9, 10))


def test_uniforms_lie_in_the_half_open_interval() -> None:
    u = uniform(3, 100_000)
    assert u.dtype is torch.float32
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0


@pytest.mark.parametrize("key", [0, 1, 2**63 + 5])
def test_uniforms_have_the_moments_of_the_uniform_distribution(key: int) -> None:
    u, n = uniform(key, 200_000).double(), 200_000
    # Five standard errors: 1/sqrt(12 n) of the mean, 1/sqrt(180 n) of the variance.
    assert abs(float(u.mean()) - 1 / 2) < 5 / math.sqrt(12 * n)
    assert abs(float(u.var()) - 1 / 12) < 5 / math.sqrt(180 * n)


@pytest.mark.parametrize("lag", [1, 2, 8, 1024])
def test_neighbours_are_uncorrelated(lag: int) -> None:
    u = uniform(7, 200_000).double() - 0.5
    correlation = float((u[lag:] * u[:-lag]).mean()) * 12
    assert abs(correlation) < 5 / math.sqrt(len(u) - lag), "five standard errors"


def test_neighbouring_keys_are_uncorrelated() -> None:
    a, b = (uniform(key, 200_000).double() - 0.5 for key in (100, 101))
    assert abs(float((a * b).mean()) * 12) < 5 / math.sqrt(200_000), "five standard errors"


def test_every_bit_of_the_hash_flips_half_of_the_time_when_a_bit_of_the_key_does() -> None:
    flips = [bin(hash64(key, 0) ^ hash64(key ^ (1 << bit), 0)).count("1") for key in range(100) for bit in range(64)]
    # 6400 draws of Binomial(64, 1/2): standard error of the mean 4 / 80.
    assert abs(sum(flips) / len(flips) - 32) < 5 * 4 / math.sqrt(len(flips))


def test_seed_rank_step_and_tensor_each_enter_the_key() -> None:
    draws = [(s, r, t, n) for s in range(4) for r in range(4) for t in range(4) for n in ("weight", "bias")]
    assert len({derive_key(*draw) for draw in draws}) == len(draws)


def test_swapping_rank_and_step_gives_another_key() -> None:
    assert derive_key(0, 1, 2, "w") != derive_key(0, 2, 1, "w")


@settings(deadline=None)
@given(seed=st.integers(-(2**70), 2**70), rank=st.integers(0, 10**6), step=st.integers(0, 10**9), name=st.text())
def test_any_seed_gives_a_64_bit_key(seed: int, rank: int, step: int, name: str) -> None:
    assert 0 <= derive_key(seed, rank, step, name) < 2**64


def test_the_key_of_a_place_never_changes_between_versions() -> None:
    # Runs repeat, and other languages' kernels agree, only while this number stays.
    assert derive_key(42, 1, 7, "layer.weight") == 11701197283502391345


def test_fresh_keys_follow_the_global_generator() -> None:
    torch.manual_seed(5)
    first = [fresh_key() for _ in range(3)]
    torch.manual_seed(5)
    assert [fresh_key() for _ in range(3)] == first


def test_fresh_keys_use_all_64_bits() -> None:
    keys = [fresh_key() for _ in range(200)]
    assert all(0 <= key < 2**64 for key in keys)
    assert all(0 < sum(key >> bit & 1 for key in keys) < 200 for bit in range(64))
