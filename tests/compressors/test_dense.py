"""What is special about dense transfer: rounding, and saturation instead of infinity."""

from __future__ import annotations

import pytest
import torch

from lightning_distopt.compressors import Dense
from tests.compressors.table import dtypes, gaussian

_LIMITS = {"float32": torch.finfo(torch.float32).max, "float16": 65504.0, "bfloat16": torch.finfo(torch.bfloat16).max}


@pytest.mark.parametrize(("name", "limit"), _LIMITS.items())
def test_values_beyond_the_range_become_the_largest_of_it(name: str, limit: float) -> None:
    v = torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64)
    assert Dense(name).decompress(Dense(name).compress(v)).tolist() == [limit, -limit, 1.0]


def test_what_saturation_cut_off_stays_in_the_residual() -> None:
    v = torch.tensor([70_000.0, -1e6])
    Dense("float16").compress_(v)
    assert v.tolist() == [70_000 - 65_504, -1e6 + 65_504]


def test_what_a_wider_format_would_round_out_of_the_tensors_range_saturates_within_it() -> None:
    v = torch.tensor([65_504.0, -65_504.0, 65_280.0], dtype=torch.float16)
    assert Dense("bfloat16").decompress(Dense("bfloat16").compress(v)).tolist() == [65_280.0, -65_280.0, 65_280.0]


@dtypes
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_values_are_rounded_to_nearest(dtype: torch.dtype, name: str) -> None:
    v = gaussian(1000, dtype=dtype)
    assert torch.equal(Dense(name).compress(v).fields["values"], v.to(getattr(torch, name)))


def test_float32_is_sent_bit_for_bit_even_if_it_is_a_denormal_or_a_negative_zero() -> None:
    v = torch.tensor([1e-45, -0.0, 1 / 3, -3.4e38])
    decoded = Dense().decompress(Dense().compress(v))
    assert torch.equal(decoded, v)


@pytest.mark.parametrize(("name", "itemsize"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
@dtypes
def test_an_element_costs_the_formats_bytes_whatever_the_tensors_dtype(
    name: str, itemsize: int, dtype: torch.dtype
) -> None:
    assert Dense(name).nbytes(1000, dtype) == 1000 * itemsize


@pytest.mark.parametrize("name", ["float64", "int8", "", None])
def test_another_format_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'float32', 'float16', 'bfloat16'.*got {name!r}"):
        Dense(name)
