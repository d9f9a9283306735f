"""A rank that stops or stalls ends the others with one typed error, within the time-out, without an abort."""

from __future__ import annotations

import pickle
import tempfile
import time
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from lightning_distopt.errors import ExchangeError, NonFiniteError
from lightning_distopt.exchange import network_failures
from tests.data_parallel.gradients import ONE_EACH, Case, Net, attach, loss, momentum_sgd
from tests.data_parallel.replica import Replica, config
from tests.ranks import run_ranks

PATIENCE = 1.0  # seconds, of the process group


class Seen(NamedTuple):
    """What a surviving rank saw."""

    error: ExchangeError | None
    seconds: float
    unchanged: bool


def _survive(rank: int, world: int, how: str, path: str, folder: str) -> Seen | None:
    """In step 3, rank 1 leaves or stalls; the others tell what they saw."""
    # Only now: connecting may take longer on a busy machine. Before torch 2.15 the name was private.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=PATIENCE))
    step, snapshot = trainer_of(path, rank)
    for i in range(3):
        step(i)
    before = snapshot()
    start = time.monotonic()
    seen: Seen | None = None
    if rank == 1:
        if how == "stalls":
            time.sleep(1.5 * PATIENCE)
    else:
        error = None
        try:
            step(3)
        except ExchangeError as caught:
            error = caught
        after = snapshot()
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        seen = Seen(error, time.monotonic() - start, same)
    # The broken group cannot be used any more, and the test's own last barrier needs one that works.
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/outer", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    return seen


def trainer_of(path: str, rank: int) -> Any:
    """A function that takes a step, and one that copies what must not change."""
    if path.startswith("updates"):
        replica = Replica(config(averaging_period=4 if path == "updates, averaging" else 0))

        def update(step: int) -> None:
            try:
                replica.step()
            except ExchangeError:
                replica.sync.restore()
                raise

        return update, lambda: [replica.e.clone(), replica.x.clone()]
    case = Case(path, bucket_cap_mb=ONE_EACH, feedback=path != "signsgd")
    net = Net().double()
    optimizer = momentum_sgd(net)
    wrapped, sync = attach(net, case, optimizer)

    def gradient(step: int) -> None:
        loss(wrapped, case, rank, step, 0).backward()
        sync.raise_if_non_finite()
        optimizer.step()
        optimizer.zero_grad()

    def snapshot() -> list[torch.Tensor]:
        state = sync.state_dict()
        own = [*state.get("residuals", {}).values(), *state["mean"].get("queries", {}).values()]
        return [t.clone() for t in [*own, *(p.detach() for p in net.parameters())]]

    return gradient, snapshot


@pytest.mark.parametrize(
    ("how", "path"),
    [
        ("stalls", "topk:0.1"),
        ("stalls", "powersgd:1"),
        ("stalls", "updates"),
        ("leaves", "updates"),
        ("leaves", "updates, averaging"),
    ],
)
def test_the_others_end_with_one_typed_error(how: str, path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        seen = run_ranks(3, _survive, how, path, folder, timeout=30)
    assert seen[1] is None
    for rank in (0, 2):
        error, seconds, unchanged = seen[rank]
        assert isinstance(error, ExchangeError)
        assert (error.rank, error.step) == (rank, 3)
        assert str(error).startswith(f"In step 3 rank {rank} could not ")
        assert f"`{error.bucket[0]}`" in str(error)
        assert (error.peer is not None) == (how == "leaves"), "Gloo names it if it hangs up"
        assert str(error.peer) in str(error) or how == "stalls"
        assert seconds < PATIENCE + 2.0
        assert unchanged, "residuals, warm starts and parameters"


# ---- without processes -----------------------------------------------------------------------------------------------


def failed(reason: str, error: type[RuntimeError] = RuntimeError, bucket: tuple[str, ...] = ("a", "b", "c")) -> Any:
    with pytest.raises(ExchangeError) as caught, network_failures(2, 7, bucket):
        raise error(reason)
    return caught.value


def test_the_error_says_who_when_what_with_whom_and_why() -> None:
    gloo = "[/src/gloo/pair.cc:561] Connection closed by peer [10.0.0.7]:4242. This is typically caused by ..."
    error = failed(gloo)
    assert (error.rank, error.step, error.bucket, error.peer) == (2, 7, ("a", "b", "c"), "[10.0.0.7]:4242")
    assert str(error) == (
        "In step 7 rank 2 could not exchange the bucket of `a` and 2 more with peer [10.0.0.7]:4242: Connection closed by "
        "peer [10.0.0.7]:4242. Look for the rank that stopped first, or, if one is only slow, pass a longer `timeout` to "
        "the strategy."
    )
    assert str(error.__cause__) == gloo


@pytest.mark.parametrize(
    ("reason", "peer"),
    [
        ("Timed out waiting 1000ms for recv operation", None),
        ("Read error [::1]:80: Connection reset by peer", "[::1]:80"),
        ("no answer from rank 3", "3"),
        ("", None),
    ],
)
def test_a_peer_is_named_where_the_backend_names_it(reason: str, peer: str | None) -> None:
    assert failed(reason, dist.DistBackendError).peer == peer


def test_errors_of_this_package_and_bugs_pass() -> None:
    for error in (NonFiniteError("a NaN"), ValueError("a bug")):
        with pytest.raises(type(error)) as caught, network_failures(0, 0):
            raise error
        assert caught.value is error


def test_where_other_code_runs_too_only_what_comes_from_a_backend_is_taken() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, network_failures(0, 0, only=False):
        raise RuntimeError("shapes cannot be multiplied")
    assert not isinstance(caught.value, ExchangeError)
    for error in (dist.DistBackendError("NCCL error"), RuntimeError("[/src/gloo/gloo/pair.cc:1] closed")):
        with pytest.raises(ExchangeError), network_failures(0, 0, only=False):
            raise error


def test_the_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(failed("Connection closed by peer [10.0.0.7]:4242")))
    assert (error.rank, error.step, error.bucket, error.peer) == (2, 7, ("a", "b", "c"), "[10.0.0.7]:4242")
    assert str(error).startswith("In step 7 rank 2")
