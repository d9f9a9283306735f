"""Bytes from anywhere are the payload that was sent, or a typed error; and nothing large is allocated to find out."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distopt.compressors import TopK
from lightning_distopt.compressors.base import Compressor, Payload
from lightning_distopt.compressors.framing import _digest, _fixed_of, frame, unframe
from lightning_distopt.errors import PayloadError
from tests.compressors.table import ROWS, dtypes, gaussian, rows, same_payload

SHAPE = (7, 31)
FIXED = 36


def framed(compressor: Compressor, dtype: torch.dtype = torch.float32) -> tuple[Payload, bytes]:
    payload = compressor.compress(gaussian(*SHAPE, dtype=dtype), 12345)
    return payload, frame(payload)


def signed(data: bytes) -> bytes:
    """Give damaged bytes a digest that fits, as a sender could who means harm."""
    fields = struct.unpack("<4sHBBHHQ16s", data[:FIXED])
    header_bytes = fields[5]
    unsigned = _fixed_of(fields[2], fields[3], fields[4], (fields[5], fields[6]), b"")
    return data[: FIXED - 16] + _digest(unsigned, data[FIXED:header_bytes], data[header_bytes:]) + data[FIXED:]


@rows()
@dtypes
def test_what_was_framed_comes_back(row: Any, dtype: torch.dtype) -> None:
    compressor = row.make()
    payload, data = framed(compressor, dtype)
    back = unframe(data, compressor, SHAPE, dtype)
    assert same_payload(back.fields, payload.fields)
    assert (back.shape, back.dtype, back.key) == (payload.shape, payload.dtype, payload.key)
    assert torch.equal(compressor.decompress(back), compressor.decompress(payload))
    assert len(data) == payload.nbytes + FIXED + 8 + 8 * len(SHAPE) + 16 * len(payload.fields)


@given(row=st.sampled_from(ROWS), bit=st.integers(0), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_is_noticed(row: Any, bit: int, data: Any) -> None:
    compressor = row.make()
    damaged = bytearray(framed(compressor)[1])
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PayloadError):
        unframe(damaged, compressor, SHAPE)


@given(row=st.sampled_from(ROWS), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_cut_or_an_addition_is_noticed(row: Any, data: Any) -> None:
    compressor = row.make()
    whole = framed(compressor)[1]
    with pytest.raises(PayloadError):
        unframe(whole[: data.draw(st.integers(0, len(whole) - 1))], compressor, SHAPE)
    with pytest.raises(PayloadError, match="cut off or added to"):
        unframe(whole + data.draw(st.binary(min_size=1, max_size=9)), compressor, SHAPE)


@given(data=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_bytes_that_mean_nothing_are_refused(data: bytes) -> None:
    for start in (b"", b"LDOP", b"LDOP\x01\x00\x00\x02\x02\x00"):
        with pytest.raises(PayloadError):
            unframe(start + data, TopK(0.1), SHAPE)


@pytest.mark.parametrize(
    ("offset", "form", "value", "reason"),
    [
        (0, "<4s", b"PK\3\4", "begins with b'LDOP'"),
        (4, "<H", 2, "Version 1 of the format is known: got 2"),
        (6, "<B", 1, "was expected: got"),  # another dtype
        (6, "<B", 200, "was expected: got"),
        (7, "<B", 255, "at most 32 dimensions"),
        (8, "<H", 65535, "at most 32 dimensions and 16 fields"),
        (10, "<H", 65535, "The header's length"),
        (12, "<Q", 2**64 - 1, "The header promises"),
        (12, "<Q", 0, "The header promises"),
        (FIXED + 8, "<Q", 2**63, "was expected: got"),  # a dimension
        (FIXED + 24, "<B", 5, "sends the fields"),
        (FIXED + 32, "<Q", 2**60, "sends the fields"),  # elements of a field
    ],
)
def test_a_lie_in_the_header_is_refused_at_once(offset: int, form: str, value: Any, reason: str) -> None:
    damaged = bytearray(framed(TopK(0.1))[1])
    struct.pack_into(form, damaged, offset, value)
    data = signed(bytes(damaged)) if offset != 10 else bytes(damaged)
    tracemalloc.start()
    with pytest.raises(PayloadError, match=reason):
        unframe(data, TopK(0.1), SHAPE)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("places", [[-1, 3], [5, 3], [3, 3], [0, 217], [0, 2**31 - 1], [0, 2**31 - 9, -(2**31) + 9, 5]])
def test_places_outside_of_the_tensor_are_refused(places: list[int]) -> None:
    fields = {"values": torch.ones(len(places)), "indices": torch.tensor(places, dtype=torch.int32)}
    data = frame(Payload(fields, torch.Size(SHAPE), torch.float32))
    with pytest.raises(PayloadError, match="are not ascending places below 217"):
        unframe(data, TopK((len(places) + 0.5) / 217), SHAPE)


@rows(without="linear")
def test_whatever_a_well_made_payload_holds_it_decodes_to_finite_numbers_or_is_refused(row: Any) -> None:
    compressor = row.make()
    payload, _ = framed(compressor)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        fields = {
            name: torch.randint(0, 256, (values.nbytes,), dtype=torch.uint8, generator=generator).view(values.dtype)
            for name, values in payload.fields.items()
        }
        try:
            back = unframe(frame(Payload(fields, payload.shape, payload.dtype)), compressor, SHAPE)
        except PayloadError:
            continue
        assert not compressor.decompress(back).isnan().any()


def test_a_nan_is_refused() -> None:
    payload, _ = framed(TopK(0.1))
    payload.fields["values"][3] = float("nan")
    with pytest.raises(PayloadError, match="`values` holds a NaN"):
        unframe(frame(payload), TopK(0.1), SHAPE)


def test_another_compressor_or_tensor_than_agreed_on_is_refused() -> None:
    data = framed(TopK(0.1))[1]
    for compressor, shape in ((TopK(0.2), SHAPE), (TopK(0.1), (31, 7)), (TopK(0.1), (217,)), (ROWS[3].make(), SHAPE)):
        with pytest.raises(PayloadError):
            unframe(data, compressor, shape)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_damaged_payloads() -> None:
    """Every refusal is a ``PayloadError``; with a digest that fits, what is accepted decodes."""
    chance = random.Random(0)
    samples = [(row.make(), *framed(row.make())) for row in ROWS]
    accepted = 0
    for number in range(100_000):
        compressor, payload, whole = samples[number % len(samples)]
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            kind = chance.randrange(4)
            at = chance.randrange(len(damaged)) if damaged else 0
            if kind == 0 and damaged:
                damaged[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del damaged[at:]
            elif kind == 2:
                damaged[at:at] = chance.randbytes(chance.randrange(1, 9))
            elif damaged:
                damaged[at : at + 8] = chance.randbytes(8)
        honest = bytes(damaged) == whole
        try:
            resigned = signed(bytes(damaged)) if number % 2 and len(damaged) > FIXED else bytes(damaged)
            back = unframe(resigned, compressor, payload.shape)
        except PayloadError:
            assert not honest
            continue
        assert number % 2 or honest
        assert not compressor.decompress(back).isnan().any()
        accepted += 1
    assert accepted < 50_000
