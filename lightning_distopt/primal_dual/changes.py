"""What a worker has not heard of yet, for both kinds of down-link."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.primal_dual.filter import take_largest
from lightning_distopt.primal_dual.messages import Message, vector

__all__ = ["Assigned", "Largest"]

Array = NDArray[np.float64]
Places = NDArray[np.int32]


class Assigned:
    """Down-link "assign": the values, now, of all coordinates that changed since a worker's last reply.

    The places of each round are kept until every worker has heard of them: at most T rounds. Workers that heard last of the
    same round get the same answer, which is made once: work for a round is linear in what it received.

    Args:
        workers: K.
    """

    def __init__(self, workers: int) -> None:
        self._heard = [0] * workers
        self._rounds: deque[tuple[int, Places | None]] = deque()
        self._made: dict[int, tuple[Places | None, Array]] = {}

    def record(self, version: int, messages: Sequence[Message], dim: int) -> None:
        """Note what the messages of one round changed."""
        parts = [m.indices for m in messages if m.values.size]
        known = [part for part in parts if part is not None]
        self._rounds.append((version, _union(known, dim) if len(known) == len(parts) else None))
        self._made.clear()

    def since_last(self, worker: int, version: int, model: Array) -> tuple[Places | None, Array]:
        """Return what the worker has to hear, in the cheaper encoding; it has heard of it then."""
        heard, self._heard[worker] = self._heard[worker], version
        if heard not in self._made:
            self._made[heard] = self._answer([places for at, places in self._rounds if at > heard], model)
            oldest = min(self._heard)
            while self._rounds and self._rounds[0][0] <= oldest:
                self._rounds.popleft()
        return self._made[heard]

    @staticmethod
    def _answer(parts: list[Places | None], model: Array) -> tuple[Places | None, Array]:
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return vector(None, model, model.size)
        places = _union(known, model.size)
        return vector(places, model[places], model.size, model)

    def forget(self, version: int) -> None:
        """All workers hold the whole model of this version."""
        self._heard = [version] * len(self._heard)
        self._rounds.clear()
        self._made.clear()


class Largest:
    """Down-link "topk", the authors': the largest entries of what a worker has not heard of; the rest is kept.

    Args:
        workers: K; one vector is kept for each.
        dim: coordinates.
        density: rho.
    """

    def __init__(self, workers: int, dim: int, density: float) -> None:
        self._unheard = np.zeros((workers, dim))
        self._density = density

    def record(self, version: int, messages: Sequence[Message], dim: int) -> None:
        """Note what the messages of one round changed."""
        for message in messages:
            if message.indices is not None:
                self._unheard[:, message.indices] += message.values
            elif message.values.size:
                self._unheard += message.values

    def since_last(self, worker: int, version: int, model: Array) -> tuple[Places | None, Array]:
        """Return the changes that the worker has to add, in the cheaper encoding."""
        places, values = take_largest(self._unheard[worker], self._density)
        return vector(places, values, model.size)

    def forget(self, version: int) -> None:
        """All workers hold the whole model of this version."""
        self._unheard[:] = 0.0


def _union(parts: list[Places], dim: int) -> Places:
    if not parts:
        return np.empty(0, np.int32)
    if sum(part.size for part in parts) < dim // 8:
        return np.unique(np.concatenate(parts)).astype(np.int32, copy=False)
    mark = np.zeros(dim, np.bool_)
    for part in parts:
        mark[part] = True
    return np.flatnonzero(mark).astype(np.int32)
