"""Bits are really packed, in the documented order."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_distopt.compressors.bits import add_signs_, pack_bits, unpack_bits


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), max_size=70))
def test_element_i_is_bit_i_mod_8_of_byte_i_div_8(bits: list[bool]) -> None:
    expected = [sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
    assert pack_bits(torch.tensor(bits, dtype=torch.bool)).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), max_size=70))
def test_unpacking_undoes_packing(bits: list[bool]) -> None:
    tensor = torch.tensor(bits, dtype=torch.bool)
    unpacked = unpack_bits(pack_bits(tensor), len(bits))
    assert unpacked.dtype is torch.bool
    assert torch.equal(unpacked, tensor)


def test_every_byte_survives() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_bits(unpack_bits(packed, 2048)), packed)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 16])
def test_a_byte_holds_eight(numel: int) -> None:
    packed = pack_bits(torch.ones(numel, dtype=torch.bool))
    assert (packed.dtype, packed.numel()) == (torch.uint8, -(-numel // 8))


@pytest.mark.parametrize("view", [slice(3, 19), slice(5, 18), slice(0, 32, 2)], ids=str)
def test_a_slice_packs_like_its_copy(view: slice) -> None:
    bits = torch.rand(40) > 0.5
    assert torch.equal(pack_bits(bits[view]), pack_bits(bits[view].clone()))


def test_a_slice_of_bytes_unpacks_like_its_copy() -> None:
    packed = torch.arange(100, 140, dtype=torch.uint8)
    assert torch.equal(unpack_bits(packed[3:9], 45), unpack_bits(packed[3:9].clone(), 45))


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 2**18, 2**18 + 1, 2**19 + 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adding_signs_equals_unpacking_then_adding(numel: int, dtype: torch.dtype) -> None:
    out, scale = torch.randn(numel).to(dtype), torch.tensor([0.3]).to(dtype)
    bits = torch.rand(numel) < 0.5
    expected = out + torch.where(bits, scale, -scale)
    add_signs_(pack_bits(bits), scale, out)
    assert torch.equal(out, expected)
