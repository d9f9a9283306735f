"""A state continues bit for bit on as many ranks, and keeps the auxiliary point on another number of them."""

from __future__ import annotations

import copy
import io
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.data_parallel.merge import merge_states
from tests.data_parallel.replica import NAMES, Replica, by_name, config, flat, pieces
from tests.data_parallel.together import together
from tests.ranks import run_ranks

WAYS: dict[str, dict[str, Any]] = {
    "one-way": {},
    "replicated": {"server_compression": True},
    "sharded": {"exchange": "sharded_server", "server_compression": True, "bucket_bytes": 400},
    "sharded top-k": {"compressor": "topk:0.1", "exchange": "sharded_server", "server_compression": True},
    "sharded, whole model": {"exchange": "sharded_server", "server_compression": True, "scope": "model"},
    "sharded, whole buckets": {"compressor": "bf16", "exchange": "sharded_server", "server_compression": True},
    "sharded, exact answer": {"exchange": "sharded_server"},
    "random block": {"compressor": "random_block:0.2", "exchange": "all_reduce"},
    "bfloat16": {"compressor": "bf16", "exchange": "all_reduce"},
}
ways = pytest.mark.parametrize("way", WAYS)


def saved(replica: Replica) -> bytes:
    """What a checkpoint holds: the common model, and this rank's optimizer and engine."""
    file = io.BytesIO()
    with replica.sync.common_model():
        x = {name: p.detach().clone() for name, p in replica.params.items()}
    torch.save(
        {
            "x": x,
            "optimizer": replica.optimizer.state_dict(),
            "sync": replica.sync.state_dict(),
            "steps": replica.steps,
        },
        file,
    )
    return file.getvalue()


def resumed(content: bytes, **changes: Any) -> Replica:
    replica = Replica(config(**changes))
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    for name, param in replica.params.items():
        param.data.copy_(loaded["x"][name])
    replica.optimizer.load_state_dict(loaded["optimizer"])
    replica.steps = loaded["steps"]
    replica.sync.load_state_dict(loaded["sync"])
    return replica


def alike(a: Replica, b: Replica) -> bool:
    return all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        for one, other in [(flat(a.params), flat(b.params)), (a.x, b.x), (a.e, b.e), (a.s, b.s)]
    )


def _continue(rank: int, world: int, changes: dict[str, Any]) -> list[bool]:
    """Interrupt at several moments; tell whether all is as without."""
    outcomes = []
    for moment in (1, 5):  # with H = 3, after one and after two local steps of a round
        replica = Replica(config(averaging_period=3, **changes))
        replica.run(moment)
        content = saved(replica)
        again = resumed(content, averaging_period=3, **changes)
        if moment == 5:  # saved again before anything happened
            again = resumed(saved(again), averaging_period=3, **changes)
        for _ in range(5):
            replica.step()
            again.step()
            outcomes.append(alike(replica, again))
    return outcomes


CONTINUED = [({"sync_every": every, "coefficient": 0.3, **way},) for way in WAYS.values() for every in (1, 3)]


@pytest.mark.parametrize("every", [1, 3], ids=["H=1", "H=3, in the middle of a round"])
@ways
def test_a_resumed_run_continues_bit_for_bit(way: str, every: int) -> None:
    for outcomes in together(2, _continue, CONTINUED, ({"sync_every": every, "coefficient": 0.3, **WAYS[way]},)):
        assert all(outcomes), f"false in the steps that differ: {outcomes}"


def test_one_rank_continues_bit_for_bit() -> None:
    assert all(_continue(0, 1, {"sync_every": 3}))


def _continue_inside_accumulation(rank: int, world: int) -> bool:
    replica = Replica(config("topk:0.1", averaging_period=2))
    replica.run(3)
    replica.sync.enter()  # averages
    replica.sync.leave()  # the first micro-batch is over; its gradients are lost with the interruption
    again = resumed(saved(replica), compressor="topk:0.1", averaging_period=2)
    before = again.meter.sent["averaging"]
    for one in (replica, again):
        one.run(1)
    return alike(replica, again) and again.meter.sent["averaging"] == before == 0


def test_residuals_are_not_averaged_twice_in_a_round_that_was_interrupted() -> None:
    assert run_ranks(2, _continue_inside_accumulation) == [True, True]


def test_a_state_holds_plain_values_and_tensors_only() -> None:
    replica = Replica(config(sync_every=3))
    replica.run(4)
    content = torch.load(io.BytesIO(saved(replica)), weights_only=True)["sync"]
    assert sorted(content) == ["groups", "local", "residuals", "server", "shards"]
    assert content["groups"] == {"0": {"rounds": 1, "local_steps": 1, "begun": True}}
    assert sorted(content["residuals"]) == sorted(content["local"]) == sorted(NAMES)


def test_a_state_can_be_taken_over_in_the_middle_of_training() -> None:
    one, other = Replica(config()), Replica(config())
    one.run(3)
    other.run(5)
    content = torch.load(io.BytesIO(saved(one)), weights_only=True)
    for name, param in other.params.items():
        param.data.copy_(content["x"][name])
    other.sync.load_state_dict(content["sync"])
    assert torch.equal(one.e, other.e)
    other.sync.load_state_dict({})
    assert not other.e.any(), "what is not there is zero"


@pytest.mark.parametrize("way", ["one-way", "replicated", "sharded"])
def test_a_state_that_was_taken_over_does_not_follow_its_source(way: str) -> None:
    one, other = (Replica(config(sync_every=3, **WAYS[way])) for _ in range(2))
    one.run(7)
    other.sync.load_state_dict(one.sync.state_dict())
    before = copy.deepcopy(other.sync.state_dict())
    one.run(5)
    after = other.sync.state_dict()
    for key in ("residuals", "server", "local"):
        assert all(torch.equal(after[key][name], value) for name, value in before[key].items())
    assert torch.equal(pieces(after), pieces(before))


# ---- a lost state ----------------------------------------------------------------------------------------------------


def _lose(rank: int, world: int, changes: dict[str, Any]) -> tuple[Tensor, float]:
    replica = Replica(config(averaging_period=4, **changes))
    replica.run(7)
    content = saved(replica)
    again = resumed(content, averaging_period=4, **changes)
    if rank == 1:
        again.sync.load_state_dict({})
    again.run(8)
    again.sync.flush()
    return flat(again.params), float(again.e.norm())


LOST = [({"sync_every": every, **way},) for way in WAYS.values() for every in (1, 3)]


@pytest.mark.parametrize("every", [1, 3])
@ways
def test_ranks_stay_together_when_one_of_them_has_lost_its_state(way: str, every: int) -> None:
    """Counters decide about averaging, randomness and rounds: the rank takes them from the others."""
    (x, _), (other, _) = together(2, _lose, LOST, ({"sync_every": every, **WAYS[way]},))
    assert torch.equal(x, other)
    assert bool(x.isfinite().all())
    assert float(x.abs().max()) < 10


def _lose_server(rank: int, world: int) -> tuple[Tensor, Tensor]:
    replica = Replica(config(server_compression=True))
    replica.run(5)
    again = resumed(saved(replica), server_compression=True)
    if rank == 1:
        again.sync.load_state_dict({})
    again.track()
    return replica.s, again.s


def test_a_replicated_server_is_not_lost_with_one_ranks_state() -> None:
    for before, after in run_ranks(3, _lose_server):
        assert before.any()
        assert torch.equal(before, after)


# ---- another number of ranks, another way ----------------------------------------------------------------------------


def _train(rank: int, world: int, changes: dict[str, Any]) -> bytes:
    replica = Replica(config(**changes))
    replica.run(6)
    return saved(replica)


def _go_on(rank: int, world: int, x: Tensor, state: dict[str, Any], changes: dict[str, Any]) -> list[Tensor]:
    """Continue from a merged state; return where the auxiliary point should be by this rank's steps, and its parts."""
    replica = Replica(config(**changes))
    for param, value in zip(
        replica.params.values(), x.split([p.numel() for p in replica.params.values()]), strict=True
    ):
        param.data.copy_(value.view(param.shape))
    replica.sync.load_state_dict(state)
    replica.track()
    start = replica.e.clone()
    done = torch.zeros_like(x)
    for _ in range(2):
        replica.sync.enter()
        y = flat(replica.params)
        replica.take_gradients()
        replica.local_step()
        done += y - flat(replica.params)
        replica.sync.exchange()
    return [start, flat(replica.params), replica.e, replica.s, done]


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(0)


def _server(states: list[dict[str, Any]]) -> Tensor:
    return by_name(states[0]["server"]) + sum(pieces(state) for state in states)


MERGED = [
    *(
        (way, way, old, new)
        for way in ("one-way", "replicated", "sharded", "sharded, whole model")
        for old, new in ((4, 2), (2, 4), (4, 3), (4, 1))
    ),
    ("sharded", "replicated", 2, 3),
    ("sharded", "one-way", 2, 3),
    ("sharded", "sharded, exact answer", 2, 3),
    ("sharded", "sharded, whole model", 2, 3),
    ("replicated", "sharded", 2, 3),
    ("replicated", "one-way", 2, 3),
    ("one-way", "sharded", 2, 3),
]


@cache
def _trained(world: int) -> dict[str, list[dict[str, Any]]]:
    """What all ranks saved, by way."""
    names = sorted({case[0] for case in MERGED})
    by_rank = run_ranks(world, _train_all, [WAYS[name] for name in names])
    return {
        name: [torch.load(io.BytesIO(contents[i]), weights_only=True) for contents in by_rank]
        for i, name in enumerate(names)
    }


def _train_all(rank: int, world: int, table: list[dict[str, Any]]) -> list[bytes]:
    return [_train(rank, world, changes) for changes in table]


@cache
def _gone_on(old: int, new: int) -> dict[tuple[str, str], list[list[Tensor]]]:
    """Where all new ranks are, by ways before and after."""
    cases = [case[:2] for case in MERGED if case[2:] == (old, new)]
    merged = []
    for before, after in cases:
        contents = _trained(old)[before]
        merged.append((flat(contents[0]["x"]), merge_states([content["sync"] for content in contents]), WAYS[after]))
    by_rank = run_ranks(new, _go_on_all, merged)
    return {case: [ranks[i] for ranks in by_rank] for i, case in enumerate(cases)}


def _go_on_all(rank: int, world: int, cases: list[tuple[Any, ...]]) -> list[list[Tensor]]:
    return [_go_on(rank, world, *case) for case in cases]


@pytest.mark.parametrize(("before", "after", "old", "new"), MERGED)
def test_other_ranks_and_other_servers_keep_the_auxiliary_point(before: str, after: str, old: int, new: int) -> None:
    contents = _trained(old)[before]
    x, states = flat(contents[0]["x"]), [content["sync"] for content in contents]
    auxiliary = x - _mean([by_name(state["residuals"]) for state in states]) - _server(states)
    _, xs, es, ss, dones = (list(column) for column in zip(*_gone_on(old, new)[before, after], strict=True))
    s = sum(ss) if after.startswith("sharded") else ss[0]
    found = xs[0] - _mean(es) - s
    torch.testing.assert_close(found, auxiliary - _mean(dones), rtol=0, atol=1e-13)  # a few roundings near 1


@pytest.mark.parametrize("new", [1, 2, 3])
def test_every_new_rank_gets_the_mean_of_the_residuals(new: int) -> None:
    mean = _mean([by_name(content["sync"]["residuals"]) for content in _trained(4)["sharded"]])
    for start, *_ in _gone_on(4, new)["sharded", "sharded"]:
        torch.testing.assert_close(start, mean, rtol=0, atol=1e-14)


def _other_way(rank: int, world: int, before: str, after: str) -> tuple[Tensor, Tensor]:
    content = _train(rank, world, WAYS[before])
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    e, s = by_name(loaded["sync"]["residuals"]), by_name(loaded["sync"]["server"]) + pieces(loaded["sync"])
    dist.all_reduce(e)
    if before.startswith("sharded"):
        dist.all_reduce(s)
    _, x, new_e, new_s, done = _go_on(rank, world, flat(loaded["x"]), loaded["sync"], WAYS[after])
    for part in (new_e, done):
        dist.all_reduce(part)
    if after.startswith("sharded"):
        dist.all_reduce(new_s)
    return flat(loaded["x"]) - e / world - s - done / world, x - new_e / world - new_s


CHANGED = [
    ("sharded", "replicated"),
    ("sharded", "one-way"),
    ("sharded", "sharded, whole model"),
    ("sharded, whole model", "sharded top-k"),
    ("replicated", "sharded"),
    ("replicated", "one-way"),
]


@pytest.mark.parametrize(("before", "after"), CHANGED)
def test_the_same_ranks_can_go_on_another_way(before: str, after: str) -> None:
    for expected, found in together(2, _other_way, CHANGED, (before, after)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def _state(value: float) -> dict[str, Any]:
    return {
        "residuals": {"p": torch.full((2,), value)},
        "server": {},
        "shards": {},
        "local": {"p": torch.ones(2)},
        "groups": {"0": {"rounds": 3, "local_steps": 2, "begun": True}},
    }


def test_a_lost_state_counts_as_zero_in_the_mean() -> None:
    merged = merge_states([_state(3.0), None, _state(6.0)])
    torch.testing.assert_close(merged["residuals"]["p"], torch.full((2,), 3.0))


def test_merging_drops_the_steps_of_an_unfinished_round_and_keeps_the_counters() -> None:
    merged = merge_states([_state(1.0)])
    assert merged["local"] == {}
    assert merged["groups"] == {"0": {"rounds": 3, "local_steps": 0, "begun": True}}


def test_merging_does_not_change_the_old_states() -> None:
    states = [_state(1.0), _state(2.0)]
    merge_states(states)
    assert states[0]["residuals"]["p"].tolist() == [1.0, 1.0]


def test_merging_nothing_is_an_empty_state() -> None:
    replica = Replica(config())
    replica.sync.load_state_dict(merge_states([None, None]))
    replica.run(1)


# ---- randomness ------------------------------------------------------------------------------------------------------


def _random_blocks(seed: int) -> Tensor:
    replica = Replica(config("random_block:0.1", "all_reduce", seed=seed))
    xs = []
    for _ in range(4):
        replica.step()
        xs.append(replica.x)
    return torch.stack(xs)


def test_the_same_seed_draws_the_same() -> None:
    assert torch.equal(_random_blocks(3), _random_blocks(3))


def test_another_seed_draws_something_else() -> None:
    assert not torch.equal(_random_blocks(3), _random_blocks(4))


def test_every_step_draws_anew() -> None:
    sent = _random_blocks(3).diff(dim=0) != 0
    assert len({tuple(row.tolist()) for row in sent}) == 3
