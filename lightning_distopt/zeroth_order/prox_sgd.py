"""ZO-ProxSGD, also known as RSPGF: proximal SGD with an estimated gradient; the baseline of the other two."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_distopt.zeroth_order.arguments import SharedArguments
from lightning_distopt.zeroth_order.asking import Ask
from lightning_distopt.zeroth_order.base import ZeroOrderOptimizer
from lightning_distopt.zeroth_order.estimates import Estimate

__all__ = ["ZOProxSGD"]


class ZOProxSGD(ZeroOrderOptimizer):
    """``x <- prox(x - lr_t v, lr_t)``, v the mean estimate over a batch; ``c b`` queries a step.

    Memory beside the parameters: nothing that lasts. During a query of a random direction a copy of the parameters, or,
    with ``module``, of one layer; during an update one piece of 65,536 entries.

    Args:
        params: parameters, or groups of them with ``lr`` and ``proximal`` of their own.
        n_samples: number n of the f_i.
        lr: step size; ``None`` estimates L and takes 1 / L (coordinates) or 1 / (3 L) (random directions).
        batch_size: samples b of a step; ``None`` is ``floor(n^(2/3))``.
        inner_steps: not used; taken so that the three methods take the same arguments.
        estimator: ``CoordinateEstimator()`` (``c = 2 d``) or ``GaussianEstimator(directions=1)`` (``c = 2``).
        smoothing: distance h of the points that are compared; ``None`` takes the estimator's for the parameters' type.
        proximal: the term that is not smooth; ``None`` for none.
        max_queries: budget; a step that it does not allow raises ``BudgetError`` before anything is asked.
        seed: of samples and directions.
        schedule: "sqrt" is ``lr_t = lr / sqrt(t)``; "constant" is ``lr``.
        replacement: draw the batch with replacement.
        chunk_bytes: bound on the displaced copies of the parameters that an objective is evaluated at in one call.
        retry: what happens when a query fails; ``None`` gives up at once.
        module: the model behind a closure: its parameters are then moved layer by layer while it runs, and no copy of the
            model is kept.

    Raises:
        ValueError: for a value outside its range; it says which and what to do.
        BudgetError: if ``max_queries`` does not allow the first step.

    Example::

        >>> import torch
        >>> from lightning_distopt.optimizers.proximal import L1
        >>> from lightning_distopt.zeroth_order import GaussianEstimator, ZOProxSGD
        >>> data, x = torch.eye(3), torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ZOProxSGD([x], n_samples=3, lr=0.1, estimator=GaussianEstimator(), proximal=L1(1e-3))
        >>> value = optimizer.step(lambda indices: (data[indices] @ x).square())
        >>> optimizer.queries  # two for each of floor(3^(2/3)) samples
        4

    Source: arXiv:1902.06158.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        *,
        schedule: Literal["sqrt", "constant"] = "sqrt",
        **arguments: Unpack[SharedArguments],
    ) -> None:
        if schedule not in get_args(Literal["sqrt", "constant"]):
            raise ValueError(f"`schedule` must be 'sqrt' or 'constant': got {schedule!r}. Choose one of these.")
        self.schedule = schedule
        self._found: Estimate | None = None
        super().__init__(params, lr=lr, **arguments)

    def _next_queries(self) -> int:
        return self.estimator.queries(self.layout.numel) * self.batch_size

    def _rates(self, ask: Ask) -> list[float]:
        divisor = math.sqrt(self._steps + 1) if self.schedule == "sqrt" else 1.0
        return [rate / divisor for rate in super()._rates(ask)]

    def _estimate(self, ask: Ask) -> float:
        self._found, value = self.estimator.mean(ask, self._draw("step", self._batch(self.replacement)), self.smoothing)
        return value

    def _slice(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        assert self._found is not None
        return self._found.slice(first, last, dtype)
