"""The errors that this package raises for reasons of its own; bad arguments are plain ``ValueError`` and ``TypeError``."""

from __future__ import annotations

__all__ = ["DistoptError", "ExchangeError", "NonFiniteError", "RankMismatchError", "SidecarError"]


class DistoptError(RuntimeError):
    """Base class of the errors below."""


class ExchangeError(DistoptError):
    """A collective failed or timed out: a peer has stopped, is too slow, or the network between them is broken.

    Attributes:
        rank: the rank that raises it.
        step: number of the exchange, from 0.
        bucket: names of the parameters that travelled; empty if none did.
        peer: the other end, where the backend's message names it.
    """

    def __init__(
        self, message: str, rank: int = 0, step: int = 0, bucket: tuple[str, ...] = (), peer: str | None = None
    ) -> None:
        super().__init__(message, rank, step, bucket, peer)  # all of them, so that a pickled error arrives whole
        self.rank = rank
        self.step = step
        self.bucket = bucket
        self.peer = peer

    def __str__(self) -> str:
        return str(self.args[0])


class NonFiniteError(DistoptError, ValueError):
    """A NaN or an infinity would have entered a payload, a residual or the common model."""


class RankMismatchError(DistoptError):
    """The ranks do not hold the same parameters in the same order, so no collective can be matched."""


class SidecarError(DistoptError):
    """A per-rank checkpoint file is missing, unreadable or belongs to another run, and ``strict_sidecars=True``."""
