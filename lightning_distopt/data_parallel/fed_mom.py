"""FedMom: Nesterov's momentum on the averaged displacement.

Source: arXiv:2002.02090; with a constant rate the outer step of DiLoCo (arXiv:2311.08105), too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_distopt.data_parallel.outer_optimizer import (
    Memory,
    OuterOptimizer,
    Rate,
    checked_rate,
    is_number,
    rate_at,
)

__all__ = ["FedMom", "fed_mom_"]


def fed_mom_(x: Tensor, g: Tensor, v: Tensor, lr: float, momentum: float) -> None:
    """Take one server step in place: ``v' = x - lr g;  x' = v' + momentum (v' - v)``.

    A rate that changes from round to round scales the new displacement only, unlike in ``torch.optim.SGD``, which rescales
    the whole momentum. With a constant rate the two agree.

    Args:
        x: the model that the replicas began with, any shape; becomes ``x'``.
        g: pseudo-gradient, like ``x``; scratch afterwards.
        v: like ``x``; ``x`` itself before the first round; becomes ``v'``.
        lr: server rate.
        momentum: in [0, 1); 0 is federated averaging, exactly.
    """
    x.sub_(g, alpha=lr)
    g.copy_(x).sub_(v)
    v.copy_(x)
    if momentum:
        x.add_(g, alpha=momentum)


@dataclass(frozen=True)
class FedMom(OuterOptimizer):
    """``v' = x - lr g;  x' = v' + momentum (v' - v)``, with ``v = x`` at the start.

    ``v`` is one copy of the parameters, in float32 for half precision, the same on every rank. A constant pseudo-gradient
    moves the model by ``lr g / (1 - momentum)`` a round: where it oscillates, lower ``lr`` first (0.7, then 0.3).

    Args:
        lr: server rate, above 0; a number, or a function of the round (0, 1, ...). 1 goes with normalised and uniform weights,
            the number of replicas over the participants with ``weighting="paper"``; DiLoCo uses 0.7.
        momentum: in [0, 1).

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> FedMom()
        FedMom(lr=1.0, momentum=0.9)

    Source: arXiv:2002.02090.
    """

    lr: Rate = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        checked_rate(self.lr)
        if not (is_number(self.momentum) and 0.0 <= self.momentum < 1.0):
            raise ValueError(f"`momentum` must be in [0, 1): got {self.momentum!r}. Write for example `momentum=0.9`.")

    def step_(self, x: Sequence[Tensor], g: Sequence[Tensor], memory: Sequence[Memory], round: int) -> None:
        rate = rate_at(self.lr, round)
        for model, displacement, kept in zip(x, g, memory, strict=True):
            v = kept.get("v")
            if v is None or v.shape != model.shape:
                v = kept["v"] = model.clone()
            fed_mom_(model, displacement, v, rate, self.momentum)
