"""Residuals in units of gradients, by parameter name: classic error feedback for gradients that DDP has bucketed.

    v = g + (last lr / lr) * e        in the bucket's own buffer
    c = C(v);  send c
    e <- v - c                        once all ranks know that the whole step was finite; else e stays as it is

With the ratio of learning rates a residual keeps its size in units of parameters: ``x - lr * mean(e)`` moves as if nothing
had been compressed, also where the learning rate changes. Momentum comes after the averaging.

Source: arXiv:1901.09847, arXiv:1905.10936 (the ratio).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["GradientMemory"]


class GradientMemory:
    """``e`` of one rank, one copy of the gradients (in float32 for half-precision ones).

    Attributes:
        residuals: 1-D, by parameter name; made when a parameter's first step has ended.
        rates: learning rate of the last step that was kept, by parameter name; the same on all ranks.
    """

    def __init__(self) -> None:
        self.residuals: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}

    def compensate_(self, names: Sequence[str], tensors: Sequence[Tensor], rates: Mapping[str, float]) -> None:
        """Turn gradients into ``v``, in place; the residuals stay.

        Args:
            names: one a tensor.
            tensors: gradients.
            rates: learning rate of each parameter in the step that follows; the ratio is 1 where it or the last one is
                not known, or where it is 0.
        """
        for name, tensor in zip(names, tensors, strict=True):
            e = self.residuals.get(name)
            if e is not None and e.numel() == tensor.numel():
                now, last = rates.get(name), self.rates.get(name)
                ratio = last / now if now and last is not None else 1.0
                tensor.add_(e.view(tensor.shape), alpha=ratio)

    def keep(self, names: Sequence[str], tensors: Sequence[Tensor], rates: Mapping[str, float]) -> None:
        """Take ``tensors`` for the new residuals, by copy."""
        for name, tensor in zip(names, tensors, strict=True):
            e = self.residuals.get(name)
            if e is None or e.numel() != tensor.numel():
                self.residuals[name] = tensor.flatten().clone()
            else:
                e.copy_(tensor.view(-1))
            if name in rates:
                self.rates[name] = rates[name]

    def norm(self) -> float:
        """Return the 2-norm of this rank's residuals."""
        return math.sqrt(sum(float(e.square().sum()) for e in self.residuals.values()))

    def load(self, residuals: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Take over residuals, by copy, of the parameters that are still there."""
        self.residuals = {
            name: values.reshape(-1).to(devices[name], copy=True)
            for name, values in residuals.items()
            if name in devices
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all of it; references."""
        return {"residuals": dict(self.residuals), "rates": dict(self.rates)}
