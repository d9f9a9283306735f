"""The engine on the virtual clock: its invariants, its special cases, and the specification's tables in small."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distopt.errors import CertificateError, ProtocolError
from lightning_distopt.primal_dual import Cluster, Config, Server, Shard, Worker, preset, shards_of, simulate
from lightning_distopt.primal_dual.messages import Kind, Message
from lightning_distopt.primal_dual.reference import local_sdca, permutation
from lightning_distopt.primal_dual.shard import pass_key
from tests.primal_dual.problems import mismatch, model_of, sparse_problem


def problem(loss: str = "logistic", workers: int = 4, lam: float = 1e-2, **others: Any) -> list[Shard]:
    x, y = sparse_problem(loss, **others)
    return shards_of(x, y, workers, loss=loss, lam=lam)


@settings(max_examples=25, deadline=None)
@given(
    workers=st.integers(1, 5),
    group=st.floats(0, 1),
    period=st.integers(1, 4),
    density=st.sampled_from([0.01, 0.1, 1.0]),
    gamma=st.sampled_from([1.0, 0.4]),
    sigma=st.sampled_from([None, "group", 2.0]),
    downlink=st.sampled_from(["assign", "topk"]),
    flush=st.sampled_from([0, 1, 2]),
    weight=st.sampled_from([0.0, 1.0, 3.0]),
    draws=st.sampled_from(["permutation", "uniform"]),
    slow=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_nothing_is_lost_whatever_the_schedule(
    workers: int, group: float, period: int, density: float, gamma: float, sigma: Any, downlink: str, flush: int,
    weight: float, draws: str, slow: float, seed: int,
) -> None:  # fmt: skip
    if sigma == "group" and downlink == "topk":
        flush = 1
    shards = problem("squared", workers, n=60, d=40)
    config = preset(
        "acpd", workers, group_size=1 + round(group * (workers - 1)), sync_period=period, density=density, gamma=gamma,
        sigma=sigma, downlink=downlink, flush_every=flush, residual_weight=weight, draws=draws, max_rounds=12, tol=0.0,
        exact_every=5, local_steps=10, seed=seed,
    )  # fmt: skip

    def watch(server: Server, workers: list[Worker], flying: list[Message]) -> None:
        assert mismatch(server, workers, flying) < 1e-10

    run = simulate(shards, config, Cluster(slow_probability=slow, seed=seed), watch=watch)
    np.testing.assert_allclose(run.model, model_of(shards, run.alphas), atol=1e-13)
    assert all(row.primal >= row.dual - 1e-9 for row in run.history)


def test_a_dropped_residual_breaks_the_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Worker._update

    def dropping(self: Worker) -> Message:
        message = whole(self)
        self.residual[:] = 0.0
        return message

    monkeypatch.setattr(Worker, "_update", dropping)
    worst = []
    config = preset("acpd", 4, max_rounds=9, tol=0.0)
    with pytest.raises(CertificateError, match=r"An update was lost|must not be negative"):
        simulate(problem(), config, watch=lambda *state: worst.append(mismatch(*state)))
    assert max(worst) > 1e-2


def test_an_assigned_model_is_the_servers_bit_for_bit() -> None:
    seen: dict[int, np.ndarray] = {0: np.zeros(150)}

    def watch(server: Server, workers: list[Worker], flying: list[Message]) -> None:
        seen[server.version] = server.model.copy()
        for worker in workers:
            if server._expected is Kind.UPDATE and worker.version == server.version:
                np.testing.assert_array_equal(worker.model, server.model)

    config = preset("acpd", 4, density=0.02, max_rounds=25, tol=0.0)
    simulate(problem(), config, Cluster.straggler(4, 3.0), watch=watch)
    assert len(seen) == 26


def test_all_workers_dense_every_round_is_cocoa_plus() -> None:
    # Written out: one round is a local pass from w on each shard, and w += the sum of what they changed.
    x, y = sparse_problem("squared", 40, 30)
    rows = [np.arange(0, 20), np.arange(20, 40)]
    shards = shards_of(x, y, 2, loss="squared", lam=1e-2, rows=rows)
    run = simulate(shards, preset("cocoa_plus", 2, max_rounds=5, tol=0.0))
    w, alpha = np.zeros(30), [np.zeros(20), np.zeros(20)]
    for turn in range(5):
        steps = []
        for k in range(2):
            order = permutation(20, pass_key(0, k, turn))
            delta, u = local_sdca(
                x[rows[k]], y[rows[k]], np.ones(20), alpha[k], w, order, shards[0].loss, 1e-2, 40.0, 2.0
            )
            alpha[k] = alpha[k] + delta
            steps.append(u)
        w = w + steps[0] + steps[1]
    np.testing.assert_allclose(run.model, w, atol=1e-11)
    same = simulate(
        shards, preset("acpd", 2, group_size=2, sync_period=1, density=1.0, max_rounds=5, tol=0.0, flush_every=0)
    )
    np.testing.assert_array_equal(run.model, same.model)
    assert [row.gap for row in run.history] == [row.gap for row in same.history]


@pytest.mark.parametrize("loss", ["squared", "hinge", "smoothed_hinge", "squared_hinge", "logistic"])
def test_the_dual_never_falls_where_all_answer(loss: str) -> None:
    run = simulate(problem(loss), preset("cocoa_plus", 4, max_rounds=20, tol=0.0))
    duals = [row.dual for row in run.history]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(duals))


@pytest.mark.parametrize("loss", ["squared", "smoothed_hinge", "logistic"])
@pytest.mark.parametrize("algorithm", ["acpd", "acpd_authors", "cocoa", "cocoa_plus", "disdca"])
def test_every_preset_closes_the_gap(loss: str, algorithm: str) -> None:
    run = simulate(problem(loss), preset(algorithm, 4, tol=1e-5, density=0.1 if "acpd" in algorithm else None))
    assert run.certificate.relative <= 1e-5
    assert run.server.version < 1000


def test_one_worker_many_workers_one_minimum() -> None:
    x, y = sparse_problem("logistic")
    runs = [simulate(shards_of(x, y, k, lam=1e-2, bias=True), preset("acpd", k, tol=1e-12)).model for k in (1, 2, 5)]
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-5)
    np.testing.assert_allclose(runs[0], runs[2], atol=1e-5)


def test_measuring_does_not_change_the_run() -> None:
    shards = problem()
    config = preset("acpd", 4, flush_every=0, max_rounds=40, tol=0.0, sync_period=5)
    often, seldom = (simulate(shards, config.but(certify_every=every)) for every in (1, 8))
    np.testing.assert_array_equal(often.model, seldom.model)
    assert len(often.history) > len(seldom.history)
    assert often.history[-1].bytes_up == seldom.history[-1].bytes_up


def identical_shards(workers: int = 8) -> list[Shard]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 60))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = x @ rng.standard_normal(60)
    rows = [np.arange(40 * k, 40 * k + 40) for k in range(workers)]
    return shards_of(np.tile(x, (workers, 1)), np.tile(y, workers), workers, loss="squared", lam=1e-4, rows=rows)


@pytest.mark.parametrize(
    ("group", "period", "density"), [(4, 10, 1.0), (2, 20, 1.0), (8, 1, 1.0), (4, 10, 0.1), (8, 1, 0.1)]
)
def test_the_safe_factor_is_safe_on_identical_shards_and_one_is_not(group: int, period: int, density: float) -> None:
    config = preset(
        "acpd",
        8,
        group_size=group,
        sync_period=period,
        density=density,
        local_steps=120,
        max_rounds=120,
        tol=0.0,
        flush_every=0,
    )
    slow = Cluster.straggler(8, 5.0)
    assert simulate(identical_shards(), config, slow).certificate.gap < 1e-2
    assert simulate(identical_shards(), config.but(sigma=1.0), slow).certificate.gap > 1e4


def test_the_guard_rescues_a_factor_that_is_too_small() -> None:
    config = preset(
        "acpd", 8, group_size=2, sync_period=20, density=1.0, local_steps=120, max_rounds=120, tol=0.0, flush_every=0,
        sigma="group",
    )  # fmt: skip
    slow = Cluster.straggler(8, 5.0)
    assert config.sigma == 2.0
    assert simulate(identical_shards(), config.but(guard=False), slow).certificate.gap > 1e3
    guarded = simulate(identical_shards(), config, slow)
    assert guarded.certificate.gap < 1e-2
    assert guarded.server.sigma > 2.0


def test_a_round_of_all_takes_what_the_slowest_takes() -> None:
    config = preset("cocoa_plus", 3, max_rounds=10, tol=0.0)
    run = simulate(problem(workers=3), config, Cluster.straggler(3, 7.0, slow=(1,), seconds=0.5))
    assert run.history[-1].seconds == pytest.approx(35.0)
    assert run.waiting[1] == 0.0
    assert run.waiting[0] == pytest.approx(30.0)


def test_bytes_take_time_on_a_link() -> None:
    config = preset("cocoa_plus", 2, max_rounds=4, tol=0.0)
    run = simulate(problem(workers=2, d=150), config, Cluster(bandwidth=1000.0, latency=0.25))
    up, down = (64 + 8 * 150) / 1000, (64 + 8 * 150 + 16) / 1000  # the latter says whether to keep the model
    assert run.history[0].seconds == pytest.approx(1.0 + 2 * 0.25 + up + down)
    assert run.history[1].seconds == pytest.approx(2 * run.history[0].seconds)
    shared = simulate(
        problem(workers=2, d=150), config, Cluster(bandwidth=1000.0, latency=0.25, shared_server_link=True)
    )
    assert shared.history[-1].seconds > run.history[-1].seconds + 3.0
    np.testing.assert_array_equal(shared.model, run.model)


def test_a_replayed_order_gives_the_same_bits() -> None:
    shards = problem()
    config = preset("acpd", 4, max_rounds=30, tol=0.0)
    run = simulate(shards, config, Cluster(slow_probability=0.3))
    again = simulate(shards, config, script=run.order)
    np.testing.assert_array_equal(run.model, again.model)
    assert again.order == run.order


@pytest.mark.slow
def test_methods_are_ordered_as_in_the_specification() -> None:
    # Its conditions: draws with replacement, no flush, and the down-link costs what the up-link does.
    x, y = sparse_problem("smoothed_hinge", 2000, 500)
    shards = shards_of(x, y, 8, loss="smoothed_hinge", lam=1e-2)
    common: dict[str, Any] = {"tol": 1e-4, "local_steps": 250, "draws": "uniform", "flush_every": 0, "max_rounds": 600}
    configs = {
        "cocoa+": preset("cocoa_plus", 8, **common),
        "acpd": preset("acpd", 8, **common),
        "top": preset("acpd", 8, group_size=8, sync_period=1, **common),
    }

    def seconds(dense_message: float, **cluster: Any) -> dict[str, float]:
        link = Cluster(bandwidth=8 * 500 / dense_message if dense_message else np.inf, down_bandwidth=np.inf, **cluster)
        runs = {name: simulate(shards, config, link) for name, config in configs.items()}
        return {name: next(row.seconds for row in run.history if row.gap <= 1e-4) for name, run in runs.items()}

    straggler = {"speeds": (10.0,) + (1.0,) * 7}
    persistent, thin = seconds(0, **straggler), seconds(10, **straggler)
    assert persistent["cocoa+"] <= persistent["acpd"] < persistent["top"]
    assert thin["acpd"] < thin["cocoa+"] < thin["top"]
    random, thin_random = seconds(0, slow_probability=0.1), seconds(10, slow_probability=0.1)
    assert random["cocoa+"] <= 1.1 * random["acpd"] < random["top"] * 1.1
    assert thin_random["acpd"] < thin_random["cocoa+"]
    network = seconds(40)
    assert network["top"] < network["acpd"] < 0.5 * network["cocoa+"]


def test_a_warm_start_begins_where_the_last_run_ended() -> None:
    shards = problem()
    first = simulate(shards, preset("acpd", 4, tol=1e-6))
    second = simulate(shards, preset("acpd", 4, tol=1e-4), alphas=first.alphas)
    assert second.server.version <= 10
    assert second.history[0].gap <= first.certificate.gap * 1.01


def test_counted_bytes_are_those_of_the_messages() -> None:
    run = simulate(problem(), preset("acpd", 4, max_rounds=10, tol=0.0, density=0.02))
    kinds = run.server.meter.received
    # 3 entries of 12 bytes after each header: 9 rounds of 2 messages, then one of 4.
    assert kinds["update"] == (9 * 2 + 4) * (64 + 3 * 12)
    assert set(kinds) == {"setup", "update", "flush", "certificate"}


def _message(**changes: Any) -> Message:
    return Message(**{"kind": Kind.UPDATE, "indices": np.array([1], np.int32), "values": np.ones(1), **changes})


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (_message(kind=Kind.LOSSES), "UPDATE was expected"),
        (_message(version=3), "version 3"),
        (_message(indices=np.array([10], np.int32)), "ascending numbers below 10"),
        (_message(indices=np.array([2, 1], np.int32), values=np.ones(2)), "ascending"),
        (_message(indices=None, values=np.ones(4)), "4 values for 10"),
        (_message(values=np.array([np.nan])), "not finite"),
        (_message(scalars=np.ones(2)), "2 scalars"),
    ],
)
def test_a_malformed_message_changes_nothing(message: Message, says: str) -> None:
    server = Server(preset("acpd", 2), 10, 1e-2, 20.0)
    for k in range(2):
        server.receive(k, Message(Kind.HELLO, scalars=np.zeros(3)))
    with pytest.raises(ProtocolError, match=says):
        server.receive(1, message)
    assert not server.model.any()
    assert server.waiting_for == (0, 1)


def test_workers_with_other_settings_are_refused() -> None:
    server = Server(preset("acpd", 2), 10, 1e-2, 20.0)
    server.receive(0, Message(Kind.HELLO, scalars=np.zeros(3)))
    with pytest.raises(ProtocolError, match="same settings"):
        server.receive(1, Message(Kind.HELLO, scalars=np.ones(3)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 5}, "`group_size` .* 5 of 4"),
        ({"group_size": 0}, "`group_size`"),
        ({"sync_period": 0}, "`sync_period`"),
        ({"density": 1.5}, "`density`"),
        ({"gamma": 0.0}, "`gamma`"),
        ({"sigma": -1.0}, "`sigma`"),
        ({"sigma": "best"}, "`sigma`"),
        ({"downlink": "dense"}, "`downlink`"),
        ({"draws": "cyclic"}, "`draws`"),
        ({"local_steps": 0}, "`local_steps`"),
        ({"max_rounds": 0}, "`max_rounds`"),
        ({"tol": -1.0}, "`tol`"),
    ],
)
def test_settings_outside_their_range_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        preset("acpd", 4, **changes)


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`algorithm` must be one of acpd, .*'adpc'"):
        preset("adpc", 4)


def test_settings_of_the_presets() -> None:
    assert preset("cocoa", 4) == Config(4, 4, 1, 1.0, gamma=0.25, sigma=1.0, flush_every=0)
    assert preset("acpd", 8).sigma == 8.0
    assert preset("acpd_authors", 8).residual_weight == 8.0
