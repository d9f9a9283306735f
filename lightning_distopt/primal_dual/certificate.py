"""The duality gap: how far, at most, the objective is above its minimum.

    P = primal_sum(v) / N + lam/2 |v|^2        D = dual_sum / N - lam/2 |v|^2        v = v(alpha), exactly

The gap holds whatever alpha is. It is taken at w = v(alpha), or at the w that a run has tracked, which rounding keeps a
little apart: P of the one and D of the other are exact all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.errors import CertificateError

__all__ = ["ROUNDING", "Certificate", "Row", "certify", "rounds_ahead"]

Array = NDArray[np.float64]
ROUNDING = 1e-9  # of the largest coordinate: what a tracked w may differ from v(alpha) by and be kept
_TOLERATED = 1e-9  # of max(1, |P|): what rounding may take from the gap


@dataclass(frozen=True)
class Certificate:
    """Both objectives at one point.

    Attributes:
        primal: P, the objective.
        dual: D, below every value that P takes.
    """

    primal: float
    dual: float

    @property
    def gap(self) -> float:
        """``P - D``, absolute; rounding may leave it a little below 0, which is shown as 0."""
        return max(0.0, self.primal - self.dual)

    @property
    def relative(self) -> float:
        """``(P - D) / max(1, |P|)``: what ``tol`` is compared with."""
        return self.gap / max(1.0, abs(self.primal))


@dataclass(frozen=True)
class Row:
    """One row of ``history_``.

    Attributes:
        seconds: since the start (of the virtual clock, in a simulation).
        rounds: server rounds so far; passes, where there is one worker.
        primal: P.
        dual: D.
        gap: P - D.
        bytes_up: from the workers to the server so far.
        bytes_down: from the server to the workers so far.
    """

    seconds: float
    rounds: int
    primal: float
    dual: float
    gap: float
    bytes_up: int = 0
    bytes_down: int = 0

    def asdict(self) -> dict[str, float]:
        """Return the row as a dictionary."""
        return asdict(self)


def certify(
    primal_sum: float, dual_sum: float, v: Array, lam: float, total: float, w: Array | None = None
) -> Certificate:
    """Return the certificate of ``w``, which is ``v = v(alpha)`` where it is not given.

    Raises:
        CertificateError: if it is not finite (the run has diverged), or negative beyond rounding.
    """
    half = 0.5 * lam * float(v @ v)
    found = Certificate(primal_sum / total + (half if w is None else 0.5 * lam * float(w @ w)), dual_sum / total - half)
    if not math.isfinite(found.primal) or not math.isfinite(found.dual):
        raise CertificateError(
            f"The objectives must be finite: got P = {found.primal} and D = {found.dual}. The run has diverged: use "
            "`sigma=None` (the safe gamma K), or scale the features."
        )
    slack = _TOLERATED * max(1.0, abs(found.primal), abs(found.dual))
    if found.primal - found.dual < -slack:
        raise CertificateError(
            f"The gap must not be negative: got P - D = {found.primal - found.dual:.3g} at P = {found.primal:.6g}. The model and "
            "its dual variables do not belong together; please report this."
        )
    return found


def rounds_ahead(history: Sequence[Row], tol: float, at_zero: float | None = None) -> int:
    """Return the rounds until the next certificate: as many as were done, or fewer where the gap's rate says so.

    Args:
        history: rows so far, at least one.
        tol: of the relative gap.
        at_zero: P(0), the gap at alpha = 0, where the run started there.
    """
    last = history[-1]
    gap, rounds = (history[-2].gap, history[-2].rounds) if len(history) > 1 else (at_zero, 0)
    if gap is None or last.gap <= 0.0:
        return max(1, last.rounds)
    rate = math.log(max(gap, 1e-300) / last.gap) / max(1, last.rounds - rounds)
    left = math.log(last.gap / max(tol * max(1.0, abs(last.primal)), 1e-300))
    if rate <= 0.0:
        return max(1, last.rounds)
    return max(1, min(last.rounds, math.ceil(left / rate)))
