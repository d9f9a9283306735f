"""Partitions: given and balanced cuts, measured costs, shared parameters, the table."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_distopt.model_parallel.partition import (
    LayerCost,
    Partition,
    balance,
    costs_by_parameters,
    measure,
)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_no_other_cuts_have_a_cheaper_most_expensive_block(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))

    def worst(cuts: tuple[int, ...]) -> int:
        edges = (0, *cuts, len(costs))
        return max(sum(costs[a:b]) for a, b in pairwise(edges))

    best = min(worst(cuts) for cuts in combinations(range(1, len(costs)), stages - 1))
    found = balance(costs, stages)
    assert worst(found) == best
    assert len(found) == stages - 1


def test_memory_bounds_a_block() -> None:
    assert balance([1, 1, 1, 1], 2) == (2,)
    assert balance([1, 1, 1, 1], 2, memory=[5, 5, 1, 1], limit=7) == (1,)
    with pytest.raises(ValueError, match=r"memory_limit.*4 layers into 2 stages.*takes 9"):
        balance([1, 1, 1, 1], 2, memory=[9, 5, 1, 1], limit=6)


@pytest.mark.parametrize("stages", [0, 4])
def test_stages_must_have_layers(stages: int) -> None:
    with pytest.raises(ValueError, match=f"{stages} for 3 layers"):
        balance([1, 1, 1], stages)


@pytest.mark.parametrize("cuts", [(0,), (3,), (2, 1), (1, 1), (1.5,)])
def test_cuts_must_rise_inside(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cuts"):
        Partition(("a", "b", "c"), cuts)


def test_the_table() -> None:
    costs = (LayerCost("0", 1200, 1.5, 400), LayerCost("1", 30, 0.25, 800), LayerCost("2", 7, 2.0, 40))
    assert Partition(("0", "1", "2"), (2,), costs).table().splitlines() == [
        "stage  layers  parameters    ms  bytes to next",
        "    0  0 .. 1       1,230  1.75            800",
        "    1       2           7  2.00              -",
    ]
    assert Partition(("0", "1", "2"), (2,)).names(1) == ("2",)


def test_an_example_must_pass_through_all_layers() -> None:
    with pytest.raises(ValueError, match=r"example_input_array.*RuntimeError in layer 'b'.*balance='parameters'"):
        measure({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}, torch.zeros(2, 4), device=torch.device("cpu"))


def test_measuring_leaves_no_trace() -> None:
    layers = {"0": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), "1": nn.Dropout(), "2": nn.Linear(8, 2)}
    before = [t.clone() for layer in layers.values() for t in layer.state_dict().values()]
    state = torch.get_rng_state()
    costs = measure(layers, torch.randn(3, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, (t for layer in layers.values() for t in layer.state_dict().values())))
    assert all(p.grad is None for layer in layers.values() for p in layer.parameters())
    assert [(c.name, c.parameters, c.output_bytes) for c in costs] == [("0", 56, 96), ("1", 0, 96), ("2", 18, 24)]
    assert all(c.milliseconds > 0 for c in costs)
    assert [c.parameters for c in costs_by_parameters(layers)] == [56, 0, 18]
