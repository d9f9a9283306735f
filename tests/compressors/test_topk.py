"""What is special about top-k: the very largest, and how many."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_distopt.compressors import TopK
from tests.compressors.table import FLOATS, dtypes, gaussian

GOLDEN = torch.tensor([-4, -1.5, -0.5, 0, 0.25, 1, 2, 6])


def test_the_golden_vector_keeps_its_two_largest_entries() -> None:
    payload = TopK(0.25).compress(GOLDEN)
    assert payload.fields["values"].tolist() == [-4.0, 6.0]
    assert payload.fields["indices"].tolist() == [0, 7]


def test_the_golden_vector_keeps_the_known_error() -> None:
    residual = GOLDEN.double()
    TopK(0.25).compress_(residual)
    left = float(residual.square().sum() / GOLDEN.double().square().sum())
    assert left == pytest.approx(0.126967, abs=5e-7), "six digits are known"


@settings(deadline=None, max_examples=50)
@given(numel=st.integers(1, 3000), ratio=st.floats(1e-4, 1), dtype=st.sampled_from(FLOATS))
def test_the_magnitudes_sent_are_the_first_of_a_sort(numel: int, ratio: float, dtype: torch.dtype) -> None:
    v = gaussian(numel, dtype=dtype)
    sent = TopK(ratio).compress(v).fields["values"].abs().tolist()
    assert sorted(sent, reverse=True) == sorted(v.abs().tolist(), reverse=True)[: len(sent)]


@pytest.mark.parametrize(
    ("numel", "ratio", "k"),
    [
        (0, 0.5, 0),
        (1, 0.01, 1),
        (99, 0.01, 1),
        (100, 0.01, 1),
        (199, 0.01, 1),
        (200, 0.01, 2),
        (10, 0.99, 9),
        (10, 1, 10),
    ],
)
def test_k_is_the_whole_part_of_the_share_and_at_least_one(numel: int, ratio: float, k: int) -> None:
    assert len(TopK(ratio).compress(gaussian(numel)).fields["values"]) == k


@dtypes
def test_an_entry_costs_its_value_and_four_bytes(dtype: torch.dtype) -> None:
    assert TopK(0.01).nbytes(100_000, dtype) == 1000 * (dtype.itemsize + 4)


def test_among_equal_magnitudes_exactly_k_are_sent() -> None:
    v = torch.ones(64) * torch.tensor([1.0, -1.0]).repeat(32)
    indices = TopK(0.25).compress(v).fields["indices"].tolist()
    assert len(indices) == 16
    assert len(set(indices)) == 16


def test_ties_are_broken_alike_every_time() -> None:
    v = torch.ones(1000)
    first, second = (TopK(0.1).compress(v.clone()).fields["indices"] for _ in range(2))
    assert torch.equal(first, second)


@dtypes
def test_places_ascend_so_that_a_payload_can_be_cut(dtype: torch.dtype) -> None:
    indices = TopK(0.3).compress(gaussian(500, dtype=dtype)).fields["indices"]
    assert bool((indices.diff() > 0).all())


@dtypes
def test_the_residual_is_zero_where_something_was_sent_and_untouched_elsewhere(dtype: torch.dtype) -> None:
    v = gaussian(300, dtype=dtype)
    residual = v.clone()
    sent = torch.zeros(300, dtype=torch.bool)
    sent[TopK(0.2).compress_(residual).fields["indices"].long()] = True
    assert torch.equal(residual, v.where(~sent, torch.zeros((), dtype=dtype)))


def test_what_is_left_is_exactly_what_was_not_among_the_largest() -> None:
    v = gaussian(1000, dtype=torch.float64)
    squares = v.square().sort().values
    residual = v.clone()
    TopK(0.1).compress_(residual)
    assert float(residual.square().sum()) == pytest.approx(float(squares[:900].sum()), rel=1e-12)


@pytest.mark.parametrize("ratio", [0, -1, 1.5, math.nan, math.inf])
def test_a_ratio_outside_its_range_is_refused_with_value_and_rule(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"`ratio` must be in \(0, 1\].*got {ratio}"):
        TopK(ratio)


@pytest.mark.parametrize("ratio", [True, "0.1", None])
def test_a_ratio_that_is_no_number_is_refused_with_value_and_rule(ratio: object) -> None:
    with pytest.raises(TypeError, match=rf"`ratio` must be a number in \(0, 1\]: got {ratio!r}"):
        TopK(ratio)  # type: ignore[arg-type]
