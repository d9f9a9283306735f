"""The filter takes exactly the largest, and what it takes and leaves adds up."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_distopt.primal_dual.filter import take_largest


@settings(max_examples=60, deadline=None)
@given(
    residual=hnp.arrays(np.float64, st.integers(1, 60), elements=st.sampled_from([0.0, -1.0, 1.0, 2.0, -3.5, 1e-300])),
    density=st.sampled_from([0.01, 0.3, 0.5, 1.0]),
)
def test_largest_first_ties_to_the_lower_place_zeros_never(residual: np.ndarray, density: float) -> None:
    before = residual.copy()
    k = max(1, int(residual.size * density))
    expected = sorted(sorted(range(before.size), key=lambda i: (-abs(before[i]), i))[:k])
    places, values = take_largest(residual, density)
    assert places.tolist() == [i for i in expected if before[i] != 0.0]
    assert places.dtype == np.int32
    residual[places] += values
    np.testing.assert_array_equal(residual, before)
