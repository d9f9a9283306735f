"""The roll-call finds who is silent, who is late, and who ended by itself; without a store it says so in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from lightning_distopt.errors import ExchangeError
from lightning_distopt.exchange import network_failures, roll_call
from lightning_distopt.exchange.roll_call import Roll, RollCall


@contextmanager
def ranks(world: int, beating: set[int] | None = None, store: Any = None) -> Iterator[list[RollCall]]:
    made = [RollCall(store or dist.HashStore(), rank, world) for rank in range(world)]
    if store is None:
        shared = dist.HashStore()
        made = [RollCall(shared, rank, world) for rank in range(world)]
    started = [call for rank, call in enumerate(made) if beating is None or rank in beating]
    for call in started:
        call.start()
    try:
        yield made
    finally:
        for call in started:
            call.stop()


def test_a_silent_rank_is_found() -> None:
    with ranks(3, beating={0, 2}) as calls:
        start = time.monotonic()
        roll = calls[0].call()
        assert time.monotonic() - start < 1.9
    assert roll.culprits == (1,)
    assert "found rank 1 silent: killed, stopped, or cut off" in roll.text


def test_a_rank_that_stopped_after_some_beats_is_found() -> None:
    with ranks(2) as calls:
        time.sleep(0.4)
        calls[1].stop()
        assert calls[0].call().culprits == (1,)


def test_a_late_rank_is_found_and_where_it_is() -> None:
    with ranks(3) as calls:
        for call, place in zip(
            calls, [(7, "exchange", True), (6, "training_step", False), (7, "exchange", True)], strict=True
        ):
            call.at(*place)
        roll = calls[0].call()
    assert roll.culprits == (1,)
    assert "all ranks alive, and rank 1 late, it is in `training_step` of step 6" in roll.text
    assert "pass a longer `timeout`" in roll.text


def test_last_words_are_read() -> None:
    with ranks(3) as calls:
        calls[1].last_words("MemoryError: no\n room")
        calls[2].last_words("ExchangeError [culprits 1] closed")  # because of rank 1
        assert calls[0].call() == Roll((1,), "Rank 1 ended with MemoryError: no room.")


def test_what_another_rank_found_before_counts() -> None:
    with ranks(3) as calls:
        calls[1].last_words("ExchangeError [culprits 2] The roll-call found rank 2 silent.")
        said = "Rank 1, which noticed it first, said of rank 2: The roll-call found rank 2 silent."
        assert calls[0].call() == Roll((2,), said)


def test_what_was_heard_is_known_when_the_store_is_gone() -> None:
    with ranks(2) as calls:
        calls[0].last_words("MemoryError: no room")
        assert calls[1]._alarm == "0;MemoryError: no room"

        class Gone:
            def set(self, key: str, value: str) -> None:
                raise RuntimeError("Connection reset by peer")

        calls[1]._store = Gone()  # type: ignore[assignment]
        assert calls[1].call() == Roll((0,), "Rank 0 ended with MemoryError: no room.")


def test_ranks_that_all_wait_blame_the_network() -> None:
    with ranks(2) as calls:
        for call in calls:
            call.at(3, "exchange", True)
        roll = calls[0].call()
    assert roll.culprits == ()
    assert "the network between them is broken" in roll.text


class Hanging:
    """A store that never answers."""

    def set(self, key: str, value: str) -> None:
        time.sleep(3)


class Broken:
    """A store whose keeper is gone."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("Connection reset by peer")


def test_a_store_out_of_reach_costs_the_patience_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "shared_store", lambda store, prefix: store)
    call = RollCall(Hanging(), 1, 2)  # type: ignore[arg-type]
    call.start()
    start = time.monotonic()
    assert "cannot reach the store" in call.call().text
    assert time.monotonic() - start < 2.0
    call.stop()


def test_a_store_whose_keeper_is_gone_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "shared_store", lambda store, prefix: store)
    call = RollCall(Broken(), 1, 2, keeper=0)  # type: ignore[arg-type]
    call.start()
    time.sleep(0.5)
    assert call.call() == Roll((0,), "Rank 0, which keeps the store of the process group, is gone.")
    call.stop()


def test_the_error_names_the_culprit() -> None:
    with ranks(2, beating={0}) as calls:
        roll_call.use(calls[0])
        try:
            with pytest.raises(ExchangeError) as caught, network_failures(0, 5, ("a", "b")):
                raise RuntimeError("Timed out waiting 1000ms for recv operation")
        finally:
            roll_call.use(None)
    assert caught.value.culprits == (1,)
    assert str(caught.value) == (
        "In step 5 rank 0 could not exchange the bucket of `a` and 1 more with the other ranks: Timed out waiting 1000ms for "
        "recv operation. The roll-call found rank 1 silent: killed, stopped, or cut off."
    )


def test_stopping_leaves_no_thread() -> None:
    with ranks(2) as calls:
        threads = [call._thread for call in calls]
    assert not any(thread.is_alive() for thread in threads)
