"""Specifications: schemes that are no tensor → payload → tensor, because ranks talk more than once, or take a vote.

They say what to do and hold the numbers; the communication is in ``exchange/``. They work on gradients, so they go with
``error_feedback="gradient"`` or ``"none"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

__all__ = ["PowerSGD", "SignSGD", "Specification"]


class Specification:
    """Base class of all specifications, which are frozen dataclasses (jsonargparse finds no subclasses of a dataclass).

    Attributes:
        error_feedback: what goes with it best.
        keeps_residual: whether error feedback is possible.
    """

    error_feedback: ClassVar[Literal["gradient", "none"]] = "none"
    keeps_residual: ClassVar[bool] = False


@dataclass(frozen=True)
class PowerSGD(Specification):
    """Send each matrix ``M`` (a gradient plus residual, as rows x the rest) as two thin ones, and sum those in the network.

    ``P = mean(M Q);  orthonormalise P;  Q = mean(Mᵀ P);  out = P Qᵀ;  e = M - out``, with ``Q`` kept for the next step
    (warm start: one power iteration a step). Vectors, and matrices for which it would not save, are sent in float32.
    ``out`` has at most ``rank``; the residual makes up for the rest over the steps.

    Bytes: ``4 rank (rows + columns)`` a matrix, all-reduced, so they do not grow with the ranks. Memory: the residual,
    and ``Q``.

    Args:
        rank: of what is sent, at least 1; 1, 2 and 4 are common.

    Raises:
        ValueError: if ``rank`` is below 1.

    Source: arXiv:1905.13727.
    """

    rank: int = 2
    error_feedback: ClassVar[Literal["gradient", "none"]] = "gradient"
    keeps_residual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise TypeError(f"`rank` must be an integer >= 1: got {self.rank!r}. Write for example `PowerSGD(rank=2)`.")
        if self.rank < 1:
            raise ValueError(f"`rank` must be an integer >= 1: got {self.rank}. Write for example `PowerSGD(rank=2)`.")


@dataclass(frozen=True)
class SignSGD(Specification):
    """Send the sign of every element, and step by the sign of the majority: ``out = sgn(Σ sgn(g))``, 0 on a tie.

    The step has no magnitude, so learning rates are much smaller than elsewhere (the authors of PowerSGD found 5e-5 for
    CIFAR on 16 ranks). Momentum is the optimizer's, after the vote. No residual is kept.

    Bytes: one bit an element and rank, gathered, up to 8 ranks; above, one byte an element, all-reduced, up to 127 ranks.

    Source: arXiv:1802.04434, arXiv:1810.05291; there momentum comes before the vote.
    """
