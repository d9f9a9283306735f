"""Short notes that ranks leave for each other in the store of the process group: no collective, so no order to keep.

Collectives must be issued by all ranks in the same order, or they garble each other. Who saves a checkpoint after an
exception, or wants to know who is still there, cannot know what the others are in the middle of, and writes notes instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch.distributed as dist

__all__ = ["Board", "Store", "shared_store"]


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...


def shared_store(store: Store, prefix: str) -> Store:
    """Return a client of its own to the same store, whose keys begin with ``prefix``; safe to use in another thread."""
    clone = getattr(store, "clone", None)
    own: Any = store if clone is None else clone()
    return cast("Store", dist.PrefixStore(prefix, own))  # type: ignore[attr-defined]


class Board:
    """Lets all ranks know what each of them has to say, time after time.

    Args:
        store: of the process group.
        rank: of this process.
        world: number of ranks.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store = shared_store(store, "lightning_distopt/board")
        self._rank = rank
        self._world = world
        self._turns = 0

    def gather(self, text: str, patience: float, give_up: Callable[[], bool] = lambda: False) -> dict[int, str]:
        """Tell all ranks ``text`` and return what each rank said in the same call, by rank.

        Args:
            text: of this rank.
            patience: seconds to wait for the others.
            give_up: asked now and then; the wait ends if it is true.

        Returns:
            The texts of those that called in time; without one that did not.
        """
        turn, self._turns = self._turns, self._turns + 1
        if self._world == 1:
            return {self._rank: text}
        self._store.set(f"{turn}/{self._rank}", text)
        if turn > 1:  # all have read what was said two calls ago, or they would not have got here
            self._store.delete_key(f"{turn - 2}/{self._rank}")
        said: dict[int, str] = {self._rank: text}
        deadline, pause = time.monotonic() + patience, 0.001
        while len(said) < self._world and time.monotonic() < deadline and not give_up():
            for rank in range(self._world):
                key = f"{turn}/{rank}"
                if rank not in said and self._store.check([key]):
                    said[rank] = self._store.get(key).decode()
            if len(said) < self._world:
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        return said
