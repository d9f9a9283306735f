"""The wire format: every field aligned, not a byte between them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_distopt.compressors import Payload
from lightning_distopt.compressors.base import Field
from lightning_distopt.exchange.wire import Wire

DTYPES = st.sampled_from([torch.uint8, torch.int32, torch.bfloat16, torch.float16, torch.float32, torch.float64])
LAYOUTS = st.lists(st.lists(st.tuples(DTYPES, st.integers(0, 9)), max_size=3), max_size=5)
CPU = torch.device("cpu")


def layouts_of(kinds: Any) -> list[tuple[Field, ...]]:
    return [tuple(Field(f"field{i}", dtype, n) for i, (dtype, n) in enumerate(fields)) for fields in kinds]


def payloads_of(layouts: list[tuple[Field, ...]]) -> list[Payload]:
    counter = iter(range(10_000))

    def tensor(field: Field) -> Tensor:
        return torch.tensor([next(counter) % 100 for _ in range(field.numel)], dtype=torch.float64).to(field.dtype)

    return [
        Payload({field.name: tensor(field) for field in layout}, torch.Size([1]), torch.float32) for layout in layouts
    ]


@settings(deadline=None)
@given(LAYOUTS, st.integers(0, 9))
def test_fields_survive_from_any_place_in_a_larger_buffer(kinds: Any, offset: int) -> None:
    layouts = layouts_of(kinds)
    payloads, wire = payloads_of(layouts), Wire(layouts)
    larger = torch.cat(
        (torch.zeros(offset, dtype=torch.uint8), wire.pack(payloads, CPU), torch.zeros(3, dtype=torch.uint8))
    )
    received = wire.unpack(larger[offset : offset + wire.nbytes])
    for fields, payload in zip(received, payloads, strict=True):
        assert fields.keys() == payload.fields.keys()
        assert all(
            torch.equal(fields[name], field) and fields[name].dtype is field.dtype
            for name, field in payload.fields.items()
        )


@settings(deadline=None)
@given(LAYOUTS)
def test_not_a_byte_is_added(kinds: Any) -> None:
    layouts = layouts_of(kinds)
    payloads = payloads_of(layouts)
    assert (
        Wire(layouts).nbytes == Wire(layouts).pack(payloads, CPU).nbytes == sum(payload.nbytes for payload in payloads)
    )


def test_larger_elements_come_first_and_payloads_keep_their_order() -> None:
    layouts = layouts_of([[(torch.uint8, 2), (torch.int32, 1)], [(torch.float16, 1), (torch.uint8, 1)]])
    payloads = [
        Payload(
            {"field0": torch.tensor([1, 2], dtype=torch.uint8), "field1": torch.tensor([3], dtype=torch.int32)},
            torch.Size([2]),
            torch.float32,
        ),
        Payload(
            {"field0": torch.tensor([1.0], dtype=torch.float16), "field1": torch.tensor([4], dtype=torch.uint8)},
            torch.Size([1]),
            torch.float32,
        ),
    ]
    #                                                         int32 3       float16 1.0  bytes
    assert Wire(layouts).pack(payloads, CPU).tolist() == [3, 0, 0, 0, 0x00, 0x3C, 1, 2, 4]


def test_aligned_bytes_are_not_copied() -> None:
    wire = Wire(layouts_of([[(torch.float32, 4)]]))
    data = torch.zeros(16, dtype=torch.uint8)
    assert wire.unpack(data)[0]["field0"].data_ptr() == data.data_ptr()


def test_nothing_is_packed_into_no_bytes() -> None:
    packed = Wire([]).pack([], CPU)
    assert (packed.dtype, packed.numel(), Wire([]).unpack(packed)) == (torch.uint8, 0, [])
