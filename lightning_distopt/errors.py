"""The errors that this package raises for reasons of its own; bad arguments are plain ``ValueError`` and ``TypeError``."""

from __future__ import annotations

__all__ = ["DistoptError", "NonFiniteError", "RankMismatchError", "SidecarError"]


class DistoptError(RuntimeError):
    """Base class of the errors below."""


class NonFiniteError(DistoptError, ValueError):
    """A NaN or an infinity would have entered a payload, a residual or the common model."""


class RankMismatchError(DistoptError):
    """The ranks do not hold the same parameters in the same order, so no collective can be matched."""


class SidecarError(DistoptError):
    """A per-rank checkpoint file is missing, unreadable or belongs to another run, and ``strict_sidecars=True``."""
