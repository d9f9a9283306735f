"""Plans as data: index algebra, drawn tables, presets, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.staleness import PRESETS

DELAYS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4)


def plan_of(hops: list[tuple[int, int]]) -> StalenessPlan:
    return StalenessPlan(tuple(p for p, _ in hops), tuple(q for _, q in hops))


# --- index algebra --------------------------------------------------------------------------------------------------


@given(DELAYS, st.integers(1, 12))
def test_every_batch_is_forwarded_and_back_propagated_once_a_stage(hops: list[tuple[int, int]], batches: int) -> None:
    plan = plan_of(hops)
    cells = list(plan.cells(plan.ticks(batches), batches))
    for stage in range(plan.stages):
        mine = [cell for cell in cells if cell.stage == stage]
        assert [c.forward for c in mine if c.forward is not None] == list(range(batches))
        assert [c.backward for c in mine if c.backward is not None] == list(range(batches))
        first = next(c.tick for c in mine if c.backward is not None)
        assert first == plan.first_update(stage) == plan.arrivals[stage] + plan.staleness[stage]
    assert any(c.backward is not None for c in cells[-plan.stages :])  # the last tick is needed


@given(DELAYS, st.integers(1, 12))
def test_queues_hold_what_the_delays_say(hops: list[tuple[int, int]], batches: int) -> None:
    plan = plan_of(hops)
    ticks = {(c.stage, kind): {} for c in plan.cells(1) for kind in "FB"}
    for cell in plan.cells(plan.ticks(batches), batches):
        ticks[cell.stage, "F"][cell.forward] = cell.tick
        ticks[cell.stage, "B"][cell.backward] = cell.tick
    for b in range(batches):
        for k, (p, q) in enumerate(hops):
            assert ticks[k + 1, "F"][b] - ticks[k, "F"][b] == p
            assert ticks[k, "B"][b] - ticks[k + 1, "B"][b] == q
        for k in range(plan.stages):
            assert ticks[k, "B"][b] - ticks[k, "F"][b] == plan.staleness[k]


@given(DELAYS, st.integers(0, 20))
def test_updates_before_a_forward(hops: list[tuple[int, int]], batch: int) -> None:
    plan = plan_of(hops)
    for stage in range(plan.stages):
        tick = batch + plan.arrivals[stage]
        before = sum(1 for t in range(tick) if plan.backward_batch(stage, t) >= 0)
        assert before == plan.forward_version(stage, batch) == max(0, batch - plan.staleness[stage])
        assert plan.backward_version(stage, batch) == batch


def test_staleness_is_the_sum_of_the_delays_ahead() -> None:
    plan = StalenessPlan((1, 2), (3, 0))
    assert plan.staleness == (6, 2, 0)
    assert plan.arrivals == (0, 1, 3)
    assert plan.ticks(10) == 10 + 3 + 3
    assert [plan.stored_inputs(k) for k in range(3)] == [7, 3, 1]


# --- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "staleness", "versions"),
    [
        ("naive", (0, 0, 0), [1, 1, 1]),
        ("ddg", (2, 1, 0), [3, 2, 1]),
        ("features_replay", (2, 1, 0), [1, 1, 1]),
        ("pipedream", (2, 1, 0), [3, 2, 1]),
        ("pipedream_2bw", (2, 1, 0), [2, 2, 2]),
        ("dsp", (4, 2, 0), [1, 1, 1]),
        ("ouroboros", (2, 1, 0), [1, 1, 1]),
        ("dsp(2,2,0;6,3,0)", (6, 3, 0), [1, 1, 1]),
    ],
)
def test_presets(name: str, staleness: tuple[int, ...], versions: list[int]) -> None:
    plan = StalenessPlan.preset(name, stages=3)
    assert plan.staleness == staleness
    assert [plan.weight_versions(k) for k in range(3)] == versions
    assert [plan.stored_inputs(k) for k in range(3)] == [m + 1 for m in staleness]
    assert StalenessPlan.preset(name.partition("(")[0], stages=1).staleness == (0,)


def test_every_preset_has_a_row_above() -> None:
    assert set(PRESETS) == {"naive", "ddg", "features_replay", "pipedream", "pipedream_2bw", "dsp", "ouroboros"}


def test_ouroboros_has_one_worker_less_than_stages() -> None:
    assert [StalenessPlan.preset("ouroboros", k).placement for k in (1, 2, 3, 4)] == [
        (0,),
        (0, 0),
        (0, 1, 0),
        (0, 1, 2, 0),
    ]
    assert StalenessPlan.stages_on("ouroboros", 2) == 3
    assert StalenessPlan.stages_on("dsp", 2) == 2


def test_delays_follow_from_staleness() -> None:
    assert StalenessPlan.preset("dsp", staleness=[4, 2, 0]).forward_delays == (1, 1)
    plan = StalenessPlan.preset("dsp(2,2,0;6,3,0)")
    assert (plan.forward_delays, plan.gradient_delays) == ((2, 2), (1, 1))
    assert StalenessPlan.preset("dsp(3,3,0;10,5,0)").gradient_delays == (2, 2)
    assert StalenessPlan.preset("dsp", staleness=[4, 2, 0], gradient_delays=[2, 2]).forward_delays == (0, 0)
    assert StalenessPlan.preset("dsp", staleness=[3, 1, 0]).staleness == (3, 1, 0)
    assert str(StalenessPlan.preset("dsp", 3)) == "dsp(1,1,0;4,2,0)"


@pytest.mark.parametrize(("stages", "versions"), [(2, [9, 10]), (3, [8, 9, 10]), (4, [7, 8, 9, 10])])
@pytest.mark.parametrize("name", ["pipedream", "ddg"])
def test_versions_that_the_forward_of_batch_10_reads(name: str, stages: int, versions: list[int]) -> None:
    plan = StalenessPlan.preset(name, stages)
    assert [plan.forward_version(k, 10) for k in range(stages)] == versions
    vertical = StalenessPlan.preset(name, stages, versions="vertical")
    assert [vertical.forward_version(k, 10) for k in range(stages)] == versions[:1] * stages
    assert [vertical.weight_versions(k) for k in range(stages)] == [stages] * stages


@pytest.mark.parametrize(("accumulate", "between"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_accumulation_lowers_the_updates_between_a_forward_and_its_backward(accumulate: int, between: int) -> None:
    plan = StalenessPlan.preset("dsp", 3, accumulate=accumulate)
    found = [plan.backward_version(0, b) - plan.forward_version(0, b) for b in range(8, 32)]
    assert max(found) == between == -(-4 // accumulate)


def test_double_buffered_weights_are_one_group_old() -> None:
    plan = StalenessPlan.preset("pipedream_2bw", 3, accumulate=4)
    assert [plan.forward_version(0, b) for b in (0, 3, 4, 7, 8, 11, 12)] == [0, 0, 0, 0, 1, 1, 2]
    assert [plan.forward_version(2, b) for b in range(20)] == [plan.backward_version(0, b) for b in range(20)]
    assert [plan.weight_versions(k) for k in range(3)] == [2, 2, 2]


# --- tables ---------------------------------------------------------------------------------------------------------

DSP = """\
tick | w0      w1      w2
  0  | F0 --   -- --   -- --
  1  | F1 --   F0 --   -- --
  2  | F2 --   F1 --   F0 B0
  3  | F3 --   F2 B0   F1 B1
  4  | F4 B0   F3 B1   F2 B2
  5  | F5 B1   F4 B2   F3 B3
  6  | F6 B2   F5 B3   F4 B4
  7  | F7 B3   F6 B4   F5 B5
  8  | F8 B4   F7 B5   F6 B6
  9  | F9 B5   F8 B6   F7 B7"""
DDG = """\
tick | w0      w1      w2
  0  | F0 --   F0 --   F0 B0
  1  | F1 --   F1 B0   F1 B1
  2  | F2 B0   F2 B1   F2 B2
  3  | F3 B1   F3 B2   F3 B3
  4  | F4 B2   F4 B3   F4 B4
  5  | F5 B3   F5 B4   F5 B5"""
LATE = """\
tick | w0      w1      w2
  0  | F0 --   -- --   -- --
  1  | F1 --   -- --   -- --
  2  | F2 --   F0 --   -- --
  3  | F3 --   F1 --   -- --
  4  | F4 --   F2 --   F0 B0
  5  | F5 --   F3 B0   F1 B1
  6  | F6 B0   F4 B1   F2 B2"""
OUROBOROS = """\
tick | w0.0    w1.1    w0.2
  0  | F0 --   F0 --   F0 B0
  1  | F1 --   F1 B0   F1 B1
  2  | F2 B0   F2 B1   F2 B2"""


@pytest.mark.parametrize(
    ("name", "table"),
    [("dsp", DSP), ("ddg", DDG), ("features_replay", DDG), ("dsp(2,2,0;6,3,0)", LATE), ("ouroboros", OUROBOROS)],
)
def test_a_plan_draws_itself(name: str, table: str) -> None:
    assert StalenessPlan.preset(name, 3).table(table.count("\n")) == table


def test_the_table_of_a_drained_run_ends_empty() -> None:
    rows = StalenessPlan.preset("dsp", 2).table(5, batches=2).splitlines()
    assert rows[-2:] == ["  3  | -- B1   -- --", "  4  | -- --   -- --"]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"forward_delays": (1,), "gradient_delays": (1, 1)}, ["1 and 2", "hop"]),
        ({"forward_delays": (-1,), "gradient_delays": (1,)}, ["forward_delays", "-1"]),
        ({"forward_delays": (1.5,), "gradient_delays": (1,)}, ["forward_delays", "1.5"]),
        ({"forward_delays": (1,), "gradient_delays": (1,), "keep": "graph"}, ["keep='graph'", "stashed", "(2, 0)"]),
        ({"forward_delays": (1,), "gradient_delays": (1,), "keep": "all"}, ["keep", "'all'"]),
        ({"forward_delays": (1,), "gradient_delays": (1,), "accumulate": 0}, ["accumulate", "0"]),
        ({"forward_delays": (1,), "gradient_delays": (1,), "versions": "vertical"}, ["vertical", "stashed"]),
        ({"forward_delays": (1,), "gradient_delays": (1,), "placement": (0, 2)}, ["placement", "(0, 2)"]),
        (
            {
                "forward_delays": (1,),
                "gradient_delays": (1,),
                "versions": "double_buffered",
                "backward_weights": "stashed",
            },
            ["accumulate", "accumulate=2"],
        ),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        StalenessPlan(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "gpipe", "stages": 3}, ["gpipe", "pipedream"]),
        ({"name": "dsp"}, ["stages"]),
        ({"name": "dsp", "stages": 0}, ["stages", "0"]),
        ({"name": "dsp", "stages": 3, "forward_delays": [1]}, ["stages", "forward_delays", "2"]),
        ({"name": "dsp", "staleness": [2, 4, 0]}, ["staleness", "[2, 4, 0]"]),
        ({"name": "dsp", "staleness": [4, 2, 1]}, ["staleness", "end with 0"]),
        ({"name": "dsp", "staleness": [2, 1, 0], "forward_delays": [2, 1]}, ["staleness", "[1, 1]", "[2, 1]"]),
        ({"name": "dsp(1,1;4,2,0)"}, ["dsp(p;m)", "last of them 0"]),
        (
            {"name": "dsp", "staleness": [4, 2, 0], "forward_delays": [1, 1], "gradient_delays": [2, 1]},
            ["gradient_delays", "[1, 1]", "[2, 1]"],
        ),
    ],
)
def test_presets_refuse_what_contradicts_itself(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        StalenessPlan.preset(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value
