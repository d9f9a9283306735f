"""What surrounds the optimizer's step of one stage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

__all__ = ["nothing_to_clip", "rescaled"]


@contextmanager
def rescaled(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Multiply all learning rates for a moment."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if factor != 1.0:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@contextmanager
def nothing_to_clip(expected: bool) -> Iterator[None]:
    """Let torch not warn of gradients that are not there, where a stage has nothing to train."""
    with warnings.catch_warnings():
        if expected:
            warnings.filterwarnings("ignore", message=".*no gradient clipping will occur")
        yield
