"""The benchmark of per-tensor rates gives every probe its turns."""

from __future__ import annotations

import pytest

from benchmarks import layerwise


@pytest.mark.filterwarnings("ignore:`LayerwiseRateScaling` got 1 probes")
def test_every_probe_has_its_turn() -> None:
    seconds = layerwise.measure("resnet20", batch=2, rounds=2, size=16, device="cpu")
    assert {probe: len(steps) for probe, steps in seconds.items()} == {"none": 2, "micro": 2, "rank": 2}
    assert all(second > 0 for steps in seconds.values() for second in steps)


def test_what_was_measured_is_a_table() -> None:
    assert layerwise.table().startswith("| model | device, threads |")
