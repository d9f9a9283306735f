"""Whether another batch comes, for ranks that read no data from a loader that does not know its length.

    reader      next batch ──"more"──▶ every other rank of its pipeline,    end ──"no more"──▶
    others      wait for that word where they would take their next batch

All ranks run the same loop, so they ask as often as the reader does. The reader waits for nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_distopt.exchange import network_failures

__all__ = ["Announced", "Announcements"]

_TAG = 16384
_UNDER_WAY = 256  # words; stages are never so many batches apart


class Announcements:
    """The words of one reader, seen from one process.

    Args:
        reader: its global rank.
        others: global ranks of those that read nothing.
        rank: of this process.
        device: where words are written.
    """

    def __init__(self, reader: int, others: Sequence[int], rank: int, device: torch.device) -> None:
        self._reader, self._others, self._rank, self._device = reader, tuple(others), rank, device
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()
        self._count = 0

    def tell(self, more: bool) -> None:
        """Say whether another batch comes."""
        self._count += 1
        word = torch.tensor([more], dtype=torch.uint8, device=self._device)
        with network_failures(self._rank, self._count, doing="say whether another batch comes"):
            for rank in self._others:
                self._under_way.append((dist.isend(word, rank, tag=_TAG), word))
            while len(self._under_way) > _UNDER_WAY * max(1, len(self._others)):
                self._under_way.popleft()[0].wait()

    def hear(self) -> bool:
        """Return whether another batch comes, as soon as the reader knows.

        Raises:
            ExchangeError: if it does not say so within the time-out.
        """
        self._count += 1
        word = torch.empty(1, dtype=torch.uint8, device=self._device)
        with network_failures(self._rank, self._count, doing="learn whether another batch comes"):
            dist.recv(word, self._reader, tag=_TAG)
        return bool(word)


class Announced:
    """A loader without a length, whose batches are announced; anything else of it is as it was.

    Args:
        loader: of the reader.
        announcements: heard by the others.
    """

    def __init__(self, loader: Any, announcements: Announcements) -> None:
        self._loader, self._announcements = loader, announcements

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self._announcements.tell(True)
            yield batch
        self._announcements.tell(False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
