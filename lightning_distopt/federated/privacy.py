"""Differential privacy of the clients: clip each update, sum with equal weights, add noise, divide; then the server step.

    g = ( sum_k D_k min(1, clip / |D_k|) + N(0, (noise_multiplier clip)²) ) / m        m: expected cohort, not the realised one

The norm is over everything that a client's reply changes, buffers included. What follows (momentum, sending, saving) is
post-processing of noised releases and costs nothing. The server sees the updates before it clips them: it is trusted.

Source: arXiv:1710.06963.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Privacy", "clipped_", "noise_", "norm"]


@dataclass(frozen=True)
class Privacy:
    """What protects a client, and how far.

    Args:
        clip: greatest L2 norm of a client's update, above 0, in units of parameters.
        noise_multiplier: standard deviation of the noise on the sum over ``clip``, at least 0; 0 protects nothing.
        delta: probability with which epsilon may not hold, in (0, 1); below one over the number of clients.
        population: number of clients from which cohorts are drawn, at least 1.
        sampling: ``"poisson"``: each client takes part independently with probability ``fraction_train``, which amplifies the
            guarantee; ``"fixed"``: cohorts of equal size, no amplification is claimed.
        max_epsilon: no round is begun that would exceed it; ``None``: no limit.

    Raises:
        ValueError: if a number is out of range.
    """

    clip: float
    noise_multiplier: float
    delta: float
    population: int
    sampling: Literal["poisson", "fixed"] = "poisson"
    max_epsilon: float | None = None

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"`clip` must be above 0, a norm of updates: got {self.clip}. Try the median norm.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"`noise_multiplier` must be finite and at least 0: got {self.noise_multiplier}. Try 1.0.")
        if self.noise_multiplier > 0 and math.isinf(self.clip):
            raise ValueError(f"`clip` must be finite where noise is added: got {self.clip}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"`delta` must be in (0, 1): got {self.delta}. Use less than 1 / {self.population}.")
        if isinstance(self.population, bool) or self.population < 1:
            raise ValueError(f"`population` must be at least 1 client: got {self.population}.")
        if self.sampling not in ("poisson", "fixed"):
            raise ValueError(f"`sampling` must be 'poisson' or 'fixed': got {self.sampling!r}.")
        if self.max_epsilon is not None and not self.max_epsilon > 0:
            raise ValueError(f"`max_epsilon` must be above 0: got {self.max_epsilon}. Leave it out for no limit.")


def norm(update: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of all tensors together, in float64."""
    lengths = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in update.values()]
    return math.sqrt(sum(length * length for length in lengths))  # a product becomes infinite where ** raises


def clipped_(update: Mapping[str, Tensor], clip: float) -> float:
    """Shorten an update in place so that its norm is at most ``clip``; return the norm that it had."""
    length = norm(update)
    if length > clip:
        for tensor in update.values():
            tensor.mul_(clip / length)
        while norm(update) > clip:  # the product is rounded; the sensitivity must hold to the last bit
            for tensor in update.values():
                tensor.mul_(1 - torch.finfo(tensor.dtype).eps)
    return length


def noise_(total: Mapping[str, Tensor], deviation: float, key: int) -> None:
    """Add independent Gaussian noise to every element, in the order of the names; ``key`` must be secret."""
    generator = torch.Generator().manual_seed(key)
    for name in sorted(total):
        tensor = total[name]
        tensor.add_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator), alpha=deviation)
