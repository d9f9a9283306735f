"""ZO-ProxSVRG: the same batch's estimate at a snapshot is subtracted, the snapshot's full estimate added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.zeroth_order.arguments import SharedArguments
from lightning_distopt.zeroth_order.asking import Ask
from lightning_distopt.zeroth_order.base import ZeroOrderOptimizer
from lightning_distopt.zeroth_order.directions import pieces
from lightning_distopt.zeroth_order.estimates import Dense, Estimate, Replayed, Sum

__all__ = ["ZOProxSVRG"]


class ZOProxSVRG(ZeroOrderOptimizer):
    """``v = mean_I [est_i(x) - est_i(snapshot)] + full estimate at the snapshot``, taken anew every ``inner_steps``.

    The two estimates share samples and directions, so that v is the full estimate exactly where x is the snapshot.
    ``c (n + 2 b m)`` queries an epoch of ``m`` steps; the first step of each makes the ``c n``.

    Memory beside the parameters: the snapshot and its gradient (two copies of the parameters), and, with a closure, a third
    for the parameters that are put aside. Arguments not listed are those of :class:`ZOProxSGD`.

    Args:
        params: parameters, or groups of them.
        lr: step size; ``None`` estimates L and takes 1 / L (coordinates) or 1 / (3 L) (random directions).
        inner_steps: steps m between snapshots; ``None`` is ``floor(n^(1/3))``.
        anchor_batch: samples of the snapshot's full estimate; ``None`` is all of them (fewer: the "+" variant).
        shared_directions: false draws other directions at the snapshot, which loses the reduction of variance: for
            comparison only.
        **arguments: see :class:`ZOProxSGD`.

    Raises:
        ValueError: for a value outside its range.
        BudgetError: if ``max_queries`` does not allow one snapshot and one step.

    Source: arXiv:1902.06158.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        *,
        anchor_batch: int | None = None,
        shared_directions: bool = True,
        **arguments: Unpack[SharedArguments],
    ) -> None:
        self.anchor_batch, self.shared_directions = anchor_batch, shared_directions
        n_samples = arguments.get("n_samples", 0)
        if anchor_batch is not None and not 1 <= anchor_batch <= n_samples:
            raise ValueError(f"`anchor_batch` must be from 1 to n_samples={n_samples}: got {anchor_batch!r}. Lower it.")
        self._found: Estimate | None = None
        super().__init__(params, lr=lr, **arguments)

    @property
    def snapshot(self) -> list[Tensor] | None:
        """The parameters at the last snapshot."""
        return self._memory.get("snapshot")

    @property
    def anchor_gradient(self) -> Tensor | None:
        """The full estimate at the snapshot, all parameters in one vector."""
        return self._memory.get("gradient")

    def _next_queries(self) -> int:
        cost = self.estimator.queries(self.layout.numel)
        anchor = self.anchor_batch or self.n_samples
        return cost * (2 * self.batch_size + (anchor if self._is_due() else 0))

    def _is_due(self) -> bool:
        return self._steps % self.inner_steps == 0 and self._memory.get("taken") != self._steps

    def _estimate(self, ask: Ask) -> float:
        if self._is_due():
            self._take_snapshot(ask)
        indices = self._batch(self.replacement)
        here, value = self.estimator.mean(ask, self._draw("step", indices), self.smoothing)
        purpose = "step" if self.shared_directions else "step at the snapshot"
        with ask.at(self._memory["snapshot"]):
            there, _ = self.estimator.mean(ask, self._draw(purpose, indices), self.smoothing)
        self._found = Sum([_difference(here, there), Dense(self._memory["gradient"])])
        return value

    def _take_snapshot(self, ask: Ask) -> None:
        indices = torch.arange(self.n_samples)
        if self.anchor_batch is not None and self.anchor_batch < self.n_samples:
            generator = torch.Generator().manual_seed(derive_key(self.seed, 0, self._steps, "anchor") >> 1)
            indices = torch.randperm(self.n_samples, generator=generator)[: self.anchor_batch]
        full, _ = self.estimator.mean(ask, self._draw("snapshot", indices), self.smoothing)
        gradient = torch.empty(self.layout.numel, dtype=self.layout.dtype, device=self.layout.device)
        for first, last in pieces(0, self.layout.numel):
            gradient[first:last] = full.slice(first, last, gradient.dtype)
        snapshot = [parameter.detach().clone() for parameter in self.layout.params]
        self._memory.update(snapshot=snapshot, gradient=gradient, taken=self._steps)

    def _slice(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        assert self._found is not None
        return self._found.slice(first, last, dtype)


def _difference(here: Estimate, there: Estimate) -> Estimate:
    if isinstance(here, Dense) and isinstance(there, Dense):
        return Dense(here.vector - there.vector)
    assert isinstance(here, Replayed)
    assert isinstance(there, Replayed)
    if torch.equal(here.keys, there.keys):  # one replay for both; exactly nothing where the points are the same
        return Replayed(here.keys, here.weights - there.weights)
    return Sum([here, Replayed(there.keys, -there.weights)])
