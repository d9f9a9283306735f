"""The byte and time counter of one rank: what it sends, what it receives, how long it encodes and waits.

Counts follow the algorithms that Gloo and NCCL run on one ring (``W`` ranks, ``n`` bytes a rank), and are tested
against the counters of a network interface:

==============  =====================  =========================
collective      sent by each rank      received by each rank
==============  =====================  =========================
all-reduce      ``2 n (W - 1) / W``    the same
all-gather      ``n (W - 1)``          the same
all-to-all      the other ranks' part  the other ranks' part
broadcast       ``n`` a child          ``n``, except at the root
==============  =====================  =========================

Protocol headers (TCP/IP, under 5 % for messages above some kilobytes) are not included.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["NOT_IN_STEPS", "Meter", "ring_all_reduce_bytes"]


NOT_IN_STEPS = ("setup", "validation", "evaluation", "diagnostics")


def ring_all_reduce_bytes(nbytes: int, world: int) -> int:
    """Bytes that each of ``world`` ranks sends (and receives) to all-reduce ``nbytes`` on a ring."""
    return 2 * nbytes * (world - 1) // world


class Meter:
    """Counters by purpose ("exchange", "averaging", "buffers", "flag", ...), cumulative since construction.

    Attributes:
        sent: bytes by purpose.
        received: bytes by purpose.
        seconds: wall-clock seconds of "encode" (compressing, decoding) and "exchange" (waiting for the network: what
            was not hidden behind other work).
        steps: optimizer steps counted by :meth:`step`.
        dense_bytes: bytes that plain ``ddp`` would have sent in these steps.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self.dense_bytes = 0

    @property
    def bytes_sent(self) -> int:
        """All bytes sent so far."""
        return self.sent.total()

    @property
    def bytes_received(self) -> int:
        """All bytes received so far."""
        return self.received.total()

    @property
    def step_bytes_sent(self) -> int:
        """Bytes sent in optimizer steps: averaging, buffers and flags too, but not what ``ddp`` sends as well before
        training and in validation, nor diagnostics that were asked for.
        """
        return _in_steps(self.sent)

    @property
    def step_bytes_received(self) -> int:
        """The same for received bytes."""
        return _in_steps(self.received)

    @property
    def compression_ratio(self) -> float:
        """Bytes that ``ddp`` would have sent in the counted steps, over those sent; NaN where nothing was sent."""
        return self.dense_bytes / self.step_bytes_sent if self.step_bytes_sent else float("nan")

    def step(self, dense_bytes: int, steps: int = 1) -> None:
        """Count optimizer steps, in which plain ``ddp`` would have sent ``dense_bytes`` together."""
        self.steps += steps
        self.dense_bytes += dense_bytes

    def all_reduce(self, purpose: str, nbytes: int, world: int) -> None:
        """Count an all-reduce of ``nbytes``."""
        self._add(purpose, ring_all_reduce_bytes(nbytes, world), ring_all_reduce_bytes(nbytes, world))

    def all_gather(self, purpose: str, nbytes: int, world: int) -> None:
        """Count an all-gather to which every rank gives ``nbytes``."""
        self._add(purpose, nbytes * (world - 1), nbytes * (world - 1))

    def all_to_all(self, purpose: str, sent: Sequence[int], received: Sequence[int], rank: int) -> None:
        """Count an all-to-all of ``sent[r]`` bytes to, ``received[r]`` from each rank ``r``; one's own part is free."""
        self._add(purpose, sum(sent) - sent[rank], sum(received) - received[rank])

    def broadcast(self, purpose: str, nbytes: int, world: int, rank: int) -> None:
        """Count a broadcast from rank 0 down a binomial tree; other trees and rings send as much in all."""
        self._add(purpose, nbytes * _children(rank, world), nbytes if rank else 0)

    def message(self, purpose: str, *, sent: int = 0, received: int = 0) -> None:
        """Count what goes from one rank to one other."""
        self._add(purpose, sent, received)

    def _add(self, purpose: str, sent: int, received: int) -> None:
        self.sent[purpose] += sent
        self.received[purpose] += received

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the wall-clock time of the block to ``seconds[what]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start


def _in_steps(counts: Counter[str]) -> int:
    return sum(nbytes for purpose, nbytes in counts.items() if purpose not in NOT_IN_STEPS)


def _children(rank: int, world: int) -> int:
    """Number of ranks that ``rank`` sends to in Gloo's tree: in round i, each rank below ``2**i`` sends ``2**i`` ahead."""
    return sum(rank + (1 << i) < world for i in range(rank.bit_length(), (world - 1).bit_length()))
