"""An exchange averages payloads over the ranks: the only place where compressed bytes meet ``torch.distributed``.

``gather`` is a generator, and so is ``mean``, which also decodes. They start a collective, yield while the network works,
and wait when they are resumed, so that a caller can compress the next bucket meanwhile. All ranks resume in the same order,
hence issue the same collectives in the same order:

    compress 0 ─ start 0 ─ compress 1 ─ start 1 ─ wait 0 ─ decode 0 ─ compress 2 ─ start 2 ─ wait 1 ...
                   └──────── on the network ───────┘
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors.base import Compressor, Payload, all_finite, wide
from lightning_distopt.exchange.failure import network_failures
from lightning_distopt.exchange.meter import Meter

__all__ = ["Arrived", "Arriving", "Collective", "Exchange", "Means", "Piece", "Steps", "drain", "overlap"]

Steps: TypeAlias = Generator[None, None, None]
"""Work in stages; each ``yield`` is a moment at which a collective is under way."""

Means: TypeAlias = Generator[None, None, list[Tensor]]
"""The same, which returns averaged tensors at its end: ``means = yield from exchange.mean(...)``."""

Arriving: TypeAlias = "Generator[None, None, Arrived]"
"""The same, which returns a mean that is still to be decoded."""


class Collective:
    """Takes part in the collectives of a process group.

    Args:
        meter: counts what travels.
        group: process group; the default one if ``None``.
    """

    def __init__(self, meter: Meter, group: dist.ProcessGroup | None = None) -> None:
        self.meter = meter
        self.group = group
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0

    def wait(self, work: dist.Work | None, names: Sequence[str], step: int) -> None:
        """Wait for a collective and count the time as exposed communication.

        Raises:
            ExchangeError: if it failed or timed out.
        """
        if work is not None:
            with self.meter.timed("exchange"), network_failures(self.rank, step, names):
                work.wait()


class Piece(NamedTuple):
    """One payload that has arrived.

    Args:
        compressor: decodes it.
        payload: its fields may be views of what came from the network.
        tensor: number of the tensor that it is part of.
        start: where in that tensor what it decodes to belongs.
        weight: of it in the mean.
    """

    compressor: Compressor
    payload: Payload
    tensor: int
    start: int
    weight: float


@dataclass(frozen=True)
class Arrived:
    """A mean that is there and not yet decoded, the same on every rank: as small as what travelled.

    Args:
        pieces: sum to the mean, in this order.
    """

    pieces: list[Piece]

    def add_to(self, out: Sequence[Tensor], alpha: float = 1.0) -> None:
        """Add ``alpha`` times the mean to 1-D tensors."""
        for compressor, payload, tensor, start, weight in self.pieces:
            target = out[tensor][start : start + payload.numel]
            compressor.decompress_add_(payload, target, weight * alpha)

    def finite(self) -> bool:
        """Whether the mean is finite: payloads of something that is not hold a NaN or an infinity themselves."""
        fields = [f for piece in self.pieces for f in piece.payload.fields.values() if f.is_floating_point()]
        # A sum is finite only if all terms are; one look at the device for all.
        sums = [f.sum(dtype=None if f.dtype is torch.bfloat16 else wide(f.dtype)).double() for f in fields]
        return not sums or bool(torch.stack(sums).isfinite().all()) or all(all_finite(f) for f in fields)


class Exchange(Collective, ABC):
    """Averages payloads over a process group.

    Args:
        compressor: how payloads are decoded (and, for a server, compressed again).
        meter: counts what travels.
        group: process group; the default one if ``None``.
    """

    def __init__(self, compressor: Compressor, meter: Meter, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(meter, group)
        self.compressor = compressor

    @abstractmethod
    def gather(self, names: Sequence[str], payloads: Sequence[Payload], step: int) -> Arriving:
        """Return the mean over ranks of the decoded payloads, still to be decoded, the same bits on every rank.

        Args:
            names: one a payload, the same on all ranks; residuals of a server are kept under them.
            payloads: what this rank contributes, on one device and of one dtype; owned by the exchange from here on.
            step: number of the exchange; enters the keys of a server's randomness.

        Raises:
            ExchangeError: if a collective failed or timed out.
        """

    def mean(
        self,
        names: Sequence[str],
        payloads: Sequence[Payload],
        step: int,
        onto: Sequence[Tensor] | None = None,
        alpha: float = 1.0,
    ) -> Means:
        """Gather and decode.

        Args:
            names: see :meth:`gather`.
            payloads: the same.
            step: the same.
            onto: add ``alpha`` times the mean to these 1-D tensors of the payloads' dtype, without memory for the mean.
            alpha: see ``onto``; without it the mean itself is returned.

        Returns:
            ``onto``, or new 1-D tensors, allocated only after the network is done, in the dtype of the payloads.

        Raises:
            ExchangeError: if a collective failed or timed out.
        """
        numels, dtype, device = [payload.numel for payload in payloads], payloads[0].dtype, device_of(payloads)
        gathered = self.gather(names, payloads, step)
        del payloads  # so that what gathers can free them
        arrived = yield from gathered
        with self.meter.timed("encode"):
            if onto is not None:
                out = list(onto)
                arrived.add_to(out, alpha)
            else:
                out = list(torch.split(torch.zeros(sum(numels), dtype=dtype, device=device), numels))
                arrived.add_to(out)
        return out


def device_of(payloads: Sequence[Payload]) -> torch.device:
    """Return the device that the payloads live on."""
    return next(iter(payloads[0].fields.values())).device


def overlap(works: Iterable[Steps], depth: int = 2) -> None:
    """Run staged works to their ends, at most ``depth`` under way, in an order that depends on their stages alone.

    Creating the next work (compressing the next bucket) happens while the earlier ones are on the network.
    """
    active: deque[Steps] = deque()
    for work in works:
        if _advance(work):
            active.append(work)
        while len(active) >= depth:
            _advance_first(active)
    drain(active)


def drain(started: Iterable[Steps]) -> None:
    """Run works that have started to their ends, stage by stage in turn."""
    active = deque(started)
    while active:
        _advance_first(active)


def _advance_first(active: deque[Steps]) -> None:
    first = active.popleft()
    if _advance(first):
        active.append(first)


def _advance(work: Steps) -> bool:
    """Run one stage; False if it was the last."""
    try:
        next(work)
    except StopIteration:
        return False
    return True
