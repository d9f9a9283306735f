"""What the replicas do with the averaged displacement of a round: the outer optimizer of the update engine.

    g = Σ p_k (x - z_k)                     the pseudo-gradient, old minus new, the same on every rank
    x' = step(x, g)                         on every rank for itself, so nothing of it travels

:class:`Plain` is local SGD and FedAvg, :class:`~lightning_distopt.data_parallel.fed_mom.FedMom` is FedMom and DiLoCo, and
:class:`~lightning_distopt.data_parallel.torch_outer.TorchOuter` drives any optimizer of torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Memory", "OuterOptimizer", "Plain", "Rate", "checked_rate", "is_number", "rate_at"]

Memory: TypeAlias = dict[str, Any]
"""What an outer optimizer remembers of one parameter: tensors and numbers by name, empty before the first round."""

Rate: TypeAlias = float | Callable[[int], float]
"""A rate, or the rate of round t = 0, 1, ..."""


class OuterOptimizer(ABC):
    """Moves the common model by the averaged displacement; holds numbers only, its memory is the engine's.

    The same calls with the same values are made on every rank, so an implementation draws nothing and looks at nothing else.
    """

    @abstractmethod
    def step_(self, x: Sequence[Tensor], g: Sequence[Tensor], memory: Sequence[Memory], round: int) -> None:
        """Move ``x`` in place.

        Args:
            x: the common model that the round began with; shapes of the parameters, float32 or float64.
            g: pseudo-gradients of the same shapes and dtypes; scratch afterwards.
            memory: one a parameter; kept by its name, also in checkpoints.
            round: number of the outer step, from 0.
        """


@dataclass(frozen=True)
class Plain(OuterOptimizer):
    """``x' = x - lr g``: with rate 1 the average of the replicas (local SGD, FedAvg).

    Args:
        lr: server rate, above 0; a number, or a function of the round. 1 goes with normalised and uniform weights, the
            number of replicas over the participants with ``weighting="paper"``.

    Raises:
        ValueError: if ``lr`` is not above 0.
    """

    lr: Rate = 1.0

    def __post_init__(self) -> None:
        checked_rate(self.lr)

    def step_(self, x: Sequence[Tensor], g: Sequence[Tensor], memory: Sequence[Memory], round: int) -> None:
        rate = rate_at(self.lr, round)
        for model, displacement in zip(x, g, strict=True):
            model.sub_(displacement, alpha=rate)


def checked_rate(lr: Rate) -> None:
    """Raise unless ``lr`` is above 0, or a function.

    Raises:
        ValueError: naming the value.
    """
    if not callable(lr) and not (is_number(lr) and 0.0 < lr < float("inf")):
        raise ValueError(
            f"`lr` must be above 0 and finite, or a function of the round: got {lr!r}. Write for example `lr=1.0`."
        )


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def rate_at(lr: Rate, round: int) -> float:
    """Return the rate of a round.

    Raises:
        ValueError: if a function gave something else than a finite number of at least 0.
    """
    rate = lr(round) if callable(lr) else lr
    if not 0.0 <= rate < float("inf"):
        raise ValueError(
            f"`lr` must be at least 0 and finite in every round: got {rate} in round {round}. Mend the schedule."
        )
    return float(rate)
