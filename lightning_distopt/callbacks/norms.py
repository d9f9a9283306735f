"""Norms of many tensors at once, left on their device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["gradient_norms", "norms", "wide_of"]


def wide_of(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that norms of these are taken in: float64 if one of them is, else float32."""
    return torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32


def norms(tensors: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """Return the 2-norm of each tensor, in at least float32, shape ``(len(tensors),)``.

    One multi-tensor call, no look from the host.
    """
    if not tensors:
        return torch.zeros(0, device=device)
    dtype = wide_of(tensors)
    found = torch._foreach_norm([tensor.detach() for tensor in tensors], 2, dtype=dtype)
    return torch.stack([norm.to(device=device or found[0].device, dtype=dtype) for norm in found])


def gradient_norms(members: Sequence[tuple[Parameter, dict[str, Any]]], weights: Tensor, decayed: bool) -> Tensor:
    """Return ``|g|``, or ``|g + decay w|``, of each member; 0 where there is no gradient.

    Args:
        members: parameters with their optimizer's groups.
        weights: of the members, for device and dtype.
        decayed: add the group's weight decay.
    """
    places, tensors = [], []
    for place, (parameter, group) in enumerate(members):
        if parameter.grad is not None:
            decay = float(group.get("weight_decay", 0.0)) if decayed else 0.0
            places.append(place)
            tensors.append(parameter.grad.add(parameter, alpha=decay) if decay else parameter.grad)
    found = norms(tensors, weights.device).to(weights)
    if len(places) == len(members):
        return found
    return torch.zeros_like(weights).index_copy_(0, torch.tensor(places, device=weights.device), found)
