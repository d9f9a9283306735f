"""CLARS and LARS as functions of norms: how much of the learning rate each tensor gets.

All take and return 1-D tensors with one entry a parameter tensor k, on one device, and never look at values on the host::

    clars            min(clip, eta |w| / n)                      n: mean of the norms of small-batch gradients
    clars_authors    min(clip, eta |w| / (|d| + eps) * |d| / (n + eps))
    lars_outside     eta |w| / (|d| + eps)                       d = g + decay * w
    lars             eta |w| / (|g| + decay |w| + eps)

Source: CLARS arXiv:2002.01576, as in the authors' code; LARS arXiv:1708.03888, the published pseudo-code (``lars``) and the
form of CLARS' authors (``lars_outside``).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clars", "clars_authors", "lars", "lars_outside"]

EPS = 1e-6


def clars(weights: Tensor, probes: Tensor, eta: float, clip: float) -> Tensor:
    """Return ``min(clip, eta |w| / n)``, and ``clip`` where ``|w|`` or ``n`` is 0.

    A tensor of zeros would never leave 0 by the formula alone. A zero gradient needs no rule: the formula has none in it.

    Args:
        weights: ``|w|``, float32 or float64, shape ``(K,)``.
        probes: ``n``, the same shape.
        eta: trust coefficient, above 0.
        clip: largest scale, above 0.
    """
    free = (weights == 0) | (probes == 0)
    return torch.where(free, clip, (eta * weights / torch.where(free, 1.0, probes)).clamp(max=clip))


def clars_authors(
    weights: Tensor, decayed: Tensor, probes: Tensor, eta: float, clip: float, eps: float = EPS
) -> Tensor:
    """Return CLARS as the authors' code computes it: LARS times ``|d| / n``, clipped.

    Where ``|w|`` is 0 this is ``|d| / n``, clipped, and where ``|d|`` is 0 it is 0: the tensor stops.
    """
    return (lars_outside(weights, decayed, eta, eps) * decayed / (probes + eps)).clamp(max=clip)


def lars_outside(weights: Tensor, decayed: Tensor, eta: float, eps: float = EPS) -> Tensor:
    """Return ``eta |w| / (|d| + eps)``, for use outside the momentum, and 1 where ``|w|`` or ``|d|`` is 0."""
    free = (weights == 0) | (decayed == 0)
    return torch.where(free, 1.0, eta * weights / (decayed + eps))


def lars(weights: Tensor, gradients: Tensor, decay: Tensor, eta: float, eps: float = 0.0) -> Tensor:
    """Return ``eta |w| / (|g| + decay |w| + eps)``, for use inside the momentum, and 1 where ``|w|`` or ``|g|`` is 0.

    Args:
        weights: ``|w|``, shape ``(K,)``.
        gradients: ``|g|``, without decay.
        decay: weight decay of each tensor.
        eta: trust coefficient, above 0.
        eps: of the denominator.
    """
    free = (weights == 0) | (gradients == 0)
    denominator = torch.where(free, 1.0, gradients + decay * weights + eps)
    return torch.where(free, 1.0, eta * weights / denominator)
