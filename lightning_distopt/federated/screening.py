"""Which updates are too long to be believed."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["NormHistory", "Screening"]

_WINDOW = 64


@dataclass(frozen=True)
class Screening:
    """Bounds on what one client may say; what is beyond is refused and counted.

    Args:
        norm_bound: greatest L2 norm of an update, above 0; ``None``: no such bound.
        norm_factor: greatest norm as a multiple of the median of those accepted lately (64 at most), above 1; ``None``: no such
            bound. While nothing has been accepted yet, the first ``hold`` replies are held back, and their own median counts.
        max_examples: that a client may claim; more count as so many. ``None``: no bound.
        hold: updates that may be in memory together while no typical norm is known, at least 2. The median of so many is right
            while fewer than half of them lie.

    Raises:
        ValueError: if a number is out of range.
    """

    norm_bound: float | None = None
    norm_factor: float | None = 100.0
    max_examples: float | None = None
    hold: int = 16

    def __post_init__(self) -> None:
        if self.norm_bound is not None and not self.norm_bound > 0:
            raise ValueError(f"`norm_bound` must be above 0: got {self.norm_bound}. Leave it out for no bound.")
        if self.norm_factor is not None and not self.norm_factor > 1:
            raise ValueError(f"`norm_factor` must be above 1: got {self.norm_factor}. 100 refuses what is far off.")
        if self.max_examples is not None and not self.max_examples > 0:
            raise ValueError(f"`max_examples` must be above 0: got {self.max_examples}. Leave it out for no bound.")
        if self.hold < 2:
            raise ValueError(f"`hold` must be at least 2: got {self.hold}. One client alone would set the measure.")

    def problem(self, norm: float, typical: float | None) -> str | None:
        """Say what is wrong with an update of this norm, given the typical one; ``None`` if nothing."""
        if not math.isfinite(norm):
            return "its norm is not finite"
        if self.norm_bound is not None and norm > self.norm_bound:
            return f"its norm {norm:.4g} is above `norm_bound={self.norm_bound:g}`"
        if self.norm_factor is not None and typical and norm > self.norm_factor * typical:
            return f"its norm {norm:.4g} is above `norm_factor={self.norm_factor:g}` times the median, {typical:.4g}"
        return None


class NormHistory:
    """Norms of the updates accepted lately."""

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self.norms: deque[float] = deque(norms, maxlen=_WINDOW)

    def typical(self) -> float | None:
        """Return the median, or ``None`` if there is none yet."""
        return statistics.median_low(self.norms) if self.norms else None
