"""Notes in a store: every rank learns what each has to say, and a rank that says nothing costs only the patience."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

from lightning_distopt.exchange.notes import Board


def boards(world: int) -> tuple[dist.HashStore, list[Board]]:
    store = dist.HashStore()
    return store, [Board(store, rank, world) for rank in range(world)]


def everyone(board: list[Board], said: list[str], patience: float = 5.0) -> list[dict[int, str]]:
    heard: list[dict[int, str]] = [{} for _ in board]

    def call(rank: int) -> None:
        time.sleep(0.02 * rank)
        heard[rank] = board[rank].gather(said[rank], patience)

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(len(said))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard[: len(said)]


def test_all_hear_all_time_after_time() -> None:
    _, board = boards(3)
    for turn in range(4):
        said = [f"{rank} in turn {turn}" for rank in range(3)]
        assert everyone(board, said) == [dict(enumerate(said))] * 3


def test_who_says_nothing_is_missing_after_the_patience() -> None:
    _, board = boards(3)
    start = time.monotonic()
    assert everyone(board, ["a", "b"], patience=0.3) == [{0: "a", 1: "b"}] * 2
    assert 0.3 <= time.monotonic() - start < 2.0


def test_notes_do_not_pile_up() -> None:
    store, board = boards(2)
    for _ in range(20):
        everyone(board, ["a", "b"])
    assert store.num_keys() <= 6


def test_one_rank_alone_needs_nobody() -> None:
    assert boards(1)[1][0].gather("text", 0.0) == {0: "text"}
