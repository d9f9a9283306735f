"""Plans played with durations: the drawn slots, the periods and ceilings of the closed forms, stragglers, idle time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.timeline import bubble_fraction, ceiling, flush_ceiling, period, play, slots

PIPEDREAM = """\
w0 | F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5
w1 | .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7
w2 | .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6"""


@pytest.mark.parametrize("name", ["pipedream", "ddg"])
def test_slots_of_the_asynchronous_schedule(name: str) -> None:
    assert slots(StalenessPlan.preset(name, 3), 12, 16) == PIPEDREAM


def with_staleness(*m: int) -> StalenessPlan:
    return StalenessPlan.preset("dsp", staleness=m)


@pytest.mark.parametrize(
    ("plan", "periods"),
    [
        (StalenessPlan.preset("naive", 3), (9, 13, 17, 21)),
        (with_staleness(2, 1, 0), (3, 13 / 3, 17 / 3, 7)),
        (with_staleness(4, 2, 0), (3, 3, 3.4, 4.2)),
        (with_staleness(6, 3, 0), (3, 3, 3, 3)),
    ],
    ids=str,
)
def test_steady_periods_by_latency(plan: StalenessPlan, periods: tuple[float, ...]) -> None:
    # 105 batches are whole cycles of m + 1 = 1, 3, 5 and 7 batches
    assert [period(plan, 1.0, 2.0, c, batches=105) for c in range(4)] == pytest.approx(periods)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=3), st.integers(0, 3))
def test_the_period_is_the_closed_form(hops: list[tuple[int, int]], latency: int) -> None:
    plan = StalenessPlan(tuple(p for p, _ in hops), tuple(q for _, q in hops))
    K, m = plan.stages, plan.staleness
    loops = [(k, j) for k in range(K) for j in range(k, K)]
    closed = max(((j - k + 1) * 3 + 2 * latency * (j - k)) / (m[k] - m[j] + 1) for k, j in loops)
    assert period(plan, 1.0, 2.0, latency, batches=105) == pytest.approx(closed, rel=0.03)


@pytest.mark.parametrize(
    ("devices", "ddg", "replay"), [(2, 1.5, 1.2), (3, 1.8, 1.5), (4, 2.0, 12 / 7), (8, 2.4, 24 / 11)]
)
def test_ceilings_under_the_barrier(devices: int, ddg: float, replay: float) -> None:
    assert ceiling(StalenessPlan.preset("ddg", devices, timetable="barrier")) == pytest.approx(ddg)
    assert ceiling(StalenessPlan.preset("features_replay", devices, timetable="barrier")) == pytest.approx(replay)


@pytest.mark.parametrize(
    ("devices", "replay", "stash", "flush"), [(2, 1.5, 2, 1.78), (3, 2.25, 3, 2.57), (4, 3, 4, 3.37), (8, 6, 8, 6.56)]
)
def test_ceilings_without_it(devices: int, replay: float, stash: float, flush: float) -> None:
    assert ceiling(StalenessPlan.preset("dsp", devices)) == pytest.approx(replay)
    assert ceiling(StalenessPlan.preset("features_replay", devices)) == pytest.approx(replay)
    assert ceiling(StalenessPlan.preset("pipedream", devices)) == pytest.approx(stash)
    assert ceiling(StalenessPlan.preset("ddg", devices)) == pytest.approx(stash)
    assert flush_ceiling(devices, 4 * devices) == pytest.approx(flush, abs=0.006)


@pytest.mark.parametrize(("m", "later"), [((2, 1, 0), 3), ((4, 2, 0), 1), ((8, 4, 0), 0)])
def test_a_straggler_costs_what_staleness_does_not_hide(m: tuple[int, ...], later: int) -> None:
    plan = with_staleness(*m)
    ends = [max(s.end for s in play(plan, 400, delays=delays)) for delays in ({}, {(1, "F", 100): 3.0})]
    assert ends[1] - ends[0] == later


@pytest.mark.parametrize(("timetable", "order"), [("free", "F0 B0 F2 B2"), ("barrier", "F0 F2 B2 B0")])
def test_ouroboros_plays_two_modules_on_one_worker(timetable: str, order: str) -> None:
    spans = play(StalenessPlan.preset("ouroboros", 3, timetable=timetable), 5)
    first = sorted((s for s in spans if s.stage != 1), key=lambda s: s.start)
    assert all(a.end <= b.start for a, b in itertools.pairwise(first))
    # after two ticks of F0, F2, B2
    assert " ".join(f"{s.kind}{s.stage}" for s in first[6:10]) == order


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_the_period_of_ouroboros_is_its_closed_form(lengths: list[int]) -> None:
    plan = StalenessPlan.preset("ouroboros", len(lengths))
    f = [float(n) for n in lengths]
    g = [*(3.0 * n for n in f[:-1]), 2.0 * f[-1]]
    own = max(f[0] + g[0], sum(f[:-1])) + f[-1] + g[-1]
    closed = max([own, *(a + b for a, b in zip(f[1:-1], g[1:-1], strict=True))])
    assert period(plan, f, g) == pytest.approx(closed, rel=0.02)
    assert ceiling(plan, lengths=f) == pytest.approx(3 * sum(f) / closed, rel=0.02)


@pytest.mark.parametrize(
    ("lengths", "free", "replayed", "stashed"),
    [((3, 6, 3), 1.5, 1.2, 1.5), ((2, 4, 4, 2), 2.25, 1.5, 1.8)],
)
def test_ceilings_of_ouroboros_with_the_authors_split(
    lengths: tuple[int, ...], free: float, replayed: float, stashed: float
) -> None:
    """Barrier: the rows of 2 and 3 devices, but that the last module recomputes nothing."""
    K = len(lengths)
    assert ceiling(StalenessPlan.preset("ouroboros", K), lengths=lengths) == pytest.approx(free)
    locked = StalenessPlan.preset("ouroboros", K, timetable="barrier")
    assert replayed <= ceiling(locked, lengths=lengths) <= 1.15 * replayed
    kept = StalenessPlan.preset("ouroboros", K, timetable="barrier", keep="graph", backward_weights="stashed")
    assert ceiling(kept, lengths=lengths) == pytest.approx(stashed, rel=0.01)


def test_idle_time() -> None:
    assert bubble_fraction(StalenessPlan.preset("naive", 4), 50) == pytest.approx(0.75)
    assert bubble_fraction(StalenessPlan.preset("dsp", 1), 50) == 0.0
    assert bubble_fraction(StalenessPlan.preset("pipedream", 2), 0) == 0.0
    free, locked = (bubble_fraction(StalenessPlan.preset("ddg", 3, timetable=t), 300) for t in ("free", "barrier"))
    assert free < 0.02
    assert locked == pytest.approx(1 - 3 / 5, abs=0.02)
