"""The order of a training step: where the parameters are when, what is sent when, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.data_parallel import UpdateSync
from lightning_distopt.exchange import Meter
from tests.data_parallel.replica import SIZES, Replica, config, flat, my_rank
from tests.data_parallel.together import together
from tests.ranks import run_ranks


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def trained(steps: int = 5, **changes: Any) -> Replica:
    """A replica that has trained for a while, so that its residual is not zero."""
    replica = Replica(config(**changes), dtype=torch.float32)
    replica.run(steps)
    return replica


# ---- enter and leave -------------------------------------------------------------------------------------------------


def test_between_steps_the_parameters_hold_the_common_model() -> None:
    replica = trained()
    x = flat(replica.params)
    assert not replica.sync.away
    assert same(replica.x, x)


def test_enter_moves_the_parameters_ahead_by_the_coefficients_share_of_the_residual() -> None:
    replica = trained(coefficient=0.3)
    x, e = flat(replica.params), replica.e.float()
    replica.sync.enter()
    torch.testing.assert_close(flat(replica.params), x - 0.3 * e)
    assert replica.sync.away


def test_leave_brings_the_same_bits_of_the_common_model_back() -> None:
    replica = trained()
    x = flat(replica.params)
    replica.sync.enter()
    replica.sync.leave()
    assert same(flat(replica.params), x)
    assert not replica.sync.away


@pytest.mark.parametrize("compressor", ["sign", "topk:0.2", "random_block:0.2", "fp32"])
def test_the_memory_format_of_a_parameter_changes_nothing(compressor: str) -> None:
    """Means are added to a parameter itself only where its elements lie in order."""
    values = torch.randn(4, 3, 2, 2)
    params = [Parameter(values.clone(memory_format=f)) for f in (torch.contiguous_format, torch.channels_last)]
    for param in params:
        sync = UpdateSync(config(compressor), Meter())
        sync.track({"p": param}, {"p": (0,)})
        for step in range(4):
            sync.enter()
            param.data.mul_(0.9).add_(0.01 * step)
            sync.exchange()
    torch.testing.assert_close(params[0], params[1])
    assert not torch.equal(params[0], values)


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 1.0])
def test_leave_then_enter_gives_the_same_bits_of_y(coefficient: float) -> None:
    """All micro-batches of an accumulation window take their gradients at one point."""
    replica = trained(coefficient=coefficient)
    replica.sync.enter()
    y = flat(replica.params)
    for _ in range(3):
        replica.sync.leave()
        replica.sync.enter()
        assert same(flat(replica.params), y)


def test_entering_twice_is_entering_once() -> None:
    replica = trained()
    replica.sync.enter()
    y = flat(replica.params)
    replica.sync.enter()
    assert same(flat(replica.params), y)


def test_accumulation_with_leave_and_enter_ends_where_accumulation_without_does() -> None:
    plain, swapping = trained(), trained()
    for replica in (plain, swapping):
        for micro in range(3):
            replica.sync.enter()
            replica.take_gradients(scale=1.0 + micro)
            if replica is swapping and micro < 2:
                replica.sync.leave()
        replica.local_step()
        replica.sync.exchange()
    assert same(flat(plain.params), flat(swapping.params))


def test_enter_says_when_a_round_begins() -> None:
    replica = trained(sync_every=2, steps=4)
    said = []
    for _ in range(2):
        said.append(replica.sync.enter())  # first micro-batch
        replica.take_gradients()
        if replica.steps % 2 == 0:
            replica.sync.leave()
            said.append(replica.sync.enter())  # second one
        replica.local_step()
        replica.sync.exchange()
    said.append(replica.sync.enter())
    #       round   its 2nd micro-batch  its 2nd step  next round
    assert said == [True, False, False, True]


def test_without_a_step_no_exchange_is_due() -> None:
    replica = trained()
    assert replica.sync.exchange() is False, "parameters that never entered"
    steps = replica.meter.steps
    replica.sync.enter()
    replica.sync.leave()
    assert replica.sync.exchange() is False
    assert replica.meter.steps == steps


def test_restore_drops_a_step_that_was_not_exchanged() -> None:
    replica = trained()
    x, e = replica.x, replica.e
    replica.sync.enter()
    replica.take_gradients()
    replica.local_step()
    replica.sync.restore()
    assert same(flat(replica.params), x)
    assert same(replica.e, e)
    assert not replica.sync.away


def test_a_round_that_was_dropped_begins_anew() -> None:
    replica = trained(sync_every=3, steps=3)
    replica.run(2)
    replica.sync.restore()
    assert [replica.step() for _ in range(4)] == [False, False, True, False]


def test_the_common_model_can_be_read_inside_a_step() -> None:
    replica = trained()
    x = flat(replica.params)
    replica.sync.enter()
    assert not same(flat(replica.params), x)
    y = flat(replica.params)
    assert same(replica.x, x)
    assert same(flat(replica.params), y), "and the step goes on where it was"


# ---- several local steps a round -------------------------------------------------------------------------------------


def test_the_common_model_is_shown_in_the_middle_of_a_round_and_hidden_again() -> None:
    replica = trained(sync_every=3, steps=6)
    x = flat(replica.params)
    replica.step()
    z = flat(replica.params)
    assert not same(z, x)
    replica.sync.show_common()
    assert same(flat(replica.params), x)
    replica.sync.show_common()  # a second look changes nothing
    replica.sync.enter()
    assert same(flat(replica.params), z)


@pytest.mark.parametrize("looks", [[6], [7], [7, 8], [8, 8]], ids=str)
def test_looking_at_the_common_model_does_not_change_training(looks: list[int]) -> None:
    plain, watched = Replica(config(sync_every=3)), Replica(config(sync_every=3))
    plain.run(12)
    for step in range(12):
        for _ in range(looks.count(step)):
            watched.sync.show_common()
        watched.step()
    assert same(flat(plain.params), flat(watched.params))
    assert same(plain.e, watched.e)


def test_the_common_model_can_be_read_while_it_is_shown() -> None:
    replica = trained(sync_every=3, steps=7)
    x, z = replica.x, flat(replica.params)
    assert not same(x, z)
    replica.sync.show_common()
    assert same(replica.x, x)
    assert same(flat(replica.params), x)


def test_leaving_in_the_middle_of_a_round_changes_nothing() -> None:
    replica = trained(sync_every=3, steps=7)
    z = flat(replica.params)
    replica.sync.leave()
    assert same(flat(replica.params), z)


def _flushed(rank: int, world: int, looked: bool) -> tuple[Tensor, Tensor, Tensor, bool]:
    replica = Replica(config(sync_every=3))
    replica.run(3)
    before = replica.x - replica.e  # x - e, whose mean is the auxiliary point
    y = flat(replica.params) - replica.e
    replica.run(2)
    step = y - flat(replica.params)  # of two local steps, with alpha = 1
    if looked:
        replica.sync.show_common()
    replica.sync.flush()
    return flat(replica.params), before - step, replica.x - replica.e, replica.sync.away


@pytest.mark.parametrize("looked", [False, True], ids=["", "while the common model is shown"])
def test_flush_ends_an_unfinished_round_with_every_step_in_it(looked: bool) -> None:
    ranks = together(2, _flushed, [(False,), (True,)], (looked,))
    assert same(ranks[0][0], ranks[1][0])
    expected = (ranks[0][1] + ranks[1][1]) / 2
    torch.testing.assert_close((ranks[0][2] + ranks[1][2]) / 2, expected, rtol=0, atol=1e-12)
    assert not any(away for *_, away in ranks)


def test_flush_without_a_round_under_way_does_nothing() -> None:
    replica = trained()
    x, steps = flat(replica.params), replica.meter.steps
    replica.sync.flush()
    assert same(flat(replica.params), x)
    assert replica.meter.steps == steps


def _bytes_by_step(rank: int, world: int, changes: dict[str, Any], steps: int) -> list[tuple[int, int]]:
    replica = Replica(config(**changes))
    replica.track()  # its check of the parameters is not training
    sent = []
    for _ in range(steps):
        before = replica.meter.bytes_sent, replica.meter.bytes_received
        replica.step()
        sent.append((replica.meter.bytes_sent - before[0], replica.meter.bytes_received - before[1]))
    return sent


QUIET: list[tuple[dict[str, Any], int]] = [
    ({"sync_every": 3}, 9),
    ({"sync_every": 3, "averaging_period": 1}, 9),
    ({"sync_every": 3, "exchange": "sharded_server"}, 9),
]


@pytest.mark.parametrize("case", QUIET, ids=str)
def test_nothing_is_sent_or_received_inside_a_round(case: tuple[dict[str, Any], int]) -> None:
    for sent in together(2, _bytes_by_step, QUIET, case):
        averaging = "averaging_period" in case[0]
        assert [bool(out or into) for out, into in sent] == [averaging, False, True] * 3


# ---- averaging -------------------------------------------------------------------------------------------------------


def _averages(rank: int, world: int, period: int, every: int, micro: int) -> list[int]:
    """Bytes of averaging in each call of ``enter``."""
    replica = Replica(config(averaging_period=period, sync_every=every))
    sent = []
    for _ in range(6 * every):
        for i in range(micro):
            replica.track()
            before = replica.meter.sent["averaging"]
            replica.sync.enter()
            sent.append(replica.meter.sent["averaging"] - before)
            replica.take_gradients()
            if i < micro - 1:
                replica.sync.leave()
        replica.local_step()
        replica.sync.exchange()
    return sent


DENSE = 8 * sum(SIZES)  # 2 n (W - 1) / W for two ranks in float64


ROUNDS = {
    # p, H, micro-batches:  round 0     1     2     3     4     5
    (0, 1, 1): "                  .     .     .     .     .     .  ",
    (1, 1, 1): "                  a     a     a     a     a     a  ",
    (2, 1, 1): "                  .     a     .     a     .     a  ",
    (3, 1, 2): "                  . .   . .   a .   . .   . .   a .",
    (2, 3, 1): "                  . . . a . . . . . a . . . . . a . .",
}


@pytest.mark.parametrize("case", ROUNDS, ids=str)
def test_residuals_are_averaged_once_in_every_pth_round_when_it_begins(case: tuple[int, int, int]) -> None:
    expected = [DENSE if letter == "a" else 0 for letter in ROUNDS[case].split()]
    assert together(2, _averages, list(ROUNDS), case) == [expected, expected]


def _at_enter(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    replica = Replica(config("topk:0.1", averaging_period=3))
    replica.run(2)
    x, e = replica.x, replica.e
    replica.sync.enter()
    return x, e, flat(replica.params), replica.e


def test_the_step_ahead_uses_the_averaged_residual() -> None:
    ranks = run_ranks(2, _at_enter)
    mean = (ranks[0][1] + ranks[1][1]) / 2
    assert float((ranks[0][1] - ranks[1][1]).abs().max()) > 0.01, "residuals differ before"
    for x, _, y, e in ranks:
        torch.testing.assert_close(e, mean)
        torch.testing.assert_close(y, x - mean)


# ---- dense steps -----------------------------------------------------------------------------------------------------


def _dense_steps(rank: int, world: int) -> list[tuple[Tensor, float]]:
    replica = Replica(config("topk:0.01", dense_steps=3, averaging_period=2), dtype=torch.float32)
    seen = []
    for _ in range(5):
        replica.step()
        seen.append((replica.x, float(replica.e.abs().max())))
    assert replica.meter.sent["averaging"] == 2 * 4 * sum(SIZES) // 2, "in round 3 only: dense rounds leave nothing"
    return seen


def test_dense_steps_leave_no_residual_and_the_next_ones_do() -> None:
    for seen in together(2, _dense_steps, [()], ()):
        residuals = [e for _, e in seen]
        assert residuals[:3] == [0.0, 0.0, 0.0]
        assert min(residuals[3:]) > 0.01


def test_dense_steps_keep_all_ranks_equal() -> None:
    first, second = together(2, _dense_steps, [()], ())
    assert all(same(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


# ---- figures ---------------------------------------------------------------------------------------------------------


def _mismatch(rank: int, world: int, changes: dict[str, Any]) -> tuple[float, float, float, Tensor, Tensor, int]:
    replica = Replica(config(**changes))
    replica.run(6)
    sent = replica.meter.bytes_sent - replica.meter.sent["diagnostics"]
    replica.sync.mismatch()
    other = replica.meter.bytes_sent - replica.meter.sent["diagnostics"] - sent
    norm, mismatch = replica.sync.residual_norm(), replica.sync.mismatch()
    return norm, mismatch, changes.get("coefficient", 1.0), replica.e, replica.s, other


DISTANCES: list[dict[str, Any]] = [
    {},
    {"coefficient": 0.3},
    {"server_compression": True},
    {"exchange": "sharded_server", "server_compression": True, "coefficient": 0.3},
    {"exchange": "sharded_server", "server_compression": True, "scope": "model"},
]


@pytest.mark.parametrize("changes", DISTANCES, ids=str)
def test_mismatch_is_the_mean_squared_distance_from_the_auxiliary_point(changes: dict[str, Any]) -> None:
    ranks = together(3, _mismatch, [(other,) for other in DISTANCES], (changes,))
    mean = torch.stack([rank[3] for rank in ranks]).mean(0)
    s = sum(rank[4] for rank in ranks) if "exchange" in changes else ranks[0][4]
    expected = sum(float((mean + s - alpha * e).square().sum()) for _, _, alpha, e, _, _ in ranks) / 3
    for norm, mismatch, _, e, _, other in ranks:
        assert mismatch == pytest.approx(expected, rel=1e-12)
        assert norm == pytest.approx(float(e.norm()), rel=1e-12)
        assert other == 0, "all its bytes are counted as diagnostics"


def test_steps_are_optimizer_steps() -> None:
    replica = trained(sync_every=3, steps=7)
    assert replica.meter.steps == 6, "counted when their round ends"
    replica.sync.flush()
    assert replica.meter.steps == 7


def test_the_group_of_processes_is_the_given_one() -> None:
    assert run_ranks(3, _in_a_group) == [[0, 1], [0, 1], None]


def _in_a_group(rank: int, world: int) -> list[int] | None:
    from lightning_distopt.data_parallel import UpdateSync
    from lightning_distopt.exchange import Meter

    pair = dist.new_group([0, 1])
    if rank == 2:
        return None
    sync = UpdateSync(config("sign", averaging_period=1, exchange="sharded_server"), Meter(), pair)
    param = torch.nn.Parameter(torch.zeros(9))
    for _ in range(3):
        sync.track({"p": param}, {"p": (0,)})
        sync.enter()
        param.data.sub_(1.0 + my_rank())
        sync.exchange()
    assert sync.mismatch() >= 0
    everyone = [torch.empty_like(param) for _ in range(2)]
    dist.all_gather(everyone, param.detach(), group=pair)
    assert same(everyone[0], everyone[1])
    return list(range(sync.world))
