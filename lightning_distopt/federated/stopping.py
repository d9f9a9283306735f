"""When to end a federation before its last round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_distopt.federated.metrics import higher_is_better

__all__ = ["RoundStopping"]


@dataclass
class RoundStopping:
    """End the federation when a metric no longer improves, or has reached a target.

    Args:
        monitor: name of the metric, for example ``"val/accuracy"``.
        patience: rounds without improvement before the end, at least 1; ``None``: only the target ends it.
        min_delta: smallest change that counts as improvement, at least 0.
        mode: ``"min"``, ``"max"``, or ``"auto"``, which goes by the name.
        target: value that ends it at once; ``None``: no target.

    Raises:
        ValueError: if an argument is out of range, or neither ``patience`` nor ``target`` is given.
    """

    monitor: str
    patience: int | None = None
    min_delta: float = 0.0
    mode: Literal["auto", "min", "max"] = "auto"
    target: float | None = None
    best: float = field(default=math.nan, init=False)
    waited: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.patience is None and self.target is None:
            raise ValueError("`patience` or `target` must be given: neither is. Use for example `patience=10`.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"`patience` must be at least 1 round: got {self.patience}.")
        if self.mode not in ("auto", "min", "max"):
            raise ValueError(f"`mode` must be 'auto', 'min' or 'max': got {self.mode!r}.")
        if not self.min_delta >= 0:
            raise ValueError(f"`min_delta` must be at least 0: got {self.min_delta}.")

    def reason(self, metrics: Mapping[str, float]) -> str | None:
        """Take a round's metrics; return why to stop, or ``None``. A round without the metric changes nothing."""
        value = metrics.get(self.monitor)
        if value is None or not math.isfinite(value):
            return None
        sign = 1.0 if self.mode == "max" or (self.mode == "auto" and higher_is_better(self.monitor)) else -1.0
        if self.target is not None and sign * value >= sign * self.target:
            return f"`{self.monitor}` is {value:g} and has reached its target, {self.target:g}"
        if math.isnan(self.best) or sign * (value - self.best) > self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.patience is not None and self.waited >= self.patience:
            return f"`{self.monitor}` has not improved on {self.best:g} for {self.waited} rounds"
        return None
