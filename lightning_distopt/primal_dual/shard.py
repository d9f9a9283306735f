"""A shard: the samples of one worker as rows of sparse arrays, with what its passes and its share of the certificate need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.primal_dual import kernels
from lightning_distopt.primal_dual.losses import Loss

__all__ = ["Shard", "pass_key"]

Array = NDArray[np.float64]


def pass_key(seed: int, worker: int, number: int) -> int:
    """Return the key of one pass: every worker has an order of its own."""
    return derive_key(seed, worker, number, "primal_dual")


class Shard:
    """Samples of one worker, and the problem that they belong to.

    Args:
        starts: where each row begins in ``indices`` and ``data``, ``(n,)``, int32 or int64.
        ends: where it ends; rows need not follow one another, so a shard shares the arrays of the matrix that it is of.
        indices: columns, int32 or int64.
        data: values, float32 or float64; kept as they are.
        y: targets, ``(n,)``; -1 and 1 for losses of labels.
        weight: c, the weight of each sample, ``(n,)``.
        columns: features d.
        loss: a row of the table.
        lam: strength of the regulariser, above 0.
        total: N, the weight of all samples of all workers.
        bias: append the constant feature 1.
    """

    def __init__(
        self,
        starts: NDArray[np.integer],
        ends: NDArray[np.integer],
        indices: NDArray[np.integer],
        data: NDArray[np.floating],
        y: Array,
        weight: Array,
        columns: int,
        loss: Loss,
        lam: float,
        total: float,
        bias: bool,
    ) -> None:
        self.starts, self.ends, self.indices, self.data = starts, ends, indices, data
        self.y = np.ascontiguousarray(y, dtype=np.float64)
        self.weight = np.ascontiguousarray(weight, dtype=np.float64)
        self.loss, self.lam, self.total, self.bias = loss, float(lam), float(total), bool(bias)
        self.n, self.dim = len(self.y), columns + int(bias)
        self.factor = 1.0 / (self.lam * self.total)
        self.q = np.empty(self.n)
        kernels.norms(starts, ends, data, self.weight, self.factor, self.bias, self.q)
        self._order = np.empty(self.n, np.int32)
        self._order_of = -1

    @property
    def nonzeros(self) -> int:
        """Entries of the samples, the constant feature included."""
        return int((self.ends - self.starts).sum(dtype=np.int64)) + self.bias * self.n

    def passes(self, alpha: Array, m: Array, sigma: float, keys: Sequence[int]) -> None:
        """Visit all samples once for each key; changes ``alpha`` and ``m = base + sigma u`` in place."""
        self._order_of = -1
        kernels.passes(
            self.starts, self.ends, self.indices, self.data, self.y, self.weight, self.factor, self.q, alpha, self._order,
            np.array([key & (2**64 - 1) for key in keys], np.uint64), m, sigma, self.loss.code, self.loss.smoothing, self.bias,
        )  # fmt: skip

    def draws(self, alpha: Array, m: Array, sigma: float, seed: int, worker: int, start: int, count: int) -> None:
        """Visit the samples that come ``start``-th to ``start + count``-th in an endless row of permutations."""
        while count and self.n:
            number, at = divmod(start, self.n)
            if number != self._order_of:
                kernels.permutation(self._order, np.uint64(pass_key(seed, worker, number) & (2**64 - 1)))
                self._order_of = number
            some = min(count, self.n - at)
            self.visit(alpha, m, sigma, self._order[at : at + some])
            start, count = start + some, count - some

    def visit(self, alpha: Array, m: Array, sigma: float, order: NDArray[np.int32]) -> None:
        """Visit the samples of ``order``; changes ``alpha`` and ``m = base + sigma u`` in place."""
        kernels.sdca(
            self.starts, self.ends, self.indices, self.data, self.y, self.weight, self.factor, self.q, alpha, order, m, sigma,
            self.loss.code, self.loss.smoothing, self.bias,
        )  # fmt: skip

    def contribution(self, alpha: Array) -> Array:
        """Return this shard's part of ``v(alpha) = 1/(lam N) sum_i c_i alpha_i x_i``, ``(dim,)``."""
        v = np.zeros(self.dim)
        kernels.add_rows(self.starts, self.ends, self.indices, self.data, self.factor, self.weight, alpha, self.bias, v)
        return v

    def primal_sum(self, w: Array) -> float:
        """Return ``sum_i c_i phi(x_i.w, y_i)``."""
        total = kernels.primal_sum(
            self.starts, self.ends, self.indices, self.data, self.y, self.weight, w, self.loss.code, self.loss.smoothing,
            self.bias,
        )  # fmt: skip
        return float(total)

    def primal_and_unsettled(self, w: Array, alpha: Array, most: float, out: NDArray[np.int32]) -> tuple[float, int]:
        """Return :meth:`primal_sum` and how many samples, now first in ``out``, a step at ``w`` would move; for the hinges."""
        total, count = kernels.primal_and_unsettled(
            self.starts, self.ends, self.indices, self.data, self.y, self.weight, w, self.loss.code, self.loss.smoothing,
            self.bias, alpha, most, out,
        )  # fmt: skip
        return float(total), int(count)

    @property
    def primal_at_zero(self) -> float:
        """``1/N sum_i c_i phi(0, y_i)``: P(0), and the gap at alpha = 0 too, since D(0) is 0."""
        return float(self.weight @ self.loss.value(np.zeros(1), self.y)) / self.total

    def dual_sum(self, alpha: Array) -> float:
        """Return ``sum_i c_i dual(alpha_i, y_i)``."""
        return float(kernels.dual_sum(alpha, self.y, self.weight, self.loss.code, self.loss.smoothing))
