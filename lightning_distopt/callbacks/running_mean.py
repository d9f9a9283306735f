"""A running mean of vectors whose entries have names, with entries missing now and then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["RunningMean"]


class RunningMean:
    """``v <- beta v + (1 - beta) value``; ``weight`` is the same sum of ones, and ``v / weight`` the mean.

    So the mean is not drawn to the 0 that it started from, and an entry that was missing keeps what it had.

    Args:
        beta: share kept at each update, in [0, 1); 0 keeps the last value.
    """

    def __init__(self, beta: float = 0.0) -> None:
        self.beta = beta
        self._names: list[str] = []
        self._values = self._weights = torch.zeros(0)

    def update(self, names: Sequence[str], values: Tensor, present: Tensor) -> None:
        """Add values where they are present; both of shape ``(len(names),)``."""
        self._arrange(names, values)
        self._values = torch.where(present, self.beta * self._values + (1 - self.beta) * values, self._values)
        self._weights = torch.where(present, self.beta * self._weights + (1 - self.beta), self._weights)

    def mean(self, names: Sequence[str], otherwise: Tensor) -> Tensor:
        """Return the means, and ``otherwise`` for entries that were never present."""
        self._arrange(names, otherwise)
        known = self._weights > 0
        return torch.where(known, self._values / torch.where(known, self._weights, 1.0), otherwise)

    def _arrange(self, names: Sequence[str], like: Tensor) -> None:
        if list(names) != self._names:
            places = {name: place for place, name in enumerate(self._names)}
            old = [(place, places[name]) for place, name in enumerate(names) if name in places]
            values, weights = torch.zeros_like(like), torch.zeros_like(like)
            if old:
                to, source = (list(places) for places in zip(*old, strict=True))
                values[to], weights[to] = self._values[source].to(like), self._weights[source].to(like)
            self._names, self._values, self._weights = list(names), values, weights
        if self._values.device != like.device or self._values.dtype != like.dtype:
            self._values, self._weights = self._values.to(like), self._weights.to(like)

    def state_dict(self) -> dict[str, Any]:
        """Return names, values and weights, on the CPU."""
        return {"names": list(self._names), "values": self._values.cpu(), "weights": self._weights.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._names = list(state["names"])
        self._values, self._weights = state["values"].clone(), state["weights"].clone()
