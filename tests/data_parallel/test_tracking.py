"""Which parameters take part, and what becomes of residuals when that changes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.data_parallel import UpdateSync
from lightning_distopt.errors import RankMismatchError
from lightning_distopt.exchange import Meter
from tests.data_parallel.replica import NAMES, Replica, config, flat
from tests.data_parallel.together import together
from tests.ranks import run_ranks

WAYS = [
    {},
    {"server_compression": True},
    {"exchange": "sharded_server", "server_compression": True},
    {"exchange": "sharded_server", "server_compression": True, "scope": "model"},
]
ways = pytest.mark.parametrize("way", WAYS, ids=["one-way", "replicated", "sharded", "sharded, whole model"])


def step(replica: Replica, names: list[str]) -> None:
    """Train these parameters only."""
    replica.track(names)
    replica.sync.enter()
    replica.take_gradients()
    for name, param in replica.params.items():
        if name not in names:
            param.grad = None
    replica.local_step()
    replica.sync.exchange()


def residuals(replica: Replica) -> dict[str, Tensor]:
    return {name: e.clone() for name, e in replica.sync.state_dict()["residuals"].items()}


# ---- parameters that come and go -------------------------------------------------------------------------------------


def test_tracking_the_same_again_keeps_everything_in_place() -> None:
    replica = Replica(config())
    replica.run(2)
    buckets = replica.sync.buckets
    replica.track()
    assert all(a is b for a, b in zip(replica.sync.buckets, buckets, strict=True))


def test_a_parameter_that_joins_begins_without_residual_and_leaves_the_others_theirs() -> None:
    replica = Replica(config())
    for _ in range(3):
        step(replica, NAMES[:2])
    before = residuals(replica)
    replica.track(NAMES)
    after = residuals(replica)
    assert all(torch.equal(after[name], before[name]) for name in NAMES[:2])
    assert not any(after[name].any() for name in NAMES[2:])


def test_a_frozen_parameter_stays_where_it_is() -> None:
    replica = Replica(config())
    replica.run(3)
    frozen = replica.params["w"].detach().clone()
    for _ in range(3):
        step(replica, NAMES[1:])
        replica.sync.enter()
        assert torch.equal(replica.params["w"], frozen), "not even stepped ahead"
        replica.sync.leave()


def test_a_frozen_parameter_finds_its_residual_again() -> None:
    replica = Replica(config())
    replica.run(3)
    before = residuals(replica)["w"]
    assert before.any()
    for _ in range(2):
        step(replica, NAMES[1:])
    replica.track(NAMES)
    assert torch.equal(residuals(replica)["w"], before)


def test_the_residual_of_a_frozen_parameter_is_in_the_state() -> None:
    replica = Replica(config())
    replica.run(3)
    before = residuals(replica)
    replica.track(NAMES[1:])
    assert torch.equal(residuals(replica)["w"], before["w"])


def _auxiliary(replica: Replica, way: dict[str, Any], world: int) -> Tensor:
    """``x - mean(e) - s`` of all parameters, computed on every rank."""
    e, s = replica.e.clone(), replica.s.clone()
    dist.all_reduce(e)
    if way.get("exchange") == "sharded_server":
        dist.all_reduce(s)
    return flat(replica.params).double() - e / world - s


def _freeze_and_unfreeze(rank: int, world: int, way: dict[str, Any]) -> list[float]:
    replica = Replica(config(bucket_bytes=400, **way))
    replica.run(5)
    moved = []
    for names in (NAMES[1:], NAMES, NAMES[::2], NAMES):  # every time the buckets, hence the servers' shares, change
        before = _auxiliary(replica, way, world)
        replica.track(names)
        moved.append(float((_auxiliary(replica, way, world) - before).abs().max()))
        replica.track(NAMES[1:3])  # a second change with no exchange between
        replica.track(names)
        moved.append(float((_auxiliary(replica, way, world) - before).abs().max()))
        replica.sync.enter()
        y = flat(replica.params)
        replica.take_gradients()
        for name, param in replica.params.items():
            if name not in names:
                param.grad = None
        replica.local_step()
        done = y - flat(replica.params)
        replica.sync.exchange()
        dist.all_reduce(done)
        moved.append(float((_auxiliary(replica, way, world) - before + done / world).abs().max()))
    return moved


@ways
@pytest.mark.parametrize("world", [2, 3])
def test_freezing_and_unfreezing_leaves_the_auxiliary_point_where_it_is(world: int, way: dict[str, Any]) -> None:
    for moved in together(world, _freeze_and_unfreeze, [(w,) for w in WAYS], (way,)):
        assert max(moved) < 1e-13, "some roundings of numbers near 1 in float64"


def test_an_unfinished_round_ends_before_the_parameters_change() -> None:
    replica = Replica(config(sync_every=3))
    replica.run(4)
    replica.track(NAMES[1:])
    assert not replica.sync.away
    assert replica.meter.steps == 4


# ---- several optimizers ----------------------------------------------------------------------------------------------


class _Two:
    """Two optimizers; ``shared`` belongs to both."""

    def __init__(self, **changes: Any) -> None:
        self.params = {name: Parameter(torch.ones(5, dtype=torch.float64)) for name in ("a", "shared", "b")}
        self.owners = {"a": (0,), "shared": (0, 1), "b": (1,)}
        self.meter = Meter()
        self.sync = UpdateSync(config(**changes), self.meter)
        self.sync.track(self.params, self.owners)

    def step(self, owner: int, size: float | Tensor) -> bool:
        self.sync.enter()
        for name, param in self.params.items():
            if owner in self.owners[name]:
                param.data.sub_(size * torch.arange(1.0, 6.0))
        return self.sync.exchange(owner)

    def rounds(self) -> dict[str, int]:
        return {key: group["rounds"] for key, group in self.sync.state_dict()["groups"].items()}


def test_an_optimizers_step_exchanges_its_own_parameters_only() -> None:
    two = _Two()
    two.step(0, 0.1)
    assert two.rounds() == {"0": 1, "0+1": 1, "1": 0}
    two.step(1, 0.1)
    assert two.rounds() == {"0": 1, "0+1": 2, "1": 1}


def test_the_other_optimizers_parameters_stay_ahead_until_their_own_step() -> None:
    two = _Two()
    two.step(1, 0.1)
    two.sync.enter()
    ahead = two.params["b"].detach().clone()
    two.params["a"].data.sub_(0.1)
    two.sync.exchange(0)
    assert torch.equal(two.params["b"], ahead)
    two.sync.leave()
    assert not torch.equal(two.params["b"], ahead)


def test_a_step_of_one_optimizer_is_one_step_however_its_parameters_are_shared() -> None:
    two = _Two()
    for owner in (0, 1, 0):
        two.step(owner, 0.1)
    assert two.meter.steps == 3


def test_rounds_of_several_local_steps_are_counted_by_optimizer() -> None:
    two = _Two(sync_every=2)
    assert [two.step(owner, 0.1) for owner in (0, 0, 1, 1)] == [
        False,
        True,  # a, shared
        False,
        True,  # b, shared
    ]
    assert two.rounds() == {"0": 1, "0+1": 2, "1": 1}


def _two_optimizers(rank: int, world: int, changes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    two = _Two(**changes)
    done = torch.zeros(15, dtype=torch.float64)
    for i, owner in enumerate([0, 1, 1, 0, 1, 0, 0, 1]):
        size = 0.1 * (rank + 1) * (i + 1)
        two.step(owner, size)
        two.sync.leave()
        done += torch.cat([size * torch.arange(1.0, 6.0) * (owner in owners) for owners in two.owners.values()])
    residuals = two.sync.state_dict()["residuals"]
    return flat(two.params), done - torch.cat([residuals[name] for name in two.params])


@pytest.mark.parametrize("changes", [{}, {"averaging_period": 2}, {"bucket_bytes": 8}], ids=str)
def test_several_optimizers_lose_nothing(changes: dict[str, Any]) -> None:
    """One way, from 1: what ``x`` has moved is the mean of all steps less the mean residual, shared parameters too."""
    (x, moved0), (other, moved1) = run_ranks(2, _two_optimizers, {"coefficient": 0.3, **changes})
    assert torch.equal(x, other)
    torch.testing.assert_close(1.0 - x, (moved0 + moved1) / 2)


def _resume_two(rank: int, world: int) -> tuple[float, list[bool]]:
    way = {"exchange": "sharded_server", "server_compression": True}
    draw = torch.Generator().manual_seed(rank)
    two, again = _Two(**way), _Two(**way)
    for owner in (0, 1, 1, 0):
        two.step(owner, torch.randn(5, generator=draw))
    two.sync.leave()
    state = two.sync.state_dict()
    kept = sum(float(piece["values"].abs().min()) for pieces in state["shards"].values() for piece in pieces)
    for name, param in again.params.items():
        param.data.copy_(two.params[name])
    again.sync.load_state_dict(copy.deepcopy(state))
    same = []
    for owner in (0, 0, 1, 0, 1):
        size = torch.randn(5, generator=draw)
        for one in (two, again):
            one.step(owner, size)
            one.sync.leave()
        same.append(torch.equal(flat(two.params), flat(again.params)))
    return kept, same


def test_optimizers_that_resume_one_after_the_other_leave_each_others_servers_alone() -> None:
    ranks = run_ranks(2, _resume_two)
    assert sum(kept for kept, _ in ranks) > 0.01, "there is something to lose"
    assert [same for _, same in ranks] == [[True] * 5] * 2


# ---- ranks that disagree ---------------------------------------------------------------------------------------------


def _start_with_other_names(replica: Replica, rank: int) -> None:
    replica.track(NAMES if rank == 0 else NAMES[:3])


def _start_with_nothing(replica: Replica, rank: int) -> None:
    replica.track(NAMES if rank == 0 else [])


def _start_with_other_shapes(replica: Replica, rank: int) -> None:
    if rank:
        replica.params["w"] = Parameter(torch.zeros(7, 5, dtype=torch.float64))
    replica.track()


def _start_with_other_dtypes(replica: Replica, rank: int) -> None:
    if rank:
        replica.params["w"] = Parameter(replica.params["w"].detach().float())
    replica.track()


def _start_with_other_owners(replica: Replica, rank: int) -> None:
    replica.track(owner=(rank,))


def _start_in_another_order(replica: Replica, rank: int) -> None:
    replica.track(NAMES if rank == 0 else NAMES[::-1])


def _freeze_on_one_rank(replica: Replica, rank: int) -> None:
    replica.run(2)
    step(replica, NAMES if rank == 0 else NAMES[1:])


def _freeze_on_one_rank_in_the_middle_of_a_round(replica: Replica, rank: int) -> None:
    replica.run(1)
    step(replica, NAMES if rank == 0 else NAMES[1:])
    step(replica, NAMES if rank == 0 else NAMES[1:])


def _step_other_optimizers(replica: Replica, rank: int) -> None:
    owners = {name: (i % 2,) for i, name in enumerate(NAMES)}
    replica.sync.track(replica.params, owners)
    replica.sync.enter()
    replica.sync.exchange(rank)


def _disagree(rank: int, world: int, how: Callable[[Replica, int], None], changes: dict[str, Any]) -> Any:
    replica = Replica(config(**changes))
    begin = time.monotonic()
    try:
        how(replica, rank)
    except RankMismatchError as error:
        return str(error), time.monotonic() - begin, replica.sync.away
    return None


DISAGREEMENTS: list[tuple[Callable[[Replica, int], None], dict[str, Any]]] = [
    (_start_with_other_names, {}),
    (_start_with_nothing, {}),
    (_start_with_other_shapes, {}),
    (_start_with_other_dtypes, {}),
    (_start_with_other_owners, {}),
    (_start_in_another_order, {}),
    (_freeze_on_one_rank, {}),
    (_freeze_on_one_rank, {"averaging_period": 3}),
    (_freeze_on_one_rank, {"exchange": "sharded_server", "server_compression": True}),
    (_freeze_on_one_rank_in_the_middle_of_a_round, {"sync_every": 3}),
    (_step_other_optimizers, {}),
]


@pytest.mark.parametrize("case", DISAGREEMENTS, ids=lambda case: f"{case[0].__name__} {case[1] or ''}".strip("_ "))
def test_ranks_that_disagree_all_learn_it_at_once(case: tuple[Any, ...]) -> None:
    for found in together(3, _disagree_on_last, DISAGREEMENTS, case):
        assert found is not None, "went on"
        message, seconds, away = found
        assert "ranks [2] differ from rank 0" in message
        assert seconds < 10
        assert not away, "the parameters hold the common model"


def _disagree_on_last(rank: int, world: int, how: Callable[..., None], changes: dict[str, Any]) -> Any:
    return _disagree(rank, world, lambda replica, _: how(replica, int(rank == world - 1)), changes)
