"""Packed codes: every symbol comes back, and nothing travels that need not."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_distopt.compressors.bits import pack_bits
from lightning_distopt.compressors.codes import alignment, pack_codes, packed_bytes, unpack_codes


@settings(deadline=None)
@given(numel=st.integers(0, 3000), symbols=st.integers(2, 256), seed=st.integers(0, 1000))
def test_codes_come_back_and_have_the_announced_bytes(numel: int, symbols: int, seed: int) -> None:
    codes = torch.randint(symbols, (numel,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, symbols)
    assert packed.shape == (packed_bytes(numel, symbols),)
    assert torch.equal(unpack_codes(packed, numel, symbols), codes)


@pytest.mark.parametrize("symbols", [2, 3, 5, 9, 255])
def test_long_tensors_are_packed_in_parts_that_join(symbols: int) -> None:
    codes = torch.randint(symbols, (40 * (1 << 13) * 2 + 77,), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(unpack_codes(pack_codes(codes, symbols), codes.numel(), symbols), codes)


@pytest.mark.parametrize(
    ("symbols", "numel", "nbytes"),
    [
        (2, 2048, 256),
        (3, 2048, 410),
        (3, 10240, 2048),
        (5, 2048, 768),
        (9, 2048, 1024),
        (4, 8, 2),
        (255, 8, 8),
        (5, 1, 1),
    ],
)
def test_bytes_are_those_of_the_table(symbols: int, numel: int, nbytes: int) -> None:
    assert packed_bytes(numel, symbols) == nbytes


@pytest.mark.parametrize(
    ("symbols", "codes", "packed"),
    [
        (3, [1, 2, 0, 1, 2], [1 + 2 * 3 + 0 * 9 + 1 * 27 + 2 * 81]),
        (5, [1, 2, 3, 4, 0, 1, 2, 3], [0b11_010_001, 0b1_000_100_0, 0b011_010_00]),
        (9, [1, 2, 3], [0x21, 0x03]),
    ],
)
def test_the_layout_is_the_drawn_one(symbols: int, codes: list[int], packed: list[int]) -> None:
    assert pack_codes(torch.tensor(codes, dtype=torch.uint8), symbols).tolist() == packed


def test_two_symbols_are_plain_bits() -> None:
    codes = torch.randint(2, (1001,), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(pack_codes(codes, 2), pack_bits(codes.bool()))


@pytest.mark.parametrize("symbols", [2, 3, 5, 9])
def test_cuts_at_the_alignment_are_whole_bytes(symbols: int) -> None:
    codes = torch.randint(symbols, (400,), generator=torch.Generator().manual_seed(0)).byte()
    cut = 7 * alignment(symbols)
    ends = pack_codes(codes[:cut], symbols), pack_codes(codes[cut:], symbols)
    assert torch.equal(torch.cat(ends), pack_codes(codes, symbols))
