"""The arguments that the zeroth-order optimizers share, and what they must be."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import nn
from typing_extensions import Required

from lightning_distopt.optimizers.proximal import Proximal
from lightning_distopt.zeroth_order.asking import Layout
from lightning_distopt.zeroth_order.estimators import Estimator
from lightning_distopt.zeroth_order.retry import RetryPolicy

__all__ = ["SharedArguments", "check_parameters", "checked_count", "root"]


class SharedArguments(TypedDict, total=False):
    """Keyword arguments of every method, beside ``lr``; explained at :class:`ZOProxSGD`."""

    n_samples: Required[int]
    batch_size: int | None
    inner_steps: int | None
    estimator: Estimator | None
    smoothing: float | None
    proximal: Proximal | None
    max_queries: int | None
    seed: int
    replacement: bool
    chunk_bytes: int
    retry: RetryPolicy | None
    module: nn.Module | None


def root(n_samples: int, twice: int) -> int:
    """Return ``floor(n ** (twice / 3))`` without the rounding of floating point."""
    guess = round(n_samples ** (twice / 3))
    return int(guess - 1 if guess**3 > n_samples**twice else guess)


def checked_count(name: str, value: Any) -> int:
    """Return ``value``, an integer of at least 1; otherwise raise ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1: got {value!r}. Write for example `{name}=1`.")
    return value


def check_parameters(layout: Layout, name: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` for parameters that ``name`` cannot move."""
    for parameter in layout.params:
        if not parameter.is_floating_point():
            raise TypeError(
                f"`{name}` moves floating-point parameters: got {parameter.dtype}. Leave that parameter out."
            )
        if not parameter.is_contiguous():
            raise ValueError(
                f"`{name}` needs contiguous parameters: got strides {parameter.stride()} for shape {tuple(parameter.shape)}. "
                "Assign `parameter.data = parameter.data.contiguous()` first."
            )
        if parameter.dtype != layout.dtype or parameter.device != layout.device:
            raise ValueError(
                f"`{name}` needs parameters of one type on one device: got {layout.dtype} on {layout.device} and "
                f"{parameter.dtype} on {parameter.device}. Convert them, or use one optimizer for each."
            )
