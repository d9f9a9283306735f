"""What is special about the scaled sign: one bit an element, and the scale that fits best."""

from __future__ import annotations

import pytest
import torch

from lightning_distopt.compressors import ScaledSign
from tests.compressors.table import dtypes, gaussian

GOLDEN = torch.tensor([-4, -1.5, -0.5, 0, 0.25, 1, 2, 6])


def left(v: torch.Tensor) -> float:
    residual = v.double().clone()
    ScaledSign().compress_(residual)
    return float(residual.square().sum() / v.double().square().sum())


def test_the_golden_vector_has_its_known_scale() -> None:
    assert ScaledSign().compress(GOLDEN).fields["scale"].tolist() == [1.90625]


def test_the_golden_vector_has_its_known_bits() -> None:
    assert ScaledSign().compress(GOLDEN).fields["bits"].tolist() == [0b11111000], "element i is bit i; zero counts as +"


def test_the_golden_vector_keeps_the_known_error() -> None:
    assert left(GOLDEN) == pytest.approx(0.511936, abs=5e-7), "six digits are known"


def test_what_is_left_follows_the_formula() -> None:
    v = gaussian(1001, dtype=torch.float64)
    formula = 1 - float(v.abs().sum() ** 2 / (v.numel() * v.square().sum()))
    assert left(v) == pytest.approx(formula, rel=1e-12)


def test_a_gaussian_keeps_its_known_share() -> None:
    # 1 - 2/pi; the standard error with 100,000 elements is below 0.0015.
    assert left(gaussian(100_000)) == pytest.approx(0.36338, abs=0.0075)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_zeros_cost_one_scale_each_and_no_third_symbol(share: float) -> None:
    v = gaussian(1000, dtype=torch.float64)
    v[: int(1000 * share)] = 0
    ternary = 1 - float(v.abs().sum() ** 2 / (1000 * v.square().sum())) * (1 + share)  # sgn(0) = 0: factor 2 - nnz/n
    scale = float(v.abs().mean())
    zeros = 1000 * share * scale**2 / float(v.square().sum())
    assert left(v) == pytest.approx(ternary + zeros, rel=1e-12)


@dtypes
def test_a_zero_of_either_sign_is_sent_as_plus(dtype: torch.dtype) -> None:
    decoded = ScaledSign().decompress(ScaledSign().compress(torch.tensor([0.0, -0.0, -2.0, 2.0], dtype=dtype)))
    assert decoded.tolist() == [1.0, 1.0, -1.0, 1.0]


@dtypes
def test_a_constant_magnitude_is_sent_exactly(dtype: torch.dtype) -> None:
    v = torch.tensor([1.5, -1.5, -1.5, 1.5, 1.5], dtype=dtype)
    assert torch.equal(ScaledSign().decompress(ScaledSign().compress(v)), v)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, 3e38), (torch.float64, 1e308), (torch.bfloat16, 3e38)], ids=str
)
def test_the_scale_is_right_where_the_sum_overflows(dtype: torch.dtype, value: float) -> None:
    v = torch.full((1000,), value, dtype=dtype)
    v[::2] /= -2
    scale = float(ScaledSign().compress(v).fields["scale"])
    assert scale == pytest.approx(0.75 * value, rel=2 * torch.finfo(dtype).eps + 1e-6)


def test_a_float32_tensor_costs_a_bit_an_element_and_four_bytes() -> None:
    assert ScaledSign().nbytes(80_001) == 10_001 + 4


def test_a_part_has_the_scale_of_the_whole() -> None:
    payload = ScaledSign().compress(gaussian(100))
    first, second = ScaledSign().split(payload, [0, 48, 100])
    assert first.fields["scale"] == second.fields["scale"] == payload.fields["scale"]
