"""What all ranks do in a step in which a gradient of any of them holds a NaN or an infinity.

==========  ================================================================================================
``raise``   all ranks stop with one error that names rank, step and parameter
``skip``    no rank steps: parameters, momentum and residuals of all stay as they were, and nothing is sent
``zero``    the bad entries count as zero, on the rank that has them; the rest of the step is as ever
==========  ================================================================================================

The gradient is looked at before the optimizer, so that nothing bad enters a momentum, and before a payload is made, so that
nothing bad enters a residual. That all ranks do the same takes one flag in an all-reduce of 32 bytes a step; with "raise"
that flag travels anyway, and where gradients are sent "skip" needs none: there a NaN travels in the payload, and every rank
sees it in the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.data_parallel.agreement import agree, first_non_finite
from lightning_distopt.exchange import Meter

__all__ = ["NonFinite", "NonFiniteGuard", "drop_gradients", "first_bad_gradient", "zero_bad_entries"]

NonFinite = Literal["raise", "skip", "zero"]


@dataclass
class NonFiniteGuard:
    """Applies the policy on one rank, and counts; the counts are the same on all ranks.

    Args:
        policy: see the module's table.
        meter: counts what travels.
        skipped: steps so far that no rank took.
        zeroed: steps so far that were taken with zeros.
    """

    policy: NonFinite
    meter: Meter
    skipped: int = 0
    zeroed: int = 0
    _found: bool = False

    @property
    def steps(self) -> int:
        """Steps so far in which some rank had a bad gradient."""
        return self.skipped + self.zeroed

    def before_step(self, params: Sequence[Parameter]) -> bool:
        """Look at the local gradients before an optimizer's step; a collective, unless the policy is "raise".

        Returns:
            Whether the step is to be skipped, the same on all ranks; the gradients are gone then.
        """
        if self.policy == "raise":
            return False  # what comes out of the step is looked at, by a flag that travels anyway
        bad = first_bad_gradient(params)
        if bad is not None and self.policy == "zero":
            zero_bad_entries(param.grad for param in params)
        device = params[0].device if params else torch.device("cpu")
        if agree(0, bad, False, self.meter, device).culprit is None:
            return False
        self._count()
        if self.policy == "skip":
            drop_gradients(params)
        return self.policy == "skip"

    def look_at(self, buffer: Tensor) -> None:
        """Look at a bucket of local gradients before it is compressed, if the policy is "zero"."""
        if self.policy == "zero":
            self._found |= zero_bad_entries([buffer])

    def after_backward(self, params: Sequence[Parameter], non_finite: bool) -> None:
        """Judge averaged gradients.

        Args:
            params: their parameters.
            non_finite: the average held a NaN or an infinity; the same on all ranks. With "zero" that is an overflow of
                the sum, and the step is skipped.
        """
        if self.policy == "zero":
            mine, self._found = self._found, False
            device = params[0].device if params else torch.device("cpu")
            if agree(0, 0 if mine else None, False, self.meter, device).culprit is not None and not non_finite:
                self.zeroed += 1
        if non_finite:
            self.skipped += 1
            drop_gradients(params)

    def _count(self) -> None:
        if self.policy == "skip":
            self.skipped += 1
        else:
            self.zeroed += 1


def first_bad_gradient(params: Sequence[Parameter]) -> int | None:
    """Return the index of the first parameter whose gradient holds a NaN or an infinity; usually one pass."""
    grads = [param.grad for param in params]
    dense = [grad for grad in grads if grad is not None and not grad.is_sparse]
    sums = torch.stack([grad.sum(dtype=torch.float64) for grad in dense]) if dense else torch.zeros(1)
    if len(dense) == sum(grad is not None for grad in grads) and bool(sums.isfinite().all()):
        return None  # a sum is finite only if all terms are
    return first_non_finite(grads)


def drop_gradients(params: Iterable[Parameter]) -> None:
    """Let an optimizer find no gradient: it then leaves parameter and momentum alone, without decay."""
    for param in params:
        param.grad = None


def zero_bad_entries(tensors: Iterable[Tensor | None]) -> bool:
    """Replace NaNs and infinities by zeros, in place; return whether there were any."""
    found = False
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_sparse:  # what is at one place several times may be summed before it is stepped: drop it all
            if first_non_finite([tensor]) is not None:
                tensor.zero_()
                found = True
        elif not bool(tensor.isfinite().all()):
            torch.nan_to_num_(tensor, nan=0.0, posinf=0.0, neginf=0.0)
            found = True
    return found
