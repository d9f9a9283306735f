"""ZO-ProxSAGA: a table of each sample's last estimate takes the place of the snapshot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_distopt.zeroth_order.arguments import SharedArguments
from lightning_distopt.zeroth_order.asking import Ask
from lightning_distopt.zeroth_order.base import ZeroOrderOptimizer
from lightning_distopt.zeroth_order.directions import pieces
from lightning_distopt.zeroth_order.estimates import Dense, Estimate, Replayed, Sum

__all__ = ["ZOProxSAGA"]


class ZOProxSAGA(ZeroOrderOptimizer):
    """``v = mean_I [est_i(x) - table_i] + mean of the table``; then the rows of I are replaced.

    ``c n`` queries at the first step, then ``c b`` a step. The batch has distinct samples.

    Memory beside the parameters: the mean of the table (one copy of the parameters) and the table: ``n d`` numbers with
    coordinates; ``2 n q`` with random directions, of which only (key, scalar) are kept. The table lies on the CPU.
    Arguments not listed are those of :class:`ZOProxSGD`.

    Args:
        params: parameters, or groups of them.
        lr: step size; ``None`` estimates L and takes 1 / L (coordinates) or 1 / (3 L) (random directions).
        max_table_bytes: a larger table is refused.
        **arguments: see :class:`ZOProxSGD`.

    Raises:
        ValueError: for a value outside its range, or a table above ``max_table_bytes``.
        BudgetError: if ``max_queries`` does not allow the table and one step.

    Source: arXiv:1902.06158; the order of the updates is that of ProxSAGA.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        *,
        max_table_bytes: int = 1 << 30,
        **arguments: Unpack[SharedArguments],
    ) -> None:
        self.max_table_bytes = max_table_bytes
        self._change: Estimate | None = None
        self._share = 0.0
        super().__init__(params, lr=lr, **arguments)
        nbytes = self.table_bytes
        if nbytes > max_table_bytes:
            raise ValueError(
                f"`max_table_bytes` must hold the table of `{type(self).__name__}`, {nbytes} bytes for {self.n_samples} samples: "
                f"got {max_table_bytes}. Use ZOProxSVRG, which keeps no table, GaussianEstimator, whose rows are scalars, or "
                "raise the bound."
            )

    @property
    def table_bytes(self) -> int:
        """Bytes of the table."""
        if self.estimator.dense:
            return self.n_samples * self.layout.numel * self.layout.dtype.itemsize
        return self.n_samples * 16 * int(getattr(self.estimator, "directions", 1))

    @property
    def table_mean(self) -> Tensor | None:
        """The running mean of the table, all parameters in one vector."""
        return self._memory.get("mean")

    def _next_queries(self) -> int:
        cost = self.estimator.queries(self.layout.numel)
        return cost * (self.batch_size + (0 if "table" in self._memory else self.n_samples))

    def _estimate(self, ask: Ask) -> float:
        if "table" not in self._memory:
            self._fill_table(ask)
        indices = self._batch(replacement=False)  # distinct: a row must not be replaced twice
        rows, keys, value = self.estimator.rows(ask, self._draw("step", indices), self.smoothing)
        new = self._mean_of(rows, keys)
        old = self._mean_of(*self._rows_at(indices))
        self._change = Sum([new, _negative(old)])
        self._share = len(indices) / self.n_samples
        self._next = (indices, rows, keys)
        return value

    def _slice(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        assert self._change is not None
        change = self._change.slice(first, last, dtype)
        mean: Tensor = self._memory["mean"][first:last]
        v = change + mean
        mean.add_(change, alpha=self._share)  # after v: the old mean belongs to the old rows
        return v

    def _update(self, rates: list[float]) -> None:
        super()._update(rates)
        indices, rows, keys = self._next
        self._memory["table"][indices] = rows.to("cpu")
        if keys is not None:
            self._memory["keys"][indices] = keys.to("cpu")
        if (self._steps + 1) % (10 * -(-self.n_samples // self.batch_size)) == 0:
            self._refresh_mean()

    def _fill_table(self, ask: Ask) -> None:
        draw = self._draw("table", torch.arange(self.n_samples))
        rows, keys, _ = self.estimator.rows(ask, draw, self.smoothing)
        self._memory["table"] = rows.to("cpu")
        if keys is not None:
            self._memory["keys"] = keys.to("cpu")
        self._memory["mean"] = torch.zeros(self.layout.numel, dtype=self.layout.dtype, device=self.layout.device)
        self._refresh_mean()

    def _refresh_mean(self) -> None:
        """Compute the mean from the table, so that rounding does not pile up."""
        mean = self._memory["mean"]
        found = self._mean_of(*self._rows_at(torch.arange(self.n_samples)))
        for first, last in pieces(0, self.layout.numel):
            mean[first:last] = found.slice(first, last, mean.dtype)

    def _rows_at(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        keys = self._memory.get("keys")
        device = self.layout.device
        return self._memory["table"][indices].to(device), None if keys is None else keys[indices].to(device)

    @staticmethod
    def _mean_of(rows: Tensor, keys: Tensor | None) -> Estimate:
        if keys is None:
            return Dense(rows.mean(0))
        return Replayed(keys.reshape(-1), rows.reshape(-1) / len(rows))

    def _loaded(self, name: str, value: Any) -> Any:
        if name in ("table", "keys"):
            return value.to("cpu", copy=True)
        return super()._loaded(name, value)


def _negative(estimate: Estimate) -> Estimate:
    if isinstance(estimate, Dense):
        return Dense(-estimate.vector)
    assert isinstance(estimate, Replayed)
    return Replayed(estimate.keys, -estimate.weights)
