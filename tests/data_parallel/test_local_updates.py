"""Rounds of several steps: outer optimizers, weights, cohorts, warm starts and buffers, against a slow plain reference."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_distopt.compressors.exact import Exact
from lightning_distopt.data_parallel import FedMom, Plain, TorchOuter, UpdateSyncConfig
from lightning_distopt.data_parallel.cohort import cohort, shares
from tests.data_parallel import local_reference
from tests.data_parallel.local_reference import nesterov, plain
from tests.data_parallel.reference import Problem, sign, spans_of, top
from tests.data_parallel.replica import SIZE, SIZES, Replica, config, decaying, flat
from tests.data_parallel.together import together
from tests.ranks import run_ranks

WORLD, ROUNDS = 3, 8
SAMPLES = [5, 20, 11]
TOLERANCE = 1e-12  # the same numbers summed in another order


def local(**changes: Any) -> UpdateSyncConfig:
    """Uncompressed updates of 4 steps."""
    settings = {"coefficient": 0.0, "sync_every": 4, "residuals": False, "bucket_bytes": 400.0}
    return UpdateSyncConfig(Exact(), "all_reduce", **{**settings, **changes})  # type: ignore[arg-type]


class LocalReplica(Replica):
    """A replica that does what the strategy does with cohorts and fresh states.

    Args:
        config: of the engine.
        samples: ``n_k``.
        fresh: forget the optimizer's state when a round ends.
    """

    def __init__(
        self, config: UpdateSyncConfig, samples: Sequence[int] | None = None, fresh: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(config, **kwargs)
        self.fresh = fresh
        if samples is not None:
            self.sync.count_samples(samples)

    def take_gradients(self, scale: float = 1.0) -> None:
        super().take_gradients(scale)
        for param in self.sync.resting:
            param.grad = None

    def step(self) -> bool:
        ended = super().step()
        if ended and self.fresh and not self.sync.warm:
            self.optimizer.state.clear()
        return ended


# ---- against the reference -------------------------------------------------------------------------------------------


def seventy(t: int) -> float:
    return 0.7 * 0.97**t


def by_weight(weighting: str, participation: float) -> Callable[[int], list[float]]:
    return lambda t: shares(weighting, SAMPLES, cohort(WORLD, participation, 0, t))  # type: ignore[arg-type]


MOMENTUM = {"outer": FedMom(0.7, 0.9)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[], local_reference.Outer]]] = {
    "local sgd": ({}, {}, lambda: plain),
    "fedmom": (MOMENTUM, {}, lambda: nesterov(lambda t: 0.7, 0.9)),
    "a scheduled rate": ({"outer": FedMom(seventy, 0.9)}, {}, lambda: nesterov(seventy, 0.9)),
    "H = 1": ({**MOMENTUM, "sync_every": 1}, {}, lambda: nesterov(lambda t: 0.7, 0.9)),
    "by samples": (
        {**MOMENTUM, "weighting": "normalized"},
        {"shares": by_weight("normalized", 1.0)},
        lambda: nesterov(lambda t: 0.7, 0.9),
    ),
    "two of three, as in the paper": (
        {"outer": FedMom(1.5, 0.5), "weighting": "paper", "participation": 0.5},
        {"shares": by_weight("paper", 0.5)},
        lambda: nesterov(lambda t: 1.5, 0.5),
    ),
    "one of three, fresh states": (
        {"weighting": "normalized", "participation": 0.1},
        {"shares": by_weight("normalized", 0.1), "fresh": True},
        lambda: plain,
    ),
    "warm start": ({**MOMENTUM, "warm_steps": 3}, {"warm": 3}, lambda: nesterov(lambda t: 0.7, 0.9)),
    "torch's nesterov": (
        {"outer": TorchOuter("torch.optim.SGD", {"lr": 0.7, "momentum": 0.9, "nesterov": True})},
        {},
        lambda: nesterov(lambda t: 0.7, 0.9),
    ),
    "sign": (
        {**MOMENTUM, "compressor": "sign"},
        {"compress": sign, "spans": spans_of(SIZES)},
        lambda: nesterov(lambda t: 0.7, 0.9),
    ),
    "a share of top-k ahead, warm start": (
        {"compressor": "topk:0.1", "coefficient": 0.85, "warm_steps": 2},
        {"compress": top(0.1), "spans": spans_of(SIZES), "alpha": 0.85, "warm": 2},
        lambda: plain,
    ),
    "sign, by samples, two of three": (
        {"compressor": "sign", "weighting": "normalized", "participation": 0.5, "coefficient": 0.3},
        {"compress": sign, "spans": spans_of(SIZES), "alpha": 0.3, "shares": by_weight("normalized", 0.5)},
        lambda: plain,
    ),
}


def make(changes: dict[str, Any]) -> UpdateSyncConfig:
    if "compressor" not in changes:
        return local(**changes)
    compressor = changes["compressor"]
    rest = {"coefficient": 0.0, "sync_every": 4, "bucket_bytes": 400.0, **changes}
    return config(**{**rest, "compressor": compressor})


def _engine(rank: int, world: int, name: str) -> Tensor:
    changes, expected, _ = CASES[name]
    replica = LocalReplica(make(changes), SAMPLES, expected.get("fresh", False))
    models = []
    while len(models) < ROUNDS:
        if replica.step():
            models.append(flat(replica.params))
    return torch.stack(models)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_equals_the_slow_reference(name: str) -> None:
    changes, expected, outer = CASES[name]
    problem = Problem(WORLD, SIZE)
    models = local_reference.rounds(
        problem, WORLD, outer(), every=changes.get("sync_every", 4), lr=decaying, **expected
    )
    wanted = torch.stack(list(islice(models, ROUNDS)))
    by_rank = together(WORLD, _engine, [(case,) for case in CASES], (name,))
    # warm rounds of a compressed method travel in float32
    tolerance = 1e-6 if changes.get("warm_steps") and "compressor" in changes else TOLERANCE
    for got in by_rank:
        assert torch.equal(got, by_rank[0]), "ranks differ"
        assert float((got - wanted).abs().max()) < tolerance


# ---- identities ------------------------------------------------------------------------------------------------------


def _models(rank: int, world: int, changes: dict[str, Any], samples: list[int]) -> Tensor:
    replica = LocalReplica(local(**changes), samples)
    replica.run(24)
    return flat(replica.params)


SAME: list[tuple[dict[str, Any], list[int]]] = [
    ({"outer": FedMom(1.0, 0.0)}, [1, 1, 1]),
    ({}, [1, 1, 1]),
    ({"weighting": "paper", "participation": 2 / 3, "outer": FedMom(1.5, 0.9)}, [7, 7, 7]),
    ({"weighting": "normalized", "participation": 2 / 3, "outer": FedMom(1.0, 0.9)}, [7, 7, 7]),
    ({"weighting": "normalized"}, [0, 0, 0]),
    ({"weighting": "normalized", "outer": FedMom()}, [0, 3, 3]),
]


def ran(index: int) -> Tensor:
    return together(WORLD, _models, SAME, SAME[index])[0]


def test_without_momentum_fedmom_is_fedavg() -> None:
    torch.testing.assert_close(ran(0), ran(1), rtol=0, atol=TOLERANCE)


def test_papers_weights_at_replicas_over_participants_are_normalized_ones_at_one() -> None:
    torch.testing.assert_close(ran(2), ran(3), rtol=0, atol=TOLERANCE)


def test_a_round_in_which_nobody_has_samples_leaves_the_model_alone() -> None:
    torch.testing.assert_close(ran(4), Problem(WORLD, SIZE).start, rtol=0, atol=0)


def _without_momentum_memory(rank: int, world: int) -> tuple[Tensor, Tensor]:
    replica = LocalReplica(local(outer=FedMom(0.7, 0.9), weighting="normalized"))
    replica.run(8)
    before = replica.sync.state_dict()["outer"]["w"]["v"].clone()
    replica.sync.count_samples([0] * world)
    replica.run(4)
    return before, replica.sync.state_dict()["outer"]["w"]["v"]


def test_nor_does_the_momentum_move() -> None:
    for before, after in run_ranks(2, _without_momentum_memory):
        assert torch.equal(before, after)


def test_a_rank_without_samples_counts_for_nothing() -> None:
    problem = Problem(WORLD, SIZE)
    model = local_reference.rounds(
        problem,
        WORLD,
        nesterov(lambda t: 1.0, 0.9),
        every=4,
        lr=decaying,
        shares=lambda t: [0.0, 0.5, 0.5],
    )
    torch.testing.assert_close(ran(5), list(islice(model, 6))[-1], rtol=0, atol=TOLERANCE)


CONTRACTIVE = [
    ("topk:0.1", "all_gather"),
    ("topk:0.1", "sharded_server"),
    ("sign", "all_gather"),
    ("random_block:0.25", "all_reduce"),
    ("bingrad_b", "all_gather"),
    ("bf16", "sharded_server"),
]


def _conserves(rank: int, world: int, compressor: str, exchange: str) -> float:
    """Everything that the replicas moved has been given to the outer optimizer, or is a residual."""
    given: list[Tensor] = []

    class Remembering(Plain):
        def step_(self, x: Any, g: Any, memory: Any, round: int) -> None:
            given.append(torch.cat([values.reshape(-1).clone() for values in g]))
            super().step_(x, g, memory, round)

    replica = LocalReplica(config(compressor, exchange, coefficient=0.0, sync_every=3, outer=Remembering(0.5)))
    moved = torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(5):
        before = flat(replica.params)
        for _ in range(2):
            replica.step()
        replica.track()
        replica.sync.enter()
        replica.take_gradients()
        replica.local_step()
        moved += before - flat(replica.params)
        replica.sync.exchange()
    total = torch.stack([moved, replica.e])
    torch.distributed.all_reduce(total)
    return float((sum(given) - (total[0] - total[1]) / world).abs().max())


@pytest.mark.parametrize("case", CONTRACTIVE, ids=str)
def test_what_was_sent_and_what_was_not_is_what_was_done_also_under_an_outer_optimizer(case: tuple[str, str]) -> None:
    assert max(together(2, _conserves, CONTRACTIVE, case)) < TOLERANCE


# ---- who takes part --------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 2**62), st.integers(0, 10**6))
def test_a_cohort_is_a_function_of_the_seed_and_the_round(world: int, share: float, seed: int, round_: int) -> None:
    ranks = cohort(world, share, seed, round_)
    assert ranks == cohort(world, share, seed, round_) == sorted(set(ranks))
    assert len(ranks) == min(world, max(1, math.ceil(share * world - 1e-9)))
    assert set(ranks) <= set(range(world))


def test_all_ranks_come_to_take_part_about_equally_often() -> None:
    counts = torch.bincount(torch.tensor([r for t in range(2000) for r in cohort(10, 0.3, 5, t)]), minlength=10)
    assert counts.sum() == 6000
    assert int((counts - 600).abs().max()) < 100  # 5 standard errors


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.data())
def test_shares_are_those_of_the_table(samples: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, len(samples) - 1), min_size=1))
    total = sum(samples[k] for k in chosen)
    for weighting in ("normalized", "paper", "uniform"):
        p = shares(weighting, samples, chosen)  # type: ignore[arg-type]
        assert all(p[k] == 0 for k in range(len(samples)) if k not in chosen)
        whole = {"normalized": 1.0 if total else 0.0, "paper": total / max(1, sum(samples)), "uniform": 1.0}[weighting]
        assert sum(p) == pytest.approx(whole)


def test_weights_are_unbiased_as_in_the_paper_and_nearly_so_normalized() -> None:
    """The specification's table: K = 50, M = 5, n_k in [5, 100)."""
    draw = torch.Generator().manual_seed(0)
    samples = torch.randint(5, 100, (50,), generator=draw)
    values = torch.randn(50, generator=draw, dtype=torch.float64) + 1.0
    true = float((samples * values).sum() / samples.sum())
    seen: dict[str, list[float]] = {"normalized": [], "paper": []}
    for t in range(4000):
        chosen = cohort(50, 0.1, 1, t)
        for weighting, rate in (("normalized", 1.0), ("paper", 10.0)):
            p = torch.tensor(shares(weighting, samples.tolist(), chosen), dtype=torch.float64)  # type: ignore[arg-type]
            seen[weighting].append(rate * float((p * values).sum()))
    paper, normalized = (torch.tensor(seen[name]) for name in ("paper", "normalized"))
    assert abs(float(paper.mean()) - true) < 5 * float(paper.std()) / 4000**0.5
    assert abs(float(normalized.mean()) - true) < 0.05
    assert normalized.std() < paper.std()


def _resting(rank: int, world: int) -> tuple[bool, bool, bool]:
    replica = LocalReplica(local(participation=0.5))
    replica.run(1)
    rests = bool(replica.sync.resting)
    stands = torch.equal(flat(replica.params), replica.x)
    untouched = not replica.optimizer.state
    replica.run(3)
    return rests, stands, untouched


def test_who_sits_out_takes_no_step() -> None:
    outcomes = run_ranks(2, _resting)
    assert sorted(rests for rests, _, _ in outcomes) == [False, True]
    assert all(rests == stands == untouched for rests, stands, untouched in outcomes)


# ---- what travels ----------------------------------------------------------------------------------------------------


def _bytes(rank: int, world: int, every: int) -> tuple[int, int, int]:
    replica = LocalReplica(local(sync_every=every, outer=FedMom()), dtype=torch.float32)
    replica.run(24)
    return replica.meter.sent["exchange"], replica.meter.dense_bytes, replica.meter.steps


@pytest.mark.parametrize("every", [1, 4, 8])
def test_a_step_sends_one_hth_of_the_bytes_of_ddp(every: int) -> None:
    for sent, dense, steps in together(2, _bytes, [(1,), (4,), (8,)], (every,)):
        assert steps == 24
        assert dense == 24 * 4 * SIZE  # a ring all-reduce of two ranks sends as much as there is
        assert sent * every == dense


# ---- state -----------------------------------------------------------------------------------------------------------


def copied(replica: LocalReplica, config: UpdateSyncConfig) -> LocalReplica:
    """A replica that goes on from what the other one would save."""
    with replica.sync.common_model():
        x = {name: p.detach().clone() for name, p in replica.params.items()}
    file = io.BytesIO()
    torch.save({"sync": replica.sync.state_dict(), "optimizer": replica.optimizer.state_dict()}, file)
    content = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = LocalReplica(config)
    again.steps = replica.steps
    for name, param in again.params.items():
        param.data.copy_(x[name])
    again.optimizer.load_state_dict(content["optimizer"])
    again.sync.load_state_dict(content["sync"])
    return again


METHODS: dict[str, UpdateSyncConfig] = {
    "fedmom": local(outer=FedMom(0.7, 0.9)),
    "adam outside": local(outer=TorchOuter("torch.optim.Adam", {"lr": 0.1})),
    "one of two": local(participation=0.5, weighting="normalized", warm_steps=2, outer=FedMom()),
    "sign": config("sign", coefficient=0.0, sync_every=4, outer=FedMom(0.7)),
    "fragments": local(fragments=2, outer=FedMom(0.7)),
    "fragments, late and mixed": local(fragments=4, sync_every=8, delay=1, mix=0.5, outer=FedMom(0.7)),
    "late, top-k": config("topk:0.2", coefficient=0.0, sync_every=4, delay=3, outer=FedMom(0.7)),
}


def _resumed(rank: int, world: int, name: str) -> list[str]:
    wrong = []
    for moment in (1, 6, 11):
        one = LocalReplica(METHODS[name])
        one.run(moment)
        other = copied(one, METHODS[name])
        for step in range(9):
            one.step()
            other.step()
            if not (torch.equal(flat(one.params), flat(other.params)) and torch.equal(one.x, other.x)):
                wrong.append(f"saved after {moment}, differs after {step + 1}")
                break
    return wrong


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_saved_anywhere_goes_on_bit_for_bit(name: str) -> None:
    for wrong in together(2, _resumed, [(case,) for case in METHODS], (name,)):
        assert not wrong
