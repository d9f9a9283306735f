"""An estimated gradient, handed out piece by piece: a vector, or scalars whose directions come back from their keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distopt.zeroth_order.directions import combine

__all__ = ["Dense", "Estimate", "Replayed", "Sum"]


class Estimate(ABC):
    """A vector with one entry for each entry of all parameters."""

    @abstractmethod
    def slice(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the entries from ``first`` to ``last``; not to be changed."""


@dataclass
class Dense(Estimate):
    """The vector itself.

    Attributes:
        vector: shape ``(d,)``.
    """

    vector: Tensor

    def slice(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.vector[first:last].to(dtype)


@dataclass
class Replayed(Estimate):
    """``sum_k weights[k] u_k``; directions are drawn again when they are needed.

    Attributes:
        keys: int64, shape ``(K,)``.
        weights: float64, shape ``(K,)``.
    """

    keys: Tensor
    weights: Tensor

    def slice(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        used = self.weights != 0  # what variance reduction has made nothing costs nothing
        if not bool(used.any()):
            return torch.zeros(last - first, dtype=dtype, device=self.keys.device)
        return combine(self.keys[used], self.weights[used], first, last, dtype)


@dataclass
class Sum(Estimate):
    """The sum of several.

    Attributes:
        terms: at least one.
    """

    terms: Sequence[Estimate]

    def slice(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        out = self.terms[0].slice(first, last, dtype).clone()
        for term in self.terms[1:]:
            out += term.slice(first, last, dtype)
        return out
