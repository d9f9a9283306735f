"""Cuts for chains whose ends share a device: the best of all, those of the authors, and what leaves a stage empty."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.ends import Head, authors_split, balance_ends
from lightning_distopt.model_parallel.timeline import period


def played(costs: list[int], cuts: tuple[int, ...], head: float, replay: bool) -> float:
    """Return the time a batch takes when the plan is played."""
    edges = (0, *cuts, len(costs))
    c = [float(sum(costs[a:b])) for a, b in pairwise(edges)]
    c[-1] += head
    keep = {} if replay else {"keep": "graph", "backward_weights": "stashed"}
    plan = StalenessPlan.preset("ouroboros", len(c), **keep)
    forward = [x / 3 for x in c]
    backward = [2 * f + f * (replay and k < len(c) - 1) for k, f in enumerate(forward)]
    return period(plan, forward, backward, batches=40)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=6), st.integers(2, 4), st.integers(0, 12), st.booleans())
def test_no_other_cuts_are_faster(costs: list[int], stages: int, head: int, replay: bool) -> None:
    stages = min(stages, len(costs))
    found = balance_ends(costs, stages, Head(head), replay=replay)
    assert len(found) == stages - 1
    best = min(played(costs, cuts, head, replay) for cuts in combinations(range(1, len(costs)), stages - 1))
    assert played(costs, found, head, replay) <= best * 1.03


def test_equal_layers_without_a_second_run() -> None:
    """On two devices as the authors cut; on three the lock, all forwards and the head's backward, wants a small last stage."""
    assert balance_ends([1.0] * 12, 3, replay=False) == authors_split(["block"] * 12, 2) == (3, 9)
    assert balance_ends([1.0] * 12, 4, replay=False) == (3, 7, 11)


def test_an_expensive_head_gets_fewer_layers() -> None:
    light, heavy = (balance_ends([1.0] * 12, 3, Head(cost)) for cost in (0.0, 4.0))
    assert 12 - heavy[1] < 12 - light[1]


def test_memory_bounds_the_shared_device_as_one() -> None:
    assert balance_ends([1.0] * 6, 3, replay=False, memory=[1.0] * 6, limit=4.0) == (2, 5)
    with pytest.raises(ValueError, match=r"6 layers into 3 stages.*got 2, and all take 9"):
        balance_ends([1.0] * 6, 3, Head(0.0, 3.0), memory=[1.0] * 6, limit=2.0)


@pytest.mark.parametrize(
    ("blocks", "devices", "cuts"), [(12, 2, (3, 9)), (12, 3, (2, 6, 10)), (12, 4, (1, 4, 7, 10)), (13, 3, (2, 7, 11))]
)
def test_the_authors_split(blocks: int, devices: int, cuts: tuple[int, ...]) -> None:
    kinds = ["embedding", *["block"] * blocks, "dropout"]
    assert authors_split(kinds, devices) == tuple(cut + 1 for cut in cuts)


def test_one_device_and_a_first_module_of_the_embedding_alone() -> None:
    assert authors_split(["e", *"bbbb"], 1) == (3,)
    assert authors_split(["e", *"bb"], 2) == (1, 2)


@pytest.mark.parametrize(("kinds", "devices"), [("ebb", 3), ("bb", 2)])
def test_empty_stages_are_refused_with_the_numbers(kinds: str, devices: int) -> None:
    with pytest.raises(ValueError, match=rf"2 layers of the kind b.*{devices + 1} stages on {devices} devices"):
        authors_split(kinds, devices)
